"""A merge whose layers make good what rounding did before them.  (new)

A patch is solved from what the model computes; written into half precision it computes something else, and the layers behind were
not made for that.  Here each layer is solved on top of the rounded weights before it, in one target run and one source run.
"""

from collections.abc import Callable

from torch import nn

from controllability.models.hooks.installation import HookStack
from controllability.models.hooks.layer_hooks import LayerHook, LayerHooks
from controllability.models.patches.applier import Entry, entries_of
from controllability.models.patches.record import PatchRecord
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.positions import pair_positions
from controllability.models.sweep.fallbacks import Plan, with_reader_of_last_layer
from controllability.models.sweep.layer_sweep import LayerSweep, Sweeper
from controllability.models.sweep.target_run import observe_target, silent


def solve_again(patch: PatchRecord, model: nn.Module, put: Callable[[Entry], None]) -> None:
    """Hand each layer's entries to ``put``, which writes them into ``model``, before the next layer is solved.

    A layer runs twice: solved, and with its new weights.  Raises ``SideConditionFailed`` where a layer's numbers
    changed too much.
    """
    inputs = patch.inputs
    checked = checked_reading(model, inputs["target"], patch.report.place)
    jointly = patch.scope == "all"
    reading, proofs = checked.reading, checked.proofs(patch.report.via, patch.report.route, jointly)
    both, how = (inputs["target"], inputs["source"]), (inputs["positions"], checked.codebooks, checked.length)
    source_rows, target_rows = pair_positions(*both, patch.scope, *how)
    joint = patch.joint
    if joint is not None and jointly:
        joint = with_reader_of_last_layer(joint, model, checked, inputs["target"])
    with LayerHooks(model, reading) as hooks:
        targets, _ = observe_target(hooks, without_cache(model, inputs["target"]), target_rows, silent)
    derivations = {layer.index: layer.derivation for layer in patch.report.layers}
    plan = Plan(proofs, patch.scope, joint, [derivations.get(i, 0) for i in range(len(proofs))], metrics=patch.metrics)
    with HookStack() as installation:
        for layer, calls in zip(reading.layers, targets, strict=True):
            if not calls or not plan.moves(layer.index):
                continue  # this input does not reach it, or it is not patched
            solver = plan.solver(layer, 0, calls[0], source_rows)
            sweeper, watched = Sweeper(layer, [solver], lambda _: None), HookStack()
            installation.finally_do(watched.undo)
            LayerHook(model, layer, sweeper, watched, sequence_first=reading.architecture.sequence_first)
            installation.again(model.get_submodule(layer.end), _written(watched, solver, put))
        model(**without_cache(model, inputs["source"]))


def _written(watched: HookStack, solver: LayerSweep, put: Callable[[Entry], None]) -> Callable[[], None]:
    """Writes what a layer's run has solved; in the run with the new weights nobody listens."""

    def write() -> None:
        watched.undo()
        for entry in entries_of([solver]):
            put(entry)

    return write
