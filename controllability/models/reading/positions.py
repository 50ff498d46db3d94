"""Which position of the target run each position of the source run must reproduce."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from controllability.arrays.one_line import OneLine
from controllability.errors import BadInput, ReadingError


@dataclass(frozen=True, eq=False, repr=False)
class Positions(OneLine):
    """N positions of a (B, T, …) tensor, as index tensors (N,); row i of a patch belongs to pair i."""

    sample: Tensor
    position: Tensor
    shape: tuple[int, int]
    before: int = 0
    valid: Tensor | None = None  # (B, T), False where there is padding; None where there is none
    complete: bool = field(default=False, init=False)  # whether the rows are all positions in order

    def __post_init__(self) -> None:
        batch, length = self.shape
        every = torch.arange(batch * length)
        full = len(self.sample) == len(every) and bool((self.sample * length + self.position == every).all())
        object.__setattr__(self, "complete", full)

    def of(self, states: Tensor) -> Tensor:
        """(B, T, …) -> (N, …).  States with positions before the input's (prompts, class tokens) skip those."""
        if self.complete and states.shape[1] == self.shape[1]:
            return states.flatten(0, 1)
        return states[self._index(states)]

    def taken(self, states: Tensor) -> Tensor:
        """The same as a copy of its own."""
        return self.of(states).clone() if self.complete else self.of(states)

    def others(self, states: Tensor) -> Tensor:
        """(B, T, n) -> (N, T, n): for each pair its sample's states, with 0 at the pair's own position and at padding."""
        sample, position = self._index(states)
        found = states[sample]
        found[torch.arange(len(sample), device=states.device), position] = 0
        if self.valid is not None and states.shape[1] == self.shape[1]:
            found = found.where(self.valid.to(states.device)[sample][..., None], found.new_zeros(()))
        return found

    def put(self, states: Tensor, rows: Tensor) -> Tensor:
        """``states`` (B, T, …) with these rows (N, …) in their places; ``states`` itself is left alone."""
        if self.complete and states.shape[1] == self.shape[1]:
            return rows.reshape(states.shape)
        states = states.clone()
        states[self._index(states)] = rows
        return states

    def _index(self, states: Tensor) -> tuple[Tensor, Tensor]:
        if states.shape[0] != self.shape[0]:
            raise ReadingError(
                f"a layer works on {states.shape[0]} samples where the input has {self.shape[0]}: layers that are "
                "called sample by sample, or on rows of their own, cannot be paired"
            )
        before = states.shape[1] - self.shape[1]
        return self.sample.to(states.device), self.position.to(states.device) + before

    @property
    def grid(self) -> tuple[int, int]:
        """The (B, T) that states must have: the input's, and the positions that the model puts before it."""
        return self.shape[0], self.shape[1] + self.before

    def named(self) -> list[list[int]]:
        """(sample, position) of every pair, as plain numbers."""
        return torch.stack([self.sample, self.position], -1).tolist()

    def streamed(self, count: int) -> "Positions":
        """The rows of a model that keeps ``count`` states a position, one after the other on the sequence axis."""
        batch, length = self.shape
        shift = torch.arange(count)[:, None] * length
        position = (self.position[None] + shift).reshape(-1)
        return Positions(self.sample.repeat(count), position, (batch, length * count))

    def repeated(self, count: int) -> "Positions":
        """The rows of a tensor that has ``count`` rows a sample: one for each codebook."""
        sample = (self.sample[:, None] * count + torch.arange(count)).reshape(-1)
        position = self.position[:, None].expand(-1, count).reshape(-1)
        order = sample.argsort(stable=True)
        return Positions(sample[order], position[order], (self.shape[0] * count, self.shape[1]))

    def name(self, row: int) -> str:
        """'sample 0, position 3' for messages."""
        return f"sample {int(self.sample[row])}, position {int(self.position[row])}"


TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")


def main_input(inputs: Mapping[str, Any]) -> str | None:
    """The input whose positions are patched: the decoder's of an encoder-decoder, else the tokens; None for images."""
    return next((name for name in TOKENS if inputs.get(name) is not None), None)


def input_shape(inputs: Mapping[str, Any], role: str, length: int | None = None) -> tuple[int, int]:
    """(B, T) of a model's inputs; ``length`` is the T of a model that reads no tokens.

    Raises ``BadInput`` when there is nothing in them.
    """
    if not isinstance(inputs, Mapping):
        raise BadInput(f"{role}: give the model's keyword arguments as a mapping, got {type(inputs).__name__}")
    for kind in ("", "decoder_"):
        if inputs.get(f"{kind}input_ids") is not None and inputs.get(f"{kind}inputs_embeds") is not None:
            raise BadInput(f"{role}: give {kind}input_ids or {kind}inputs_embeds, not both")
    name = main_input(inputs)
    if name is None and isinstance(inputs.get("pixel_values"), Tensor):
        return int(inputs["pixel_values"].shape[0]), length or 1
    main = inputs.get(name) if name else None
    if not isinstance(main, Tensor):
        raise BadInput(f"{role}: give input_ids (B, T) or inputs_embeds (B, T, d) as a torch tensor")
    if str(name).endswith("input_ids") and (main.ndim != 2 or main.dtype not in (torch.int64, torch.int32)):
        raise BadInput(
            f"{role}: {name} must be integers of shape (B, T), got {main.dtype} of shape {tuple(main.shape)}"
        )
    if main.ndim < 2 or main.shape[0] == 0 or main.shape[1] == 0:
        raise BadInput(f"{role}: the input is empty (shape {tuple(main.shape)})")
    return int(main.shape[0]), int(main.shape[1])


def _valid(inputs: Mapping[str, Any], role: str, length: int | None) -> Tensor:
    shape = input_shape(inputs, role, length)
    name = main_input(inputs)
    kind = "decoder_attention_mask" if str(name).startswith("decoder_") else "attention_mask"
    mask = inputs.get(kind) if name else None
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        raise BadInput(f"{role}: {kind} must have the shape of the input, {shape}")
    valid = mask.to("cpu").bool()
    if not valid.any(1).all():
        raise BadInput(f"{role}: sample {int((~valid.any(1)).nonzero()[0])} has no token that is not padding")
    return valid


def pair_positions(
    target: Mapping[str, Any], source: Mapping[str, Any], scope: str, positions: tuple[Any, Any] | None = None,
    codebooks: int = 1, length: int | None = None,
) -> tuple[Positions, Positions]:  # fmt: skip
    """(source rows, target rows): by default the source corresponds to the last positions of the target.

    Padding is respected per sample.  ``positions=(source positions, target positions)``, each (n,) or
    (B, n), gives other pairs.  Scope "last" keeps the last pair of each sample.  Raises ``BadInput``
    when the batches differ or a query is longer than its target.
    """
    both = _valid(source, "source", length), _valid(target, "target", length)
    here, there = (x[:: max(1, codebooks)] for x in both)
    if main_input(target) is None:
        _refuse_other_images(target, source, positions)
    if here.shape[0] != there.shape[0]:
        raise BadInput(f"source has {here.shape[0]} samples, target {there.shape[0]}: they are paired one to one")
    if positions is not None:
        s, t = _given(positions, here.shape[0])
        for which, given, length in (("source", s, here.shape[1]), ("target", t, there.shape[1])):
            if bool((given < 0).any() or (given >= length).any()):
                raise BadInput(f"positions: {which} positions must lie in 0 … {length - 1}")
        sample = torch.arange(here.shape[0])[:, None].expand_as(s)
        if scope == "all":  # padding reproduces nothing
            kept = here.gather(1, s.long())
            sample, s, t = sample[kept], s[kept], t[kept]
    else:
        sample, s, t = _from_the_end(here, there)
    if scope == "last":
        last = torch.cat([sample[1:] != sample[:-1], torch.tensor([True])]) if sample.ndim == 1 else None
        sample, s, t = (x[last] if last is not None else x[:, -1] for x in (sample, s, t))
    sample, s, t = sample.reshape(-1), s.reshape(-1), t.reshape(-1)
    valid = None if bool(here.all()) else here
    rows = Positions(sample, s, (here.shape[0], here.shape[1]), valid=valid)
    return rows, Positions(sample, t, (there.shape[0], there.shape[1]))


def _refuse_other_images(target: Mapping[str, Any], source: Mapping[str, Any], positions: Any) -> None:
    if positions is None:
        raise BadInput(
            "the model reads no tokens: say which positions correspond, positions=(source, target), for example "
            "([0], [0]) for the class token"
        )
    shapes = [tuple(inputs["pixel_values"].shape[1:]) for inputs in (target, source)]
    if shapes[0] != shapes[1]:
        raise BadInput(f"target and source images have different shapes, {shapes[0]} and {shapes[1]}")


def _given(positions: tuple[Any, Any], batch: int) -> tuple[Tensor, Tensor]:
    """Positions as the caller gave them, (B, n) each.  Raises ``BadInput`` for anything that is not pairs."""
    try:
        s, t = (torch.as_tensor(p) for p in positions)
        if not (s.ndim and t.ndim):
            raise TypeError("a single number is no list of positions")
        s, t = s.expand(batch, -1), t.expand(batch, -1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"positions must be (source positions, target positions), each (n,) or (B, n): {error}"
        ) from None
    if s.shape != t.shape or s.shape[1] == 0 or {s.dtype, t.dtype} - {torch.int64, torch.int32}:
        raise BadInput(
            f"positions: {tuple(s.shape)} source positions ({s.dtype}) for {tuple(t.shape)} target positions "
            f"({t.dtype}); give as many integers of each, at least one"
        )
    if any(len(row.unique()) < len(row) for row in s):
        raise BadInput("positions: a source position is named twice; it can reproduce one target only")
    return s, t


def _from_the_end(here: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts_here, counts_there = here.sum(1), there.sum(1)
    longer = counts_here > counts_there
    if longer.any():
        b = int(longer.nonzero()[0])
        raise BadInput(
            f"sample {b}: the query has {int(counts_here[b])} tokens and its target only {int(counts_there[b])}; "
            "the target must be the context followed by the query"
        )
    sample, s = here.nonzero(as_tuple=True)
    # rank from the end: the last valid token of each sample has rank 0
    rank = (here.flip(1).cumsum(1).flip(1) - 1)[sample, s]
    position_of_rank = torch.zeros_like(there, dtype=torch.long)
    b, p = there.nonzero(as_tuple=True)
    position_of_rank[b, (there.flip(1).cumsum(1).flip(1) - 1)[b, p]] = p
    return sample, s, position_of_rank[sample, rank]
