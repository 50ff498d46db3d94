"""One context before many sequences: it is run once, and each of them goes on from its cache, or from a beginning of it.  (new)

Sequences are run in batches whose copies of the cache stay below ``ROOM`` bytes.
"""

import copy
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from controllability.arrays import relative_error
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.reading.heads import KEEP, Result, Runs
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.logits import result_of
from controllability.models.reading.model_facts import cache_bytes, forward_arguments, keeps_cache, text_config
from controllability.models.reading.positions import Positions
from controllability.models.reading.tolerances import CACHED
from controllability.models.sweep.one_pass import takes_past
from controllability.models.sweep.target_run import LayerTarget, Progress, observe_target
from controllability.models.transformers_parts import empty_cache, is_plain_cache

ROOM = 2**29


@dataclass(eq=False)
class SharedPast:
    """The cache of a run over ``length`` tokens, of one row, None for an empty one; ``bytes`` that a token takes in it."""

    cache: Any
    length: int
    bytes: int
    ragged: bool | None = None  # whether rows of different lengths may go on side by side; None: not tried yet

    @staticmethod
    @torch.no_grad()
    def of(model: nn.Module, tokens: Sequence[int], then: Sequence[int]) -> "SharedPast | None":
        """None where the model keeps no plain cache, or does not give what a run over everything gives: tried on ``then``."""
        size = cache_bytes(model) if takes_past(model) else None
        if size is None:
            return None
        count, device = len(then), next(model.parameters()).device
        ids = torch.tensor([[*tokens, *then]], device=device)
        cache = model(input_ids=ids[:, : len(tokens)], use_cache=True, **few(model, 1)).past_key_values
        if not is_plain_cache(cache):
            return None
        found = SharedPast(cache, len(tokens), size)
        wanted = result_of(model(**without_cache(model, {"input_ids": ids}), **few(model, count)))[:, -count:]
        own = result_of(model(**found.inputs(ids[:, -count:].expand(2, -1), torch.ones(2, count, device=device))))
        if relative_error(own, wanted.expand_as(own)) > CACHED[wanted.dtype]:
            return None
        found.ragged = count > 1 and found._goes_on_behind_padding(model, then, wanted)
        return found

    def _goes_on_behind_padding(self, model: nn.Module, then: Sequence[int], wanted: Tensor) -> bool:
        """Whether a row that is padded goes on as it does alone: a window of attention may count the padding."""
        *before, last = then
        steps = self._steps(model, [before, [*before, last]])
        next(steps)
        own = steps.send(torch.tensor([last, last], device=wanted.device))[:1]
        return relative_error(own, wanted[:, -1]) <= CACHED[wanted.dtype]

    def batches(self, lengths: Sequence[int]) -> Iterator[range]:
        """The numbers of the sequences that are run together."""
        start = 0
        while start < len(lengths):
            stop = start + 1
            while stop < len(lengths) and self._room(lengths[start : stop + 1]) <= ROOM:
                stop += 1
            yield range(start, stop)
            start = stop

    def _room(self, lengths: Sequence[int]) -> int:
        return self.bytes * len(lengths) * (self.length + max(lengths))

    @torch.no_grad()
    def greedy(
        self, model: nn.Module, rows: Sequence[Sequence[int]], count: int, ends: Collection[int]
    ) -> list[tuple[int, ...]]:
        """Up to ``count`` likeliest tokens behind each row; each stops before a token of ``ends``.  Rows of other lengths: if ``ragged``."""
        steps, said = self._steps(model, rows), []
        logits = next(steps)
        while len(said) < count:
            said.append(logits.argmax(-1))
            if len(said) < count:
                logits = steps.send(said[-1])
        tokens = torch.stack(said, 1).tolist()
        stops = [next((i for i, token in enumerate(row) if token in ends), count) for row in tokens]
        return [tuple(row[:stop]) for row, stop in zip(tokens, stops, strict=True)]

    def _steps(self, model: nn.Module, rows: Sequence[Sequence[int]]) -> Generator[Tensor, Tensor]:
        """Logits (B, vocabulary) behind the rows, and then behind each token (B,) that is sent."""
        device = next(model.parameters()).device
        lengths, longest = torch.tensor([len(row) for row in rows], device=device), max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
        inputs = self.inputs(ids, torch.arange(longest, device=device) < lengths[:, None])
        ends = torch.unique(lengths - 1)
        some = {KEEP: ends} if KEEP in forward_arguments(model) else {}
        logits = result_of(output := model(**inputs, **some))
        last = torch.searchsorted(ends, lengths - 1) if logits.shape[1] == len(ends) else lengths - 1
        logits = logits[torch.arange(len(rows), device=device), last]
        while True:
            tokens = yield logits
            mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(len(ids), 1)], 1)
            places = {} if self.ragged is False else {"position_ids": (self.length + lengths)[:, None]}
            inputs |= {"input_ids": tokens[:, None], "attention_mask": mask, "past_key_values": output.past_key_values}
            output, lengths = model(**inputs, **places), lengths + 1
            logits = result_of(output)[:, -1]

    def inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """Of a run over ``ids`` (B, L), padded on the right as ``mask`` (B, L) says."""
        if self.cache is None:
            return {"input_ids": ids, "attention_mask": mask.long(), "use_cache": True}
        cache: Any = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:  # what it reads next is put behind these in a new tensor
            layer.keys, layer.values = (x.expand(len(ids), -1, -1, -1) for x in (layer.keys, layer.values))
        whole = torch.cat([mask.new_ones(len(ids), self.length), mask], 1).long()
        return {"input_ids": ids, "attention_mask": whole, "past_key_values": cache, "use_cache": True}

    def observed(
        self, hooks: LayerHooks, lean: Runs, target: Mapping[str, Any], rows: Positions, progress: Progress
    ) -> tuple[list[list[LayerTarget]], Result]:
        """What ``observe_target`` sees at the rows, and the model's result there, of ids (B, T) that begin with the context.

        A row inside the context is given the state behind it: it must be one that is not read.
        """
        ids = target["input_ids"][:, self.length :]
        mask = target.get("attention_mask", torch.ones_like(target["input_ids"]))[:, self.length :]

        def parts() -> Iterator[tuple[dict[str, Any], Positions]]:
            for batch in self.batches(mask.sum(1).tolist()):
                own = slice(batch.start, batch.stop)
                kept = (rows.sample >= batch.start) & (rows.sample < batch.stop)
                yield self.inputs(ids[own], mask[own]), Positions(
                    rows.sample[kept] - batch.start, (rows.position[kept] - self.length).clamp_min(0), (len(batch), ids.shape[1])
                )  # fmt: skip

        return observed_by_parts(hooks, lean, parts(), progress)


class Past(Protocol):
    """What a target run goes on from, in place of a run over everything."""

    def observed(
        self, hooks: LayerHooks, lean: Runs, target: Mapping[str, Any], rows: Positions, progress: Progress
    ) -> tuple[list[list[LayerTarget]], Result]:
        """What ``observe_target`` sees at the rows of the target, and the model's result there."""
        ...


def observed_by_parts(
    hooks: LayerHooks, lean: Runs, parts: Iterator[tuple[dict[str, Any], Positions]], progress: Progress
) -> tuple[list[list[LayerTarget]], Result]:
    """What runs on the inputs of each part show at its positions, put together in this order."""
    seen, results = [], []
    for inputs, here in parts:
        asked = lean.inputs({name: inputs[name] for name in ("input_ids", "attention_mask")})
        targets, output = observe_target(hooks, asked | inputs, here, progress)
        seen.append(targets)
        results.append(lean.of(output).at(here))
    return _joined(seen), replace(results[0], held=torch.cat([result.held for result in results]))


def seen_in_target(
    hooks: LayerHooks, lean: Runs, target: Mapping[str, Any], rows: tuple[Positions, Positions], progress: Progress,
    past: Past | None = None,
) -> tuple[list[list[LayerTarget]], Result]:  # fmt: skip
    """What ``observe_target`` sees at the first of ``rows``, and the result at the second.

    ``past`` is what the samples begin with, which is then not run for each of them; no row inside it may be read.
    """
    if past is not None:
        return past.observed(hooks, lean, target, rows[0], progress)
    targets, output = observe_target(hooks, lean.inputs(target), rows[0], progress)
    return targets, lean.of(output).at(rows[1])


def _joined(parts: Sequence[list[list[LayerTarget]]]) -> list[list[LayerTarget]]:
    """The rows of all parts, layer by layer and call by call."""
    return [[_one(calls) for calls in zip(*layers, strict=True)] for layers in zip(*parts, strict=True)]


def _one(calls: Sequence[LayerTarget]) -> LayerTarget:
    first = calls[0]
    return LayerTarget(
        first.layer,
        [torch.cat(states) if states[0] is not None else None for states in zip(*(c.states for c in calls), strict=True)],
        {path: torch.cat([c.outputs[path] for c in calls]) for path in first.outputs},
        {
            path: {name: torch.cat([c.bound[path][name] for c in calls]) for name in held}
            for path, held in first.bound.items()
        },
    )  # fmt: skip


def few(model: nn.Module, count: int) -> dict[str, int]:
    """Asks for the last ``count`` logits alone, where the model can be asked."""
    return {KEEP: count} if KEEP in forward_arguments(model) else {}


@dataclass(eq=False)
class CroppedPast:
    """The keys and values of every layer over a context, and ``lengths``: how much of it each sequence has before it.

    Crops stand at the end of the batch's cache, padded on the left: a window of attention then counts the tokens that it should.
    """

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
