"""A model's logits at the positions that are asked for: made of its last hidden states by its own forward.  (new)

A run keeps its last hidden states and computes no logits.  Who wants some has the model's forward run with these states in place
of what its base model gives: whatever the forward does behind it (head, soft-cap, scaling) is done by the model itself.
"""

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from controllability.arrays import relative_error
from controllability.arrays.one_line import OneLine
from controllability.errors import PatchError
from controllability.models.exact_mode import exact_mode, in_exact_mode
from controllability.models.hooks.carried_patches import carried
from controllability.models.hooks.installation import HookStack
from controllability.models.hooks.own_modes import own_modes
from controllability.models.reading.fingerprints import place, settings_of
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.logits import LogitComparison, compare_logits, joined, result_of
from controllability.models.reading.model_facts import forward_arguments, input_embedding
from controllability.models.reading.positions import Positions, main_input
from controllability.models.reading.random_inputs import random_inputs
from controllability.models.reading.tolerances import VERIFIED

FEW = 2**21  # so many logits are kept as they are
ENTRIES = 7 * 2**20  # computed at a time: in float32 less than the 32 MB from which on malloc reuses nothing
KEEP = "logits_to_keep"
PLAIN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "use_cache"}


class Head:
    """What a model does behind its base model, for last hidden states that were kept."""

    def __init__(self, model: nn.Module, base: nn.Module, kind: type, width: int) -> None:
        self._model, self._base, self.kind, self.width = weakref.ref(model), weakref.ref(base), kind, width
        self._seen, self._exact = _behind(model, base), in_exact_mode()

    def __call__(self, states: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, n).  Raises ``PatchError`` when the model is gone, or its head is another now."""
        model, base = self._model(), self._base()
        if model is None or base is None:
            raise PatchError("the model that would compute these logits is gone: keep it, or take them before")
        if _behind(model, base) != self._seen:
            raise PatchError("the head of the model changed since this run: these logits cannot be computed any more")
        exact = exact_mode() if self._exact else contextlib.nullcontext()
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        with own_modes(model), exact, HookStack() as installation:
            stand_in = lambda *_, **__: self.kind(last_hidden_state=states)  # noqa: E731
            vars(stand_in)["ours"] = True
            installation.assign(base, "forward", stand_in)
            return result_of(model.forward(**without_cache(model, {"input_ids": ids, KEEP: 0})))  # past its hooks


def _behind(model: nn.Module, base: nn.Module) -> list[Any]:
    """Settings of what is not the base model's alone, and storage, version and dtype of its tensors."""
    inside = set(base.modules())
    rest = [module for module in model.modules() if module not in inside]
    held = [value for m in rest for value in (*m._parameters.values(), *m._buffers.values()) if value is not None]
    tensors = [(*place(value), value.dtype) for value in held]
    return [settings_of((str(number), module) for number, module in enumerate(rest)), *tensors]


@dataclass(frozen=True, eq=False, repr=False)
class Result(OneLine):
    """What a run gave: logits (B, T, n), one row a pair (N, n), or one a sample; or the states that ``head`` makes them of."""

    held: Tensor
    dtype: torch.dtype
    head: Head | None = None

    @staticmethod
    def of(logits: Tensor) -> "Result":
        """Logits as they are."""
        return Result(logits, logits.dtype)

    def logits(self) -> Tensor:
        """All of them at once, in a tensor of the caller's own."""
        if self.head is None:
            return self.held.clone()
        return self.head(self.held) if self.held.ndim == 3 else self.head(self.held[None])[0]

    def at(self, rows: Positions) -> "Result":
        """The paired positions, (N, ·); all there is, where the run kept fewer positions or has one output a sample."""
        if self.held.ndim != 3 or self.held.shape[1] != rows.shape[1]:
            return self
        return replace(self, held=rows.of(self.held))

    def kept(self) -> "Result":
        """The same in tensors of its own."""
        return replace(self, held=self.held.clone())

    @property
    def width(self) -> int:
        """How many logits a row has."""
        return self.held.shape[-1] if self.head is None else self.head.width


T = TypeVar("T")


def by_blocks(use: Callable[..., T], *results: Result) -> list[T]:
    """``use(number of the first row, logits of the same rows (n, ·) of each)`` for a few rows at a time, which can go then."""
    flat = [replace(result, held=result.held.reshape(-1, result.held.shape[-1])) for result in results]
    rows, found = max(1, ENTRIES // flat[0].width), list[T]()
    for start in range(0, len(flat[0].held), rows):
        found.append(use(start, *(replace(each, held=each.held[start : start + rows]).logits() for each in flat)))
    return found


def compare_results(wanted: Result, *found: Result) -> list[LogitComparison]:
    """Each of ``found`` against ``wanted``, at the same positions."""
    blocks = by_blocks(lambda _, y, *others: [compare_logits(x, y) for x in others], wanted, *found)
    return [joined(list(parts)) for parts in zip(*blocks, strict=True)]


class Runs:
    """A context in which runs of a model keep their last hidden states if they may do ``without`` logits."""

    def __init__(self, model: nn.Module, without: bool) -> None:
        self.model, self.base = model, _base(model) if without else None
        self._caught: list[Any] = []
        self._installation = HookStack()

    def __enter__(self) -> "Runs":
        if self.base is not None:
            self._installation.after(self.base, lambda _, output: self._caught.append(output))
        return self

    def __exit__(self, *_: object) -> None:
        self._installation.undo()
        self._caught.clear()

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a run without a cache, which asks for no logits if that can be."""
        inputs = without_cache(self.model, inputs)
        if self.base is None or not set(inputs) <= PLAIN:
            return inputs
        return inputs | {KEEP: torch.empty(0, dtype=torch.long, device=next(self.model.parameters()).device)}

    def of(self, output: Any) -> Result:
        """What the last run gave, which returned ``output``."""
        logits, caught = result_of(output), self._caught[-1:]
        self._caught.clear()
        if self.base is None or logits.numel():
            return Result.of(logits)
        head = Head(self.model, self.base, type(caught[0]), logits.shape[-1])
        return Result(caught[0].last_hidden_state, logits.dtype, head)

    def __call__(self, inputs: Mapping[str, Any]) -> Result:
        """Run the model."""
        return self.of(self.model(**self.inputs(inputs)))


def without_logits(model: nn.Module, runs: Sequence[Mapping[str, Any]], tried: dict[str, bool] | None = None) -> bool:
    """Whether such runs may do without logits: they are many, and the model can make them later, which is tried once."""
    base, tried = _base(model), {} if tried is None else tried
    if base is None or torch.is_autocast_enabled(next(model.parameters()).device.type) or not _many(model, runs):
        return False
    if "head" in tried:
        return tried["head"]
    try:
        found = _same_later(model, base)
    except Exception:  # whatever the model's own code may raise when it is run this way, or a patch that is on it
        found = False
    if not carried(model):
        tried["head"] = found
    return found


def _base(model: nn.Module) -> nn.Module | None:
    base = getattr(model, "base_model", None)
    apart = isinstance(base, nn.Module) and base is not model and KEEP in forward_arguments(model)
    return base if apart else None


def _many(model: nn.Module, runs: Sequence[Mapping[str, Any]]) -> bool:
    embedding, names = input_embedding(model), [main_input(inputs) for inputs in runs]
    if embedding is None or None in names:
        return False
    count = sum(inputs[str(name)].shape[:2].numel() for name, inputs in zip(names, runs, strict=True))
    return count * embedding.shape[0] > FEW


@torch.no_grad()
def _same_later(model: nn.Module, base: nn.Module) -> bool:
    """Whether the logits that are made later are those of a run, for a whole run and for one row; on random token ids."""
    drawn = random_inputs(model, None)
    wanted, calls = result_of(model(**drawn)), []
    with HookStack() as installation, Runs(model, True) as runs:
        installation.after(base, lambda _, output: calls.append(output))
        found = runs(drawn)
    whole, row = found.logits(), replace(found, held=found.held[0, -1:]).logits()
    if found.head is None or len(calls) != 1 or (whole.shape, whole.dtype) != (wanted.shape, found.dtype):
        return False
    return all(relative_error(x, y) <= VERIFIED[y.dtype] for x, y in ((whole, wanted), (row, wanted[0, -1:])))
