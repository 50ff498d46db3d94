"""The patch of each of many partial contexts, at one token, and what the model says with each of them.  (theory 10)

A state is a pair (before, kept) of chunks: its patch stands, in a source that has ``before``, for a context of ``kept``.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from controllability.deltas import Delta, LowRank
from controllability.errors import BadInput
from controllability.instrument.chunks import Reading
from controllability.interfaces import Param
from controllability.models.patches.record import PatchRecord
from controllability.models.patches.solve import parse_joint_options, solve
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.heads import Result, Runs, by_blocks, without_logits
from controllability.models.reading.positions import Positions
from controllability.models.sweep.shared_past import CroppedPast
from controllability.models.sweep.target_run import Progress, silent

Kept = tuple[int, ...]
State = tuple[Kept, Kept]
Item = TypeVar("Item")
ROWS = 4096  # tokens that are run at a time
NO_CROP = "the model's cache cannot be cropped: each partial context was run over by itself, {:.1f} times the tokens of a plain run"


@dataclass(frozen=True)
class Options:
    """How patches are solved (see ``patch_model``), and at which token of the query."""

    via: str = "input-output"
    route: str = "secular"
    place: str | None = None
    token: int = -1
    progress: Progress = silent


@dataclass(eq=False)
class Solved:
    """``deltas`` by parameter, a row a state; ``layers`` and ``params`` of each; the answer's log-probability behind each context; ``tokens`` that were run."""

    states: list[State]
    deltas: dict[str, Delta]
    layers: dict[str, int]
    params: dict[str, Param]
    logprobs: dict[Kept, float]
    reading: Reading
    notes: list[str]
    tokens: int

    def rows(self, states: Sequence[State], parameter: str) -> Delta:
        """The deltas of these states, in float64; that of a state that changes nothing is 0."""
        index = [self.states.index(state) if state[0] != state[1] else -1 for state in states]
        picked = self.deltas[parameter].mapped(
            lambda held: held[index].double() if held.is_floating_point() else held[index]
        )
        name = "left" if isinstance(picked, LowRank) else "value"
        held = getattr(picked, name)
        held[[row for row, place in enumerate(index) if place < 0]] = 0
        return picked


def solve_states(model: nn.Module, reading: Reading, states: Iterable[State], options: Options) -> Solved:
    """Solve every state once, many in a run: over one cropped cache where each stands for a beginning of the context, without any before it."""
    states = [*dict.fromkeys(state for state in states if state[0] != state[1])]
    if options.token not in range(-reading.asked, reading.asked) or isinstance(options.token, bool):
        raise BadInput(f"token: the query has tokens 0 to {reading.asked - 1}, got {options.token!r}")
    past, logits = CroppedPast.of(model, reading.ids, reading.then, reading.lead)
    every = tuple(range(len(reading.chunks)))
    if not reading.answer:
        reading = replace(reading, answer=(int(logits[0, reading.asked - 1].argmax()),))
    forward = all(not before and kept == every[: len(kept)] for before, kept in states)
    solved = Solved(states, {}, {}, {}, {}, reading, [], len(reading.ids) + len(reading.then))
    said = _logprobs(_behind_query(Result.of(logits), reading), reading)
    solved.logprobs |= zip((every, ()), said, strict=False)
    crop, parts, done = past if forward else None, list[dict[str, Delta]](), 0
    length = lambda state: len(reading.then) + (0 if crop else max(len(reading.context(kept)) for kept in state))  # noqa: E731
    for batch in _batches(states, length):
        options.progress("partial contexts", done, len(states))
        found = _solved(model, reading, batch, crop, options)
        done += len(batch)
        assert found.target_output is not None
        solved.logprobs |= zip(
            (kept for _, kept in batch), _logprobs(_behind_query(found.target_output, reading), reading), strict=True
        )
        parts.append(_at_token(found, len(batch), reading, options.token % reading.asked, solved))
        solved.tokens += sum(
            2 * len(reading.then) + (0 if crop else len(reading.context(b) + reading.context(k))) for b, k in batch
        )
    options.progress("partial contexts", done, len(states))
    if forward and past is None:
        solved.notes.append(NO_CROP.format(solved.tokens / (len(reading.ids) + len(reading.then))))
    solved.deltas = {name: _joined([part[name] for part in parts]) for name in parts[0]}
    return solved


def _solved(
    model: nn.Module, reading: Reading, batch: list[State], crop: CroppedPast | None, options: Options
) -> PatchRecord:
    sides = [[reading.context(state[side]) for state in batch] for side in (0, 1)]
    past = None if crop is None else replace(crop, lengths=tuple(map(len, sides[1])))
    device = next(model.parameters()).device
    source, target = (padded([[*row, *reading.then] for row in side], device) for side in sides)
    steps = torch.arange(len(reading.then))
    positions = tuple(torch.tensor([len(row) for row in side])[:, None] + steps for side in sides)
    joint = parse_joint_options("each", 0.0, None, False)
    return solve(
        model, target, source, "each", options.via, options.route, (positions[0], positions[1]), silent, joint, past=past, judged=len(reading.answer), place=options.place
    )  # fmt: skip


def _at_token(found: PatchRecord, count: int, reading: Reading, token: int, solved: Solved) -> dict[str, Delta]:
    """The deltas at one token of the query by parameter, a row a state."""
    if len(found.rows.sample) != count * len(reading.then):
        raise BadInput("this model keeps several states a position: what one token's patch is cannot be said")
    taken: dict[str, Delta] = {}
    for entry in found.entries:
        name = str(entry.param) + (f"@{entry.call}" if entry.call else "")
        solved.layers[name], solved.params[name] = entry.layer, entry.param
        grid = count, len(reading.then)
        taken[name] = entry.delta.mapped(
            lambda held, grid=grid: held.reshape(*grid, *held.shape[1:])[:, token].cpu().clone()
        )
    return taken


def _joined(parts: list[Delta]) -> Delta:
    names = [name for name, held in vars(parts[0]).items() if isinstance(held, Tensor)]
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def context_logprobs(
    model: nn.Module, reading: Reading, contexts: Sequence[Kept], place: str | None, progress: Progress
) -> list[float]:
    """The answer's log-probability behind each context of some of the chunks, run over by itself."""
    found, device = list[float](), next(model.parameters()).device
    for batch in _batches(contexts, lambda kept: len(reading.context(kept)) + len(reading.then)):
        progress("contexts by themselves", len(found), len(contexts))
        rows = [[*reading.context(kept), *reading.then] for kept in batch]
        inputs = padded(rows, device)
        last = torch.arange(-len(reading.answer), 0)
        position = torch.cat([len(row) + last for row in rows])
        sample = torch.arange(len(rows)).repeat_interleave(len(last))
        tried = checked_reading(model, inputs, place).tried
        with Runs(model, without_logits(model, [inputs], tried)) as run:
            result = run(inputs).at(Positions(sample, position, (len(rows), inputs["input_ids"].shape[1])))
        found += _logprobs(replace(result, held=result.held.reshape(len(rows), len(last), -1)), reading)
    progress("contexts by themselves", len(found), len(contexts))
    return found


def _behind_query(result: Result, reading: Reading) -> Result:
    return replace(result, held=result.held[:, reading.asked - 1 :])


def _logprobs(result: Result, reading: Reading) -> list[float]:
    """Of the answer, a row of ``result`` (B, tokens of the answer, ·): log p, summed over its tokens."""
    wanted = torch.tensor(reading.answer * len(result.held), device=result.held.device)

    def each(start: int, logits: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return logits.gather(1, wanted[start : start + len(logits), None])[:, 0]

    return torch.cat(by_blocks(each, result)).reshape(len(result.held), -1).double().sum(-1).tolist()


def padded(rows: list[list[int]], device: Any) -> dict[str, Tensor]:
    """Token ids (B, L), padded on the right where no earlier token looks, with a mask where they are of different lengths."""
    longest = max(map(len, rows))
    inputs = {"input_ids": torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)}
    if min(map(len, rows)) < longest:
        inputs["attention_mask"] = torch.tensor(
            [[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device
        )
    return inputs


def _batches(items: Sequence[Item], length: Any) -> Iterator[list[Item]]:
    """The items in order, so many that they have at most ``ROWS`` tokens with padding, one at least."""
    batch, longest = list[Item](), 0
    for item in items:
        longest = max(longest, length(item))
        if batch and longest * (len(batch) + 1) > ROWS:
            yield batch
            batch, longest = [], length(item)
        batch.append(item)
    if batch:
        yield batch
