"""Both runs in one pass: the contextual model's rows, and behind them the same tokens with another past, or none.

While a token is decoded most of the time goes into reading the weights.  The rows of the batch that are the contextual
model's see its cache; in the rows behind them the cache is masked (``widened``) or another one (``cached_pass``), so that they
are the source run, patched as the pass goes on: what a layer's patch needs of the target was computed a moment before.  (new)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from architectures.reading import Layer, Tap
from controllability.arrays import relative_error
from controllability.errors import SideConditionFailed
from controllability.interfaces import Path
from controllability.models.hooks.guards import refuse_bypassed
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.reading.positions import Positions
from controllability.models.reading.tolerances import SAME
from controllability.models.sweep.fallbacks import Plan
from controllability.models.sweep.layer_sweep import LayerSweep
from controllability.models.sweep.target_run import LayerTarget, Observer
from controllability.models.transformers_parts import CACHE, cache_of, is_plain_cache


class Both:
    """Listens to one layer; the first rows of the batch are the target's, the next as many the source's.

    A condition that fails ``stops`` the pass, or else only the solving: the cache is left whole then.
    """

    def __init__(self, layer: Layer, plan: Plan, rows: Positions, last: bool, stops: bool) -> None:
        self.layer, self.plan, self.rows, self.stops = layer, plan, rows, stops
        self.batch = rows.shape[0]
        self.observer = Observer(layer, rows, last, lambda _: None)
        self.solvers: list[LayerSweep] = []
        self.failed: SideConditionFailed | None = None

    def begins(self) -> None:
        self.observer.begins()
        self.solvers.append(self.plan.solver(self.layer, len(self.solvers), self.observer.calls[-1], self.rows))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[: self.batch], x[self.batch : 2 * self.batch]

    def entering(self, index: int, value: Tensor) -> None:
        target, source = self._split(value)
        self.observer.entering(index, target)
        self.solvers[-1].entering(index, source)

    def routed(self, path: Path, index: Tensor, shares: Tensor) -> None:
        (index, chosen), (shares, taken) = self._split(index), self._split(shares)
        self.observer.routed(path, index, shares)
        if self.failed is None:
            self.solvers[-1].run.target.bind(path, self.observer.calls[-1].bound[path])
            self._try(lambda: self.solvers[-1].routed(path, chosen, taken))

    def computed(self, tap: Tap, x: Tensor, y: Tensor) -> Tensor | None:
        (x_target, x_source), (y_target, y_source) = self._split(x), self._split(y)
        self.observer.computed(tap, x_target, y_target)
        if self.failed is not None:
            return None
        solver = self.solvers[-1]
        solver.run.target.observe_output(tap.outlet, self.observer.calls[-1].outputs[tap.outlet])
        changed = self._try(lambda: solver.computed(tap, x_source, y_source))
        return None if changed is None else torch.cat([y_target, changed, y[2 * self.batch :]])

    def leaving(self, value: Tensor) -> None:
        target, source = self._split(value)
        self.observer.leaving(target)
        self.solvers[-1].leaving(source)

    def _try(self, solve: Any) -> Any:
        try:
            return solve()
        except SideConditionFailed as failed:
            if self.stops:
                raise
            self.failed = failed
            return None


def possible(inputs: Mapping[str, Any], streams: int) -> bool:
    """Whether the cache can hold more rows and be masked for some of them.

    So it is where every layer's cache is a plain one of keys and values; a state that is handed on cannot be masked.
    Half precision is left to two passes: there the target's outputs are those of its modules, bit for bit.
    """
    cache, mask = cache_of(inputs), inputs.get("attention_mask")
    if streams > 1 or not is_plain_cache(cache):
        return False
    keys = [layer.keys for layer in cache.layers if layer.get_seq_length()]
    known = {"input_ids", "attention_mask", "position_ids", *CACHE}
    others = any(isinstance(v, Tensor | list | dict | tuple) for k, v in inputs.items() if k not in known)
    plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    return (
        bool(keys) and all(k.dtype in SAME for k in keys) and plain and inputs["input_ids"].shape[1] == 1 and not others
    )


def widened(inputs: Mapping[str, Any], input_ids: Tensor, groups: int) -> dict[str, Any]:
    """The inputs of one pass: every row ``groups`` times, and only the first of them sees the cache.

    The cache itself gets the rows that it lacks.
    """
    ids, cache = inputs["input_ids"], cache_of(inputs)
    batch, length = input_ids.shape
    rows = next(layer.keys.shape[0] for layer in cache.layers if layer.get_seq_length())
    if rows == batch:
        cache.reorder_cache(torch.arange(batch, device=ids.device).repeat(groups))
    mask = inputs.get("attention_mask")
    seen = ids.new_ones(batch, length) if mask is None else mask
    alone = torch.zeros_like(seen)
    alone[:, -1] = 1
    positions = inputs.get("position_ids")
    wide = {"input_ids": ids.repeat(groups, 1), "attention_mask": torch.cat([seen, *[alone] * (groups - 1)])}
    at = {} if positions is None else {"position_ids": positions.expand(batch, -1).repeat(groups, 1)}
    return {**inputs, **wide, "return_dict": True, **at}


def narrow(inputs: Mapping[str, Any], batch: int) -> None:
    """Take the rows that ``widened`` added out of the cache."""
    cache_of(inputs).reorder_cache(torch.arange(batch, device=inputs["input_ids"].device))


def in_one_pass(
    hooks: LayerHooks, plan: Plan, inputs: Mapping[str, Any], rows: Positions, stops: bool = False
) -> tuple[list[list[LayerTarget]], list[LayerSweep] | None, Any]:
    """(targets, solvers, output) of one pass over inputs that hold the target's rows, and behind them the source's.

    ``rows`` are the positions that are patched, the same in both.  Where a side condition fails solvers are None; or
    (``stops``) the pass ends with ``SideConditionFailed``, and its cache is not to be used again.
    """
    layers = hooks.reading.layers
    both = [Both(layer, plan, rows, layer is layers[-1], stops) for layer in layers]
    output = hooks.run(both, inputs)
    targets = [listener.observer.calls for listener in both]
    for target in (target for calls in targets for target in calls):
        refuse_bypassed(target.layer, target.layer.taps, target.outputs)
    if any(listener.failed for listener in both):
        return targets, None, output
    return targets, [solver for listener in both for solver in listener.solvers], output


def same(found: list[LayerSweep], apart: list[LayerSweep]) -> bool:
    """Whether two ways to do the source run met the same states in every layer: then neither saw the context."""
    for a, b in zip(found, apart, strict=True):
        for x, y in zip(a.states, b.states, strict=True):
            assert x is not None and y is not None
            if not relative_error(x, y) <= SAME[x.dtype]:
                return False
    return True
