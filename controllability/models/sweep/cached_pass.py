"""What runs over new tokens go on from: the caches of both runs, and one pass for both where the model allows it.

In one pass the contextual model's row of the batch has the context in its past; the source's row has a shorter past, filled up
on the left and masked.  What a layer's patch needs of the target has been computed a moment before.  (new)
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from controllability.arrays import relative_error
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.reading.model_facts import forward_arguments, position_limit, text_config
from controllability.models.reading.positions import Positions
from controllability.models.reading.tolerances import CACHED, SAME
from controllability.models.sweep.fallbacks import Plan
from controllability.models.sweep.layer_sweep import LayerSweep
from controllability.models.sweep.one_pass import in_one_pass
from controllability.models.sweep.target_run import LayerTarget
from controllability.models.transformers_parts import CACHE, is_plain_cache, is_usual_cache

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
