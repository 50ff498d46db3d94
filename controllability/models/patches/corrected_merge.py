"""Merging that corrects itself from layer to layer: each layer is solved on top of the rounded ones before it.

A patch is solved from what the model computes; written into half precision it computes something else, and
the layers behind were not made for that.  Here layer k is solved when the layers before it hold their
rounded weights already, so it makes good what their rounding did.  What is left is the last layer's own.  (new)
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from controllability.models.hooks.installation import HookStack
from controllability.models.hooks.layer_hooks import LayerHook, LayerHooks
from controllability.models.patches.applier import Entry
from controllability.models.patches.record import PatchRecord
from controllability.models.reading.checked_reading import checked_reading, codebooks_of
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.positions import pair_positions
from controllability.models.sweep.fallbacks import Plan, with_reader_of_last_layer
from controllability.models.sweep.layer_sweep import Sweeper
from controllability.models.sweep.target_run import observe_target, silent


def solved_again(patch: PatchRecord, model: nn.Module) -> Iterator[Entry]:
    """The entries of a patch of one set of weights, each layer's solved when it is asked for.

    Whoever writes them into ``model`` before asking for more gets patches that know of the rounding so far.  Costs one
    target run, and one source run a layer.  Raises ``SideConditionFailed`` where a layer's numbers changed too much.
    """
    inputs = patch.inputs
    checked = checked_reading(model, inputs["target"])
    jointly = patch.scope == "all"
    reading, proofs = checked.reading, checked.proofs(patch.report.via, patch.report.route, jointly)
    source_rows, target_rows = pair_positions(
        inputs["target"], inputs["source"], patch.scope, inputs["positions"], codebooks_of(checked), checked.length
    )
    joint = patch.joint
    if joint is not None and jointly:
        joint = with_reader_of_last_layer(joint, model, checked, inputs["target"])
    with LayerHooks(model, reading) as hooks:
        targets, _ = observe_target(hooks, without_cache(model, inputs["target"]), target_rows, silent)
    source = without_cache(model, inputs["source"])
    derivations = {layer.index: layer.derivation for layer in patch.report.layers}
    plan = Plan(proofs, patch.scope, joint, [derivations.get(i, 0) for i in range(len(proofs))])
    for layer, calls in zip(reading.layers, targets, strict=True):
        if not calls:
            continue  # this input does not reach it
        solver = plan.solver(layer, 0, calls[0], source_rows)
        sweeper, installation = Sweeper(layer, [solver], lambda: None), HookStack()
        try:
            LayerHook(model, layer, sweeper, installation, sequence_first=reading.architecture.sequence_first)
            model(**source)
        finally:
            installation.undo()
        yield from (Entry(param, delta, layer.index) for param, delta in solver.deltas().items())
