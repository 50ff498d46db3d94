"""The target run, observed: what every layer did at the paired positions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from architectures.reading import Layer, Tap
from controllability.arrays.sharded import gathered
from controllability.components.mixture import CHOSEN, SHARES
from controllability.errors import Overflow, PatchError
from controllability.execution.trace import Trace
from controllability.interfaces import Path
from controllability.models.hooks.guards import refuse_bypassed
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.reading.positions import Positions

Progress = Callable[[str, int, int], None]
NUMBERS = 2**18  # of one board of a shelf
STEP = 16  # tensors begin at multiples of so many numbers


def silent(stage: str, done: int, total: int) -> None:
    """No progress is shown."""


@dataclass(eq=False)
class LayerTarget:
    """What one layer did in one call of the target run, at the paired positions: (N, ·) each."""

    layer: Layer
    states: list[Tensor | None]
    outputs: dict[Path, Tensor] = field(default_factory=dict)
    bound: dict[Path, dict[str, Tensor]] = field(default_factory=dict)

    def trace(self) -> Trace:
        """The observed values as a trace of the block."""
        trace = Trace(self.layer.block, self.layer.params, as_state(self.states), self.outputs)
        for path, values in self.bound.items():
            trace.bind(path, values)
        return trace


def as_state(states: list[Tensor | None]) -> Any:
    """The block's input: the state, or the (still filling) list of a parallel block's inputs."""
    return states[0] if len(states) == 1 else states


PATCHED_OVERFLOW = "the model, or a scale that the route asks for, leaves the range of float16 (up to 65504): take float32 or bfloat16, or route 'balanced'"


def check_finite(states: Tensor, run: str, layer: Layer, where: str) -> None:
    """Raise ``Overflow`` for a state with NaN or infinity at any position."""
    if bool(torch.isfinite(gathered(states.sum(dtype=torch.promote_types(states.dtype, torch.float32))))):
        return  # one number says so for all of them, but for sums that overflow by themselves
    finite = torch.isfinite(gathered(states))
    if not bool(finite.all()):
        bad = (~finite).nonzero()[0].tolist()
        patched = run == "source" and states.dtype == torch.float16  # and the target run was finite
        why = PATCHED_OVERFLOW if patched else "the model overflows on this input (try another dtype)"
        raise Overflow(
            f"{run} run: the state {where} layer {layer.index} is not finite at sample {bad[0]}, position {bad[1]}; {why}; nothing was changed"
        )


class Shelf:
    """Keeps small tensors, side by side in a few large ones.

    Each by itself would be cut from the space that a layer's activations left free, and the next layer's would no longer
    fit there: a model that is run on a long context would then take many times the memory of a layer.
    """

    def __init__(self) -> None:
        self._boards: dict[tuple[torch.device, torch.dtype], tuple[Tensor, int]] = {}

    def keep(self, x: Tensor) -> Tensor:
        """A copy of ``x``, or ``x`` itself if it is large."""
        count = x.numel()
        if 4 * count > NUMBERS:
            return x
        board, used = self._boards.get((x.device, x.dtype), (None, 0))
        if board is None or used + count > len(board):
            board, used = x.new_empty(NUMBERS), 0
        self._boards[x.device, x.dtype] = board, used + count + -count % STEP
        return board[used : used + count].view(x.shape).copy_(x)


class Observer:
    """Listens to one layer in the target run; one ``LayerTarget`` a call."""

    def __init__(
        self, layer: Layer, rows: Positions, last: bool, finished: Callable[[Layer], None], shelf: Shelf | None = None
    ) -> None:
        self.layer, self.rows, self.last, self.finished = layer, rows, last, finished
        self.shelf = None if rows.complete else shelf
        self.calls: list[LayerTarget] = []

    def begins(self) -> None:
        self.calls.append(LayerTarget(self.layer, [None] * len(self.layer.inputs)))

    def entering(self, index: int, value: Tensor) -> None:
        check_finite(value, "target", self.layer, "entering the feed-forward half of")
        self.calls[-1].states[index] = self._taken(value)

    def routed(self, path: Path, index: Tensor, shares: Tensor) -> None:
        self.calls[-1].bound[path] = {CHOSEN: self.rows.of(index), SHARES: self.rows.of(shares)}

    def computed(self, tap: Tap, x: Tensor, y: Tensor) -> None:
        self.calls[-1].outputs[tap.outlet] = self._taken(y)

    def _taken(self, value: Tensor) -> Tensor:
        """The paired rows, which are to stay."""
        if self.shelf is None or type(value) is not Tensor:  # a slice of a whole
            return self.rows.taken(value)
        return self.shelf.keep(self.rows.of(value))

    def leaving(self, value: Tensor) -> None:
        if self.last:  # what leaves another layer is seen entering the next one
            check_finite(value, "target", self.layer, "leaving")
        self.calls[-1].outputs[()] = self._taken(value)
        self.finished(self.layer)


def observe_target(
    hooks: LayerHooks, inputs: Mapping[str, Any], rows: Positions, progress: Progress
) -> tuple[list[list[LayerTarget]], Any]:
    """Run the model on the target's inputs; keep what the layers' taps compute at the paired rows.

    One list a layer, with one entry a call.  A layer that this input does not reach has none.
    """
    layers = hooks.reading.layers
    finished = lambda layer: progress("target run", layer.index + 1, len(layers))  # noqa: E731
    shelf = Shelf()
    observers = [Observer(layer, rows, layer is layers[-1], finished, shelf) for layer in layers]
    output = hooks.run(observers, inputs)
    if not any(o.calls for o in observers):
        raise PatchError("no layer's hooks ran in the target run; is the model compiled or replaced?")
    for observer in observers:
        for target in observer.calls:
            if any(s is None for s in target.states) or () not in target.outputs:
                raise PatchError(
                    f"layer {observer.layer.index}: its hooks did not run in the target run; is the model compiled?"
                )
            refuse_bypassed(observer.layer, observer.layer.taps, target.outputs)
    return [o.calls for o in observers], output
