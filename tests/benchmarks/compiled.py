"""One patch for all questions about a context, side by side with the other ways: ``python tests/benchmarks/compiled.py``.

The package's trained model; contexts of 8 facts; every method gets the same queries and is judged on the same sets
(``compiled_sets.py``), beside the unpatched model.  What a method has to choose (λ, Adam's learning rate) is chosen on other
contexts, ``--tuning`` of them: λ by the mean KL on their held-out questions, the learning rate by how soon the KL on the queries is
reached, and by the lowest at the end.  A refusal is a row that says so.

Prints JSON, or tables with ``--table``.  Columns: top-1 agreement, mean KL and right answers, means over the contexts; largest
logit error of all; seconds, the median (ours on a new model object each time, whose reading and checking is counted).
Seconds are processor time, so that what else runs on the machine does not count: set OMP_NUM_THREADS=1, or those of all
threads are added up.
The ratios are seconds of the exact solution ÷ seconds of distillation of that rank until the KL on the queries was
reached for the first time; where it never was, the whole budget counts, and the ratio is at most that.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compiled_distillation import THRESHOLDS, Distilled, Training, distil
from compiled_methods import mean_of_token_patches, one_set_of_weights, ridge_on_down_alone
from compiled_sets import HELD_OUT, Task, draw_task
from compiled_tables import ratio_table, reached_table

from controllability.errors import ControllabilityError
from controllability.models.loading import load_model

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
EXACT = "exact"
Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A name, what makes the model of a task with one of the choices, and the choices there are."""

    name: str
    make: Callable[[Any, Task, Any], Any]
    choices: tuple[Any, ...] = (None,)


def methods(rank: int) -> list[Method]:
    """All but distillation; fits of ours are of full rank and of ``rank``."""

    def ours(**options: Any) -> Callable[[Any, Task, Any], Any]:
        return lambda model, task, ridge: one_set_of_weights(
            model, task, **options, **({"ridge": ridge} if ridge else {})
        )

    return [
        Method("unpatched", lambda model, task, _: model),
        Method(EXACT, ours()),
        Method("exact, via output", ours(via="output")),
        Method("ridge, via output", ours(via="output"), RIDGES),
        Method(f"ridge, via output, rank {rank}", ours(via="output", rank=rank), RIDGES),
        Method("ridge, via input-output", ours(), RIDGES),
        Method("ridge on W_down alone", ridge_on_down_alone, RIDGES),
        Method("mean of token patches", lambda model, task, _: mean_of_token_patches(model, task)),
    ]


def row(method: Method, model: Any, task: Task, choice: Any) -> Row:
    """What a method reaches on every set, and its seconds.  A refusal is a result."""
    found: Row = {"method": method.name, "choice": choice}
    started = time.process_time()
    try:
        changed = method.make(model, task, choice)
    except ControllabilityError as refused:
        return found | {"refused": str(refused).splitlines()[0]}
    return found | {"seconds": time.process_time() - started, "sets": task.measure(changed)}


def chosen(method: Method, model: Any, tasks: Sequence[Task]) -> Any:
    """The choice with the lowest mean KL on held-out questions; one that is refused comes last."""

    def held_out(choice: Any) -> float:
        rows = [row(method, model, task, choice) for task in tasks]
        return sum(r["sets"][name]["kl"] if "sets" in r else float("inf") for r in rows for name in HELD_OUT)

    return method.choices[0] if len(method.choices) == 1 else min(method.choices, key=held_out)


def tuned(model: Any, tasks: Sequence[Task], rank: int, grid: Sequence[Training], steps: int) -> dict[Any, Training]:
    """The training that reaches each threshold in the fewest steps, and under "final" the one that ends lowest."""
    runs = {training: [distil(model, t, rank or t.tokens, training, steps) for t in tasks] for training in grid}

    def late(training: Training, threshold: float) -> tuple[int, float]:
        runs_of = runs[training]
        taken = sum(r.reached[threshold].steps if threshold in r.reached else steps + 1 for r in runs_of)
        return taken, sum(r.lowest_kl for r in runs_of)

    best: dict[Any, Training] = {t: min(grid, key=lambda training, t=t: late(training, t)) for t in THRESHOLDS}
    return best | {"final": min(grid, key=lambda training: sum(r.final_kl for r in runs[training]))}


def distillation(model: Any, task: Task, rank: int, best: dict[Any, Training], steps: int) -> list[Row]:
    """A row for the end of the best training, and one for where each threshold was reached first, if it was."""
    runs: dict[Training, Distilled] = {
        t: distil(model, task, rank or task.tokens, t, steps) for t in set(best.values())
    }
    name = f"distilled, rank {rank or 'as exact'}"
    rows: list[Row] = []
    for until, training in best.items():
        run = runs[training]
        found: Row = {"method": f"{name}, {until if until == 'final' else f'KL {until:g}'}", "choice": str(training)}
        if until == "final":
            rows.append(found | {"seconds": run.seconds, "steps": steps, "sets": task.measure(run.final)})
        elif until in run.reached:
            rows.append(found | vars(run.reached[until]) | {"sets": task.measure(run.at[until])})
        else:
            why = f"not reached in {steps} steps: lowest KL {run.lowest_kl:.1e}"
            rows.append(found | {"refused": why, "budget_seconds": run.seconds})
    return rows


def ratios(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Seconds of the exact solution ÷ those of distillation until each KL, for one task."""
    exact = next(r for r in rows if r["method"] == EXACT)
    found = {}
    for r in rows:
        if r["method"].startswith("distilled") and not r["method"].endswith("final") and "seconds" in exact:
            seconds = r.get("seconds", r.get("budget_seconds"))
            found[r["method"]] = {"ratio": exact["seconds"] / seconds, "reached": "seconds" in r}
    return found


def main() -> None:
    """Tune, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=5, help="contexts that are measured")
    parser.add_argument("--tuning", type=int, default=1, help="other contexts, to choose λ and learning rates on")
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="*",
        default=[8, 0],
        help="of the adapters; 0: as many as there are tokens; none: no distillation",
    )
    parser.add_argument("--steps", type=int, default=3000, help="Adam's budget")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2])
    parser.add_argument("--seed", type=int, default=30_000)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if min(args.worlds, args.facts, args.steps) < 1 or min(args.tuning, *args.ranks, 0) < 0:
        parser.error("worlds, facts and steps count from 1 on, tuning and ranks from 0 on")
    model, tokenizer = load_model("embedded")
    draw = [draw_task(model, tokenizer, args.seed + i, args.facts) for i in range(args.tuning + args.worlds)]
    tuning, measured = draw[: args.tuning], draw[args.tuning :]
    grid = [Training(rate, decays) for rate in args.rates for decays in (False, True)]
    listed = methods(next((rank for rank in args.ranks if rank), 8))
    choices = {m.name: chosen(m, model, tuning) for m in listed}
    best = {rank: tuned(model, tuning, rank, grid, args.steps) for rank in args.ranks}
    tasks: list[Row] = []
    for task in measured:
        rows = [row(m, model, task, choices[m.name]) for m in listed]
        rows += [r for rank in args.ranks for r in distillation(model, task, rank, best[rank], args.steps)]
        tasks.append({"tokens": task.tokens, "rows": rows, "ratios": ratios(rows)})
        print(f"{len(tasks)} of {len(measured)} contexts", file=sys.stderr)
    if not args.table:
        print(json.dumps({"threads": torch.get_num_threads(), **vars(args), "tasks": tasks}, indent=1))
        return
    print(reached_table(tasks), "", ratio_table(tasks), sep="\n")
    trained = {rank: {until: str(training) for until, training in found.items()} for rank, found in best.items()}
    print(f"chosen: { ({name: choice for name, choice in choices.items() if choice}) } {trained}")


if __name__ == "__main__":
    main()
