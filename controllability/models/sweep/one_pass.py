"""Both runs in one pass: the contextual model's rows, and behind them the same tokens with another past, or none.

While a token is decoded most of the time goes into reading the weights.  The rows of the batch that are the contextual
model's see its cache; in the rows behind them the cache is masked (``widened``) or another one (``BothPasts``), so that they
are the source run, patched as the pass goes on: what a layer's patch needs of the target was computed a moment before.  (new)
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from architectures.reading import Layer, Tap
from controllability.arrays import relative_error
from controllability.errors import SideConditionFailed
from controllability.interfaces import Path
from controllability.models.hooks.guards import refuse_bypassed
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.reading.model_facts import forward_arguments, position_limit, text_config
from controllability.models.reading.positions import Positions
from controllability.models.reading.tolerances import CACHED, SAME
from controllability.models.sweep.layer_sweep import LayerSweep
from controllability.models.sweep.source_run import Plan
from controllability.models.sweep.target_run import LayerTarget, Observer
from controllability.models.transformers_parts import CACHE, cache_of, is_plain_cache, is_usual_cache


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


LOCAL = {"full_attention", "sliding_attention"}  # kinds of attention that count from the token, not from the start


def takes_past(model: nn.Module) -> bool:
    """Whether the model's forward names a mask, positions and a cache among its arguments."""
    arguments = set(forward_arguments(model))
    return arguments >= {"attention_mask", "position_ids"} and not arguments.isdisjoint(CACHE)


def pasts_of(
    model: nn.Module, there: Any, here: Any, ids: tuple[Tensor, Tensor]
) -> "BothPasts | tuple[Any, Any] | None":
    """What the outputs of the target's and the source's run over ``ids`` leave to go on from: side by side if that can be.

    None where either keeps no plain cache.
    """
    caches = getattr(there, "past_key_values", None), getattr(here, "past_key_values", None)
    if not all(map(is_usual_cache, caches)):
        return None
    device = next(model.parameters()).device
    token = ids[1][-1:].to(device)
    limit = position_limit(text_config(model))
    if (limit is not None and len(ids[0]) >= limit) or not _as_without(model, caches[0], ids[0].to(device), token):
        return None
    return BothPasts.of(model, *caches, (len(ids[0]), len(ids[1])), token) or caches


def _as_without(model: nn.Module, cache: Any, ids: Tensor, token: Tensor) -> bool:
    """Whether a run that goes on from the cache gives what a run over everything gives: tried on one ``token`` (1,)."""
    found = model(input_ids=token[None], past_key_values=copy.deepcopy(cache), use_cache=True).logits[:, -1]
    wanted = model(input_ids=torch.cat([ids, token])[None], use_cache=False).logits[:, -1]
    return relative_error(found, wanted) <= CACHED[wanted.dtype]


@dataclass(eq=False)
class BothPasts:
    """The pasts of both runs in one cache: row 0 is the target's, row 1 the source's; ``mask`` (2, L) shows what is filled up."""

    cache: Any
    mask: Tensor
    lengths: tuple[int, int]

    @staticmethod
    def of(model: nn.Module, there: Any, here: Any, lengths: tuple[int, int], token: Tensor) -> "BothPasts | None":
        """From the caches of the target's and the source's run, which have these lengths.

        None where the model does not compute the same this way: that is tried, on one ``token`` (1,).
        """
        cache = _side_by_side(model, there, here)
        if cache is None or lengths[0] < lengths[1]:
            return None
        mask = torch.ones(2, lengths[0], dtype=torch.long, device=cache.layers[0].keys.device)
        mask[1, : lengths[0] - lengths[1]] = 0
        found = BothPasts(cache, mask, lengths)
        return found if found._same_as_apart(model, there, here, token) else None

    def _same_as_apart(self, model: nn.Module, there: Any, here: Any, token: Tensor) -> bool:
        probe = BothPasts(copy.deepcopy(self.cache), self.mask, self.lengths)
        joint = model(**probe.inputs(token)).logits
        pasts = map(copy.deepcopy, (there, here))
        apart = [model(input_ids=token[None], past_key_values=past, use_cache=True).logits for past in pasts]
        wanted = torch.cat(apart)
        return relative_error(joint, wanted) <= SAME[wanted.dtype]

    def inputs(self, ids: Tensor) -> dict[str, Any]:
        """Of a pass over the tokens ``ids`` (n,), which follow both pasts."""
        steps = torch.arange(len(ids), device=ids.device)
        return {
            "input_ids": ids.expand(2, -1), "position_ids": torch.stack([steps + length for length in self.lengths]),
            "attention_mask": torch.cat([self.mask, self.mask.new_ones(2, len(ids))], 1),
            "past_key_values": self.cache, "use_cache": True,
        }  # fmt: skip

    def after(self, count: int) -> "BothPasts":
        """The pasts when ``count`` tokens have been run over: the cache has grown by itself."""
        there, here = self.lengths
        mask = torch.cat([self.mask, self.mask.new_ones(2, count)], 1)
        return BothPasts(self.cache, mask, (there + count, here + count))


def _side_by_side(model: nn.Module, there: Any, here: Any) -> Any:
    """One cache with a row for each; None where a model keeps something else, or places tokens by themselves."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    if not takes_past(model) or not set(getattr(text, "layer_types", None) or ()) <= LOCAL:
        return None
    if not is_plain_cache(there):
        return None
    for a, b in zip(there.layers, here.layers, strict=True):
        if type(b) is not type(a) or not (a.is_initialized and b.is_initialized):
            return None
        if a.keys.dtype not in SAME or b.keys.shape[-2] > a.keys.shape[-2]:
            return None  # half precision: there the source's states are to be those of its own run, bit for bit
    whole = copy.deepcopy(there)
    for layer, other in zip(whole.layers, here.layers, strict=True):
        missing = layer.keys.shape[-2] - other.keys.shape[-2]
        for name in ("keys", "values"):
            filled = nn.functional.pad(getattr(other, name), (0, 0, missing, 0))
            setattr(layer, name, torch.cat([getattr(layer, name), filled]))
    return whole


def solved_in_one_pass(
    hooks: LayerHooks, plan: Plan, pasts: BothPasts, ids: Tensor
) -> tuple[list[list[LayerTarget]], list[LayerSweep]]:
    """(targets, solvers) of one pass of both runs over the new tokens ``ids`` (n,).

    Raises ``SideConditionFailed`` on the way; the cache is then not to be used again.
    """
    count = len(ids)
    rows = Positions(torch.zeros(count, dtype=torch.long), torch.arange(count), (1, count))
    targets, solvers, _ = in_one_pass(hooks, plan, pasts.inputs(ids), rows, stops=True)
    assert solvers is not None
    return targets, solvers
