"""Compiled contexts beside other methods on the same texts: ``python tests/benchmarks/peers.py MODEL --out results.json``.

MODEL is a Gemma 3.  Every method has one knob, and walks it: a line of held-out KL against drift for each context (``peer_texts.py``
says what is measured, ``peer_methods.py`` and ``peer_distillation.py`` what the methods are).  All have the same second moments: of
``--rows``, a JSON list of rows of token ids (what the model writes by itself), or read from ``--moments``, one file or more.
``--out`` is written after every point, and what stands there is not made again; ``--read`` only shows files.

Drift along a line is of half of the unrelated texts.  The point of a method that is next to ours at ``balanced`` is measured on
all of them, and is its row in the table; *at equal drift* is the held-out KL on the line there, drawn straight in log(drift).
Seconds are of the processor (set OMP_NUM_THREADS=1), C and the answers given, the run over the context counted for all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import markdown
from peer_distillation import RATES, Rows, chosen_rate, trajectory
from peer_methods import CLOSED, Change, Metrics, Point, applied
from peer_texts import Task, draw_elsewhere, draw_task, self_sampled, together

import controllability as ct
from controllability.models.loading import load_model
from controllability.models.moments import Metric, Moments

TEXTS = Path(__file__).parents[1] / "data" / "peer_texts.json"
DISTILLED = {f"lora-{rank}{kept}": (rank, not kept) for rank in (8, 16) for kept in ("", "-free")}
METHODS = (*CLOSED, *DISTILLED)
OURS, BALANCED = "ours", "balanced"
Row = dict[str, Any]


def moments_of(model: Any, files: Sequence[str], rows: Rows) -> Moments:
    """Those of the files together; without any, of the rows."""
    if not files:
        return ct.second_moments(model, [torch.tensor(rows[i : i + 8]) for i in range(0, len(rows), 8)])
    parts = [ct.load_moments(path, model) for path in files]
    metrics = {
        name: Metric(torch.stack([part.metrics[name].second for part in parts]).sum(0)) for name in parts[0].metrics
    }
    return Moments(metrics, sum(part.tokens for part in parts))


def points_of(
    method: str, model: Any, task: Task, metrics: Metrics, rows: Rows, marks: Sequence[int], rate: float | None
) -> Iterator[Point]:  # fmt: skip
    """A method's line on a context."""
    if method in CLOSED:
        return CLOSED[method](model, task, metrics)
    rank, preserves = DISTILLED[method]
    assert rate is not None
    return (point for point, _ in trajectory(model, task, rank, rate, marks, rows if preserves else ()))


def measured(model: Any, task: Task, point: Point) -> Row:
    """A point on the sets of a task."""
    with applied(model, point.change):
        found = task.measure(model)
    return {"knob": point.knob, "seconds": point.seconds, "passes": point.passes, "sets": found}


def walk(
    method: str, model: Any, task: Task, points: Iterator[Point], known: Sequence[Row], keep: Callable[..., None]
) -> None:
    """Measure a line point by point (``keep`` is given each row), and its point next to ours on all unrelated texts."""
    rows: list[Row] = []
    changes: list[Change] = []
    for point in points:
        rows.append({"context": task.name, "method": method} | measured(model, task, point))
        changes.append(point.change)
        keep(rows[-1])
    nearest = next_to(rows, balanced([*known, *rows]) or rows[len(rows) // 2])
    with applied(model, changes[rows.index(nearest)]):
        rest = task.rest.measure(model)
    nearest["all"] = together(nearest["sets"]["unrelated"], rest)
    keep()


def balanced(rows: Sequence[Row]) -> Row | None:
    """Ours at its default strength."""
    return next((row for row in rows if (row["method"], row["knob"]) == (OURS, BALANCED)), None)


def drift(row: Row) -> float:
    """On half of the unrelated texts."""
    return max(row["sets"]["unrelated"]["kl"], 1e-9)


def next_to(rows: Sequence[Row], other: Row) -> Row:
    """The one whose drift is nearest, as a ratio."""
    return min(rows, key=lambda row: abs(math.log(drift(row) / drift(other))))


def at_drift(rows: Sequence[Row], wanted: float) -> float | None:
    """The relative held-out KL of a line at a drift, straight in log(drift); the best of what is left of it beyond its end.

    None where the whole line drifts more.
    """
    line = sorted((math.log(drift(row)), row["sets"]["heldout"]["relative"]) for row in rows)
    x = math.log(wanted)
    best = [y for at, y in line if at <= x + 1e-12]
    for (left, y), (right, z) in pairwise(line):
        if left <= x < right:
            best.append(y + (z - y) * (x - left) / (right - left))
    return min(best, default=None)


def cheapest(rows: Sequence[Row], heldout: float, drifts: float = math.inf) -> tuple[float, bool]:
    """(seconds, reached): of the first point with at most this held-out KL and this drift; else the most that was spent."""
    enough = [row for row in rows if row["sets"]["heldout"]["relative"] <= heldout and drift(row) <= drifts]
    return min(row["seconds"] for row in enough) if enough else max(row["seconds"] for row in rows), bool(enough)


COLUMNS: dict[str, Callable[[Row], Any]] = {
    "knob": lambda row: row["knob"],
    "queries": lambda row: row["sets"]["queries"]["relative"],
    "held out": lambda row: row["sets"]["heldout"]["relative"],
    "near": lambda row: row["sets"]["near"]["kl"],
    "unrelated": lambda row: row["all"]["kl"],
    "same token": lambda row: row["all"]["same"],
    "held out at equal drift": lambda row: row["equal"],
    "seconds": lambda row: row["seconds"],
    "passes": lambda row: row["passes"],
}


def table(found: Sequence[Row]) -> str:
    """A row for each method, of its point next to ours; in a cell one number for each context."""
    lines, contexts = [], list(dict.fromkeys(row["context"] for row in found))
    for method in sorted({row["method"] for row in found}, key=METHODS.index):
        rows = []
        for context in contexts:
            here = [row for row in found if row["context"] == context]
            line, ours = [row for row in here if row["method"] == method], balanced(here)
            nearest = next((row for row in line if "all" in row), None)
            rows.append(nearest and nearest | {"equal": at_drift(line, drift(ours)) if ours else None})
        lines.append([method, *(" / ".join(shown(row and value(row)) for row in rows) for value in COLUMNS.values())])
    return f"{' / '.join(contexts)}\n\n{markdown(['method', *COLUMNS], lines)}"


def shown(value: Any) -> str:
    """A number with two digits; a dash for none."""
    return (
        "–"
        if value is None
        else f"{value:.2g}"
        if isinstance(value, float) and value < 10
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def ratios(found: Sequence[Row]) -> str:
    """Ours at ``balanced`` against the distillation that reaches its held-out KL in the least time, whatever it drifts and with no more drift."""
    lines = []
    for context in dict.fromkeys(row["context"] for row in found):
        here = [row for row in found if row["context"] == context]
        trained, ours = [row for row in here if row["method"] in DISTILLED], balanced(here)
        if trained and ours:
            for what, most in (("any", math.inf), ("ours or less", drift(ours))):
                seconds, reached = cheapest(trained, ours["sets"]["heldout"]["relative"], most)
                ratio = f"{'' if reached else 'below '}1/{seconds / ours['seconds']:.0f}"
                lines.append([context, what, ours["seconds"], seconds if reached else f"not in {seconds:.0f}", ratio])
    return markdown(["context", "drift", "ours, seconds", "distillation of equal held-out KL, seconds", "ratio"], lines)


def better_peers(found: Sequence[Row]) -> str:
    """Every point of another method with less held-out KL than our line has at its drift."""
    lines = []
    for row in found:
        ours = [other for other in found if (other["context"], other["method"]) == (row["context"], OURS)]
        held, here = row["sets"]["heldout"]["relative"], at_drift(ours, drift(row)) if ours else None
        if row["method"] != OURS and (here is None or held < here):
            lines.append([row["context"], row["method"], row["knob"], drift(row), held, "–" if here is None else here])
    return markdown(["better: context", "method", "knob", "drift", "held out", "ours there"], lines)


def plot(found: Sequence[Row], path: Path) -> Path:
    """Held-out KL against drift, a panel a context and a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from controllability.rendering.figure import drawn

    contexts = list(dict.fromkeys(row["context"] for row in found))
    figure, panels = pyplot.subplots(
        1, len(contexts), figsize=(3.6 * len(contexts), 3.6), layout="constrained", squeeze=False
    )
    colours = {method: pyplot.get_cmap("tab10")(i) for i, method in enumerate(METHODS)}
    for panel, context in zip(panels[0], contexts, strict=True):
        for method in METHODS:
            line = [row for row in found if (row["context"], row["method"]) == (context, method)]
            line.sort(key=lambda row: drift(row) if method in CLOSED else row["seconds"])
            xy = [(drift(row), row["sets"]["heldout"]["relative"]) for row in line]
            if xy:
                width = 2.4 if method == OURS else 1.2
                panel.plot(*zip(*xy, strict=True), "o-", ms=3, lw=width, label=method, color=colours[method])
        panel.set(title=context, xlabel="drift (nats)", xscale="log", ylim=(0, 1.05))
        left, right = panel.get_xlim()
        ticks = [
            tick for tick in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if left < tick < right
        ]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
    panels[0][0].set_ylabel("held-out KL ÷ unpatched")
    named = {label: line for panel in panels[0] for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    order = [method for method in METHODS if method in named]
    figure.legend(
        [named[m] for m in order], order, loc="outside lower center", ncols=len(order), fontsize="small", frameon=False
    )
    return drawn(figure, path)


def read(paths: Sequence[str]) -> list[Row]:
    """The points of result files, one after the other."""
    return [row for path in paths if Path(path).exists() for row in json.loads(Path(path).read_text())["points"]]


def write(path: Path, points: Sequence[Row], **more: Any) -> None:
    """Atomically."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(more | {"points": points}, indent=1))
    os.replace(temporary, path)


def measure(args: argparse.Namespace) -> list[Row]:
    """Every method that is asked for on every context, as far as ``--out`` does not have it."""
    model, tokenizer = load_model(args.model)
    texts = json.loads(Path(args.texts).read_text())
    elsewhere = draw_elsewhere(model, tokenizer, texts["near"], texts["unrelated"])
    first = elsewhere["near"].samples[0].source[0]
    rows = json.loads(Path(args.rows).read_text()) if args.rows else self_sampled(model, first)
    metrics = Metrics(moments_of(model, args.moments, rows))
    drawn: dict[str, Task] = {}

    def task(name: str) -> Task:
        if name not in drawn:
            drawn.clear()  # log-probabilities are large
            drawn[name] = draw_task(model, tokenizer, name, texts["contexts"][name], elsewhere)
        return drawn[name]

    out = Path(args.out)
    rates = dict(json.loads(out.read_text())["rates"]) if out.exists() else {}
    found = _Found(read([args.out]), out, rates)
    for method in args.methods:
        if method in DISTILLED and method not in rates:
            rates[method] = args.rate or rate_for(method, model, task(args.tune), args.tune_steps, rows)
        for context in args.contexts:
            if found.opens(method, context):
                points = points_of(method, model, task(context), metrics, rows, args.marks, rates.get(method))
                beside = [*found.of(context), *_Found(read(args.beside)).of(context)]
                walk(method, model, task(context), points, beside, found.keep)
    return found.rows


class _Found:
    """The points so far, written after each."""

    def __init__(self, rows: list[Row], out: Path | None = None, rates: Any = None) -> None:
        self.rows, self.out, self.rates = rows, out, rates

    def of(self, context: str) -> list[Row]:
        return [row for row in self.rows if row["context"] == context]

    def opens(self, method: str, context: str) -> bool:
        """Whether a line is still to be walked; one that was left in the middle is begun anew."""
        line = [row for row in self.of(context) if row["method"] == method]
        if any("all" in row for row in line):
            return False
        self.rows = [row for row in self.rows if row not in line]
        return True

    def keep(self, row: Row | None = None) -> None:
        """A further point, or a change of one."""
        if row is not None:
            self.rows.append(row)
            sets = row["sets"]
            print(
                f"{row['context']:6s} {row['method']:12s} {row['knob']:14s} queries {sets['queries']['relative']:.4f} "
                f"held out {sets['heldout']['relative']:.3f} unrelated {sets['unrelated']['kl']:.4f} near {sets['near']['kl']:.3f} "
                f"{row['seconds']:.1f} s", flush=True,
            )  # fmt: skip
        if self.out is not None:
            write(self.out, self.rows, rates=self.rates)


def rate_for(method: str, model: Any, task: Task, steps: int, rows: Rows) -> float:
    """The learning rate of a distillation, chosen on another context."""
    rank, preserves = DISTILLED[method]
    return chosen_rate(model, task, rank, steps, rows if preserves else ())


def main() -> None:
    """Measure or read, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--texts", default=str(TEXTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--contexts", nargs="+", default=["facts", "story", "style"])
    parser.add_argument("--rows")
    parser.add_argument("--moments", nargs="+", default=[])
    parser.add_argument(
        "--marks", nargs="+", type=int, default=[10, 20, 40, 80, 160, 320, 500], help="steps of distillation"
    )
    parser.add_argument("--tune", default="style", help="the context that the learning rate is chosen on")
    parser.add_argument("--tune-steps", type=int, default=20)
    parser.add_argument("--rate", type=float, help=f"the learning rate, instead of the best of {RATES}")
    parser.add_argument("--out", default="peers.json")
    parser.add_argument("--beside", nargs="+", default=[], help="files with our own points, where --out has none")
    parser.add_argument("--read", nargs="+", default=[])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if not args.read and not args.model:
        parser.error("give a model, or files to --read")
    found = read(args.read) if args.read else measure(args)
    print(f"\n{table(found)}\n\n{ratios(found)}\n\n{better_peers(found)}")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
