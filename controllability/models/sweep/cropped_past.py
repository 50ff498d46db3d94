"""One run over a context, and its cache cropped: each sequence goes on from a beginning of the context of its own.  (new)

Crops stand at the end of the batch's cache, padded on the left: a window of attention then counts the tokens that it should.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from controllability.arrays import relative_error
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.reading.heads import Result, Runs
from controllability.models.reading.logits import result_of
from controllability.models.reading.model_facts import keeps_cache, text_config
from controllability.models.reading.positions import Positions
from controllability.models.reading.tolerances import CACHED
from controllability.models.sweep.cached_pass import takes_past
from controllability.models.sweep.shared_past import ROOM, few, observed_by_parts
from controllability.models.sweep.target_run import LayerTarget, Progress
from controllability.models.transformers_parts import empty_cache, is_plain_cache


@dataclass(eq=False)
class CroppedPast:
    """The keys and values of every layer over a context, and ``lengths``: how much of it each sequence has before it."""

    held: list[tuple[Tensor, Tensor]]  # (1, heads, length, width) each
    lengths: tuple[int, ...] = ()  # replaced for each batch

    @staticmethod
    @torch.no_grad()
    def of(
        model: nn.Module, tokens: Sequence[int], then: Sequence[int], crop: int = 0
    ) -> "tuple[CroppedPast | None, Tensor]":
        """The past, and the logits (2, len(then), vocabulary) of ``then`` behind all of it and behind its first ``crop`` tokens.

        One run over everything, and one over ``then`` behind both crops.  Without a past, and with the former logits alone, where the
        model keeps no plain cache or a crop of everything does not give what that run gave.
        """
        ids = torch.tensor([[*tokens, *then]], device=next(model.parameters()).device)
        plain = keeps_cache(model) and takes_past(model)
        plain = plain and is_plain_cache(empty_cache(text_config(model)))
        cache: Any = empty_cache() if plain else None
        asked = {"past_key_values": cache, "use_cache": True} if plain else {}
        logits = result_of(model(input_ids=ids, **asked, **few(model, len(then))))[:, -len(then) :]
        if not plain or not is_plain_cache(cache):
            return None, logits
        held = [(layer.keys[:, :, : len(tokens)], layer.values[:, :, : len(tokens)]) for layer in cache.layers]
        tried = CroppedPast(held, (len(tokens), crop))
        again = result_of(model(**tried.inputs(ids[:, len(tokens) :].expand(2, -1), range(2)), **few(model, len(then))))
        same = relative_error(again[:1, -len(then) :], logits) <= CACHED[logits.dtype]
        return (CroppedPast(held), torch.cat([logits, again[1:, -len(then) :]])) if same else (None, logits)

    def inputs(self, ids: Tensor, rows: range) -> dict[str, Any]:
        """Of a run over ``ids`` (len(rows), T), each behind its own crop."""
        lengths = torch.tensor([self.lengths[row] for row in rows], device=ids.device)
        longest = int(lengths.max()) + 1  # one of padding at least, so that every run shows whether it counts
        places = torch.arange(longest, device=ids.device) - (longest - lengths[:, None])
        cache = empty_cache()
        for number, pair in enumerate(self.held):
            # (B, heads, longest, width); what is padded is masked, whatever stands there
            keys, values = (held[0][:, places.clamp_min(0)].transpose(0, 1) for held in pair)
            cache.update(keys, values, number)
        steps = torch.arange(ids.shape[1], device=ids.device)
        mask = torch.cat([places >= 0, torch.ones_like(ids, dtype=torch.bool)], 1).long()
        return {
            "input_ids": ids, "attention_mask": mask, "position_ids": lengths[:, None] + steps, "past_key_values": cache,
            "use_cache": True,
        }  # fmt: skip

    def observed(
        self, hooks: LayerHooks, lean: Runs, target: Mapping[str, Any], rows: Positions, progress: Progress
    ) -> tuple[list[list[LayerTarget]], Result]:
        """What ``observe_target`` sees at the rows, and the model's result there, of ids (B, L) that begin with the crops."""
        count = int((rows.position - torch.tensor(self.lengths)[rows.sample]).max()) + 1
        places = torch.tensor(self.lengths)[:, None] + torch.arange(count)
        ids = target["input_ids"].gather(1, places.to(target["input_ids"].device))
        size = 2 * sum(pair[0][0, :, 0].numel() * pair[0].element_size() for pair in self.held)
        most = max(1, ROOM // (size * (max(self.lengths) + 1 + count)))

        def parts() -> Iterator[tuple[dict[str, Any], Positions]]:
            for start in range(0, len(ids), most):
                own = range(start, min(start + most, len(ids)))
                kept = (rows.sample >= own.start) & (rows.sample < own.stop)
                sample = rows.sample[kept]
                position = rows.position[kept] - torch.tensor(self.lengths)[sample]
                yield (
                    self.inputs(ids[own.start : own.stop], own),
                    Positions(sample - start, position, (len(own), count)),
                )

        return observed_by_parts(hooks, lean, parts(), progress)
