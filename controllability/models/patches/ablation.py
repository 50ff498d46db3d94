"""What the patches of some layers do to the logits when the others are left out.  (new)"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from controllability.errors import BadInput
from controllability.models.hooks.own_modes import own_modes
from controllability.models.patches.applied import applied
from controllability.models.patches.parts import select
from controllability.models.patches.record import PatchRecord
from controllability.models.reading.heads import Result, Runs, compare_results, without_logits
from controllability.models.reading.positions import pair_positions
from controllability.rendering.figure import Lines, Panel
from controllability.rendering.study import Study

KINDS = "alone", "left out", "from below", "from above"


@dataclass(frozen=True, repr=False)
class Ablation(Study):
    """``rows``, four a layer: kind, layer, and for the model with only these layers patched the largest logit difference (relative to the
    largest logit) and the largest KL, in nats: ``error`` and ``kl`` against the contextual model, ``error_plain`` and ``kl_plain`` against
    the plain one; ``top1`` is the share of positions with the contextual model's likeliest token.  ``without`` is the plain model's own row.
    """

    rows: Sequence[dict[str, Any]]
    without: dict[str, Any]
    title = "What the patches of some layers do"

    def records(self) -> list[dict[str, Any]]:
        return [*self.rows]

    def panels(self) -> Sequence[Panel]:
        lines = {kind: [row["error"] for row in self.rows if row["kind"] == kind] for kind in KINDS}
        layers = [row["layer"] for row in self.rows if row["kind"] == KINDS[0]]
        return [Lines(self.title, "layer", "logit error against the contextual model", layers, lines)]


def ablation(patch: PatchRecord, model: nn.Module) -> Ablation:
    """See ``ModelPatch.ablation``."""
    target, source = patch.inputs["target"], patch.inputs["source"]
    if not target:
        raise BadInput(
            "this patch has no target to be held against: a part of a patch, or an adapter's, cannot be ablated"
        )
    source_rows, target_rows = pair_positions(target, source, patch.scope, patch.inputs["positions"])
    with own_modes(model), Runs(model, without_logits(model, [target, source])) as run:
        wanted, plain = run(target).at(target_rows), run(source).at(source_rows)
        rows = []
        for kind, layer, kept in _parts(sorted({entry.layer for entry in patch.entries})):
            found = plain
            if kept:
                with applied(select(patch, layers=kept), model):
                    found = run(source).at(source_rows)
            rows.append({"kind": kind, "layer": layer} | _compared(found, wanted, plain))
    return Ablation(rows, {"kind": "without", "layer": None} | _compared(plain, wanted, plain))


def _parts(layers: list[int]) -> Iterator[tuple[str, int, list[int]]]:
    for layer in layers:
        alone, rest = [layer], [other for other in layers if other != layer]
        below, above = [o for o in layers if o <= layer], [o for o in layers if o >= layer]
        yield from ((kind, layer, kept) for kind, kept in zip(KINDS, (alone, rest, below, above), strict=True))


def _compared(found: Result, wanted: Result, plain: Result) -> dict[str, float]:
    (there,), (here,) = compare_results(wanted, found), compare_results(plain, found)
    return {
        "error": there.relative_error, "kl": float(there.kl.max()), "error_plain": here.relative_error,
        "kl_plain": float(here.kl.max()), "top1": there.top1_agreement,
    }  # fmt: skip
