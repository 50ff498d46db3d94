"""What a smaller rank costs: agreement on the queries and on held-out ones, and drift elsewhere, against the rank."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from controllability.compiling.exact_or_ridge import patch_of, rank_of
from controllability.compiling.metric_sweep import fitted
from controllability.compiling.result import Compiled
from controllability.compiling.token_sets import repeated
from controllability.compiling.yardstick import Agreement
from controllability.errors import NotControllable, NotVerified, SideConditionFailed
from controllability.models.hooks.own_modes import own_modes
from controllability.models.sweep.target_run import Progress, silent
from controllability.rendering.figure import drawn, legend_below, two_plots

MOST = 6  # ranks that are tried


@dataclass(frozen=True)
class RankRow:
    """One rank and the agreement of a patch of that rank on each set."""

    rank: int
    exact: bool
    results: dict[str, Agreement]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"rank": self.rank, "exact": self.exact} | {k: v.to_dict() for k, v in self.results.items()}


def ranks_below(full: int, most: int = MOST) -> list[int]:
    """A handful of ranks from 1 up, each about the same multiple of the one before, all below ``full``.

    >>> ranks_below(64), ranks_below(3), ranks_below(1)
    ([1, 2, 4, 8, 16, 32], [1, 2], [])
    """
    steps = [round(full ** (i / most)) for i in range(most)]
    return sorted({rank for rank in steps if 1 <= rank < full})


def measure_by_rank(compiled: Compiled, model: Any, progress: Progress) -> list[RankRow]:
    """Least-squares patches of smaller ranks with the same λ, each measured on every set; the compiled one is the last row.

    A rank for which there is no patch is left out.
    """
    full = rank_of(compiled.patch)
    rows, ranks = [], ranks_below(full)
    solution, samples = compiled.solution, compiled.sets["queries"].samples
    wish = replace(solution.wish, ridge=solution.ridge, keep_rms=False)
    for i, rank in enumerate(ranks):
        try:
            if solution.plan is not None:
                patch = fitted(model, compiled.sets["queries"], solution.plan, rank, compiled.patch.moments, silent)
            else:
                patch = patch_of(model, repeated(samples), replace(wish, rank=rank), silent)
        except (SideConditionFailed, NotControllable, NotVerified):
            continue
        finally:
            progress("ranks", i + 1, len(ranks))
        with own_modes(model), patch.applied(model):
            rows.append(RankRow(rank, False, {k: yardstick.measure(model) for k, yardstick in compiled.sets.items()}))
    return [*rows, RankRow(full, compiled.exact, compiled.results)]


def rank_picture(compiled: Compiled, rows: list[RankRow], path: Path) -> Path:
    """Draw the rows to ``path`` (PNG, written atomically)."""
    ranks = [row.rank for row in rows]
    figure, (left, right) = two_plots()
    for name, label, colour in (("queries", "queries", "#2a6fbb"), ("heldout", "held-out queries", "#bb5a2a")):
        if name in compiled.sets:
            left.plot(ranks, [row.results[name].top1_agreement for row in rows], "o-", label=label, color=colour)
            without = compiled.sets[name].unpatched.top1_agreement
            left.axhline(without, linestyle=":", color=colour, label=f"{label}, unpatched")
    left.set(xlabel="rank", ylabel="same likeliest token as with the context", ylim=(-0.06, 1.06), title="agreement")
    right.plot(ranks, [row.results["unrelated"].kl for row in rows], "s-", color="#666666")
    right.set(xlabel="rank", ylabel="mean KL from the base model (nats)", title="drift on unrelated text")
    right.margins(y=0.15)
    right.set_ylim(bottom=-0.05 * right.get_ylim()[1])
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.minorticks_off()
    legend_below(left)
    return drawn(figure, path)
