"""A patch while it is applied: the factored effect of each delta beside the model's own computation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from architectures import quantised
from architectures.reading import Layer, Tap
from controllability.arrays.one_line import OneLine
from controllability.deltas import Delta, Shift
from controllability.errors import PatchError
from controllability.interfaces import Param, Path as NodePath
from controllability.models.hooks.guards import refuse_bypassed
from controllability.models.hooks.layer_hooks import LayerListener
from controllability.models.reading.positions import Positions
from controllability.models.sweep.effects import Effect, Move, parameters_at, per_sample, ready, update_of
from controllability.models.sweep.layer_sweep import LayerSweep


@dataclass(frozen=True, repr=False)
class Entry(OneLine):
    """One patched parameter: the module that holds it, and its delta with one row a pair.

    ``layer`` counts the layers with a feed-forward half, ``call`` the calls of a layer that runs several times.
    ``reads`` (in,) is the input that a matrix was solved for, where there is but one; a loaded patch does not know it.
    """

    param: Param
    delta: Delta
    layer: int = 0
    call: int = 0
    reads: Tensor | None = None

    @property
    def module(self) -> str:
        """Name of the module that holds the parameter."""
        return self.param.name.rpartition(".")[0]

    def refuse_other_shape(self, model: nn.Module) -> None:
        """Raise ``PatchError`` where the model has no such parameter, or one of another size."""
        stored = dict(model.named_parameters(remove_duplicate=False)).get(self.param.name)
        if quantised.kind(stored):
            return
        factors = [self.delta.value] if isinstance(self.delta, Shift) else [self.delta.left, self.delta.right]
        size = math.prod(factor.shape[-1] for factor in factors) * (getattr(self.delta, "experts", 0) or 1)
        if stored is None or stored[self.param.index].numel() != size:
            raise PatchError(f"this patch does not fit: the model has no parameter {self.param} of {size} numbers")


def entries_of(solvers: Iterable[LayerSweep]) -> tuple[Entry, ...]:
    """What was solved, in tensors of its own."""
    entries: list[Entry] = []
    for solver in solvers:
        solver.own_deltas()
        at = solver.layer.index, solver.call
        entries += [Entry(param, delta, *at, reads) for param, delta, reads in solver.solved()]
    return tuple(entries)


class Applier(LayerListener):
    """Listens to one layer while a patch is applied, and adds the effect of its entries."""

    def __init__(self, layer: Layer, entries: list[Entry], rows: Positions | None, samples: int) -> None:
        self.layer, self.rows, self.samples = layer, rows, samples
        self.calls = 1 + max(entry.call for entry in entries)
        self.call = -1
        self.chosen: dict[NodePath, Tensor] = {}
        self.whole = rows is not None and rows.complete and not rows.before  # deltas lie on the grid of the states
        self.moves: dict[Tap, list[list[Move]]] = {}
        self.effects: dict[tuple[int, int, torch.device], Effect] = {}
        for entry in entries:
            tap = next((t for t in layer.taps if entry.param in parameters_at(layer, t)), None)
            if tap is None:
                raise PatchError(f"this patch is for a parameter {entry.param} that the model does not have")
            calls = self.moves.setdefault(tap, [[] for _ in range(self.calls)])
            delta = entry.delta  # one row a position, or one for each sample
            if rows is None:
                delta = per_sample(delta)
            elif self.whole:
                delta = delta.mapped(lambda held: held.reshape(*rows.shape, *held.shape[1:]))
            calls[entry.call].append((update_of(layer, tap, entry.param), delta))
        self.taps = tuple(self.moves)
        self.told: set[NodePath] = set()

    def begins(self) -> None:
        self.call = (self.call + 1) % self.calls
        self.told.clear()

    def ended(self) -> None:
        """The layer's call is over.  Raises ``PatchError`` where a patched module did not run in it."""
        refuse_bypassed(self.layer, [tap for tap in self.taps if self.moves[tap][self.call]], self.told)

    def routed(self, path: NodePath, index: Tensor, shares: Tensor) -> None:
        self.chosen[path] = index

    def computed(self, tap: Tap, x: Tensor, y: Tensor) -> Tensor:
        if self.rows is not None and tuple(y.shape[:2]) != self.rows.grid:
            raise PatchError(
                f"this patch of scope 'each' is for inputs of shape {self.rows.shape} (B, T), the model got "
                f"{tuple(y.shape[:2])}: every position has its own patch; use scope 'last' for other inputs"
            )
        if self.samples > 1 and y.shape[0] != self.samples:
            raise PatchError(
                f"this patch of scope 'last' has one patch for each of {self.samples} samples, the model got {y.shape[0]}"
            )
        self.told.add(tap.outlet)
        if torch.is_autocast_enabled(y.device.type):  # what is added is computed as it was solved
            with torch.autocast(y.device.type, enabled=False):
                return self._changed(tap, x, y)
        return self._changed(tap, x, y)

    def _changed(self, tap: Tap, x: Tensor, y: Tensor) -> Tensor:
        effect = self._effect(tap, y)
        chosen = self.chosen.get(tap.mixture) if tap.mixture is not None else None
        if self.rows is None or self.whole:
            changed = effect(x, y, chosen)
            return changed if changed.dtype == y.dtype else changed.to(y.dtype)
        index = self.rows.of(chosen) if chosen is not None else None
        return self.rows.put(y, effect(self.rows.of(x), self.rows.of(y), index).to(y.dtype))

    def _effect(self, tap: Tap, like: Tensor) -> Effect:
        """What this call adds at a tap, made ready on the device where it is computed."""
        key = (id(tap), self.call, like.device)
        if key not in self.effects:
            here = self.moves[tap][self.call]
            moves = [(update, delta.mapped(lambda held: held.to(like.device))) for update, delta in here]
            with torch.inference_mode(False):  # it serves runs with gradients too
                self.effects[key] = ready(self.layer, tap, moves)
        return self.effects[key]
