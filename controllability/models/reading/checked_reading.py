"""A reading is never trusted: expression and real modules must agree on random input first."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import architectures
from architectures import quantised
from architectures.reading import Layer, Reading, architecture_of
from controllability.arrays.sharded import gathered, here
from controllability.errors import BadInput, NotControllable
from controllability.models.hooks.carried_patches import carried
from controllability.models.hooks.shards import refuse_uneven
from controllability.models.reading.compare_with_module import compare
from controllability.models.reading.fingerprints import looking, settings_of, stored
from controllability.models.reading.model_facts import (
    modules_of,
    position_limit,
    refuse_fully_sharded,
    refuse_offloaded,
    refuse_training,
)
from controllability.prover.derivation import Derivation
from controllability.prover.search import derive


@dataclass(frozen=True, eq=False)
class Checked:
    """A reading that agreed with the model, and the norm of every parameter it reads.

    ``embedding`` is the module that the token ids went into.  ``tried`` holds what was found out about the model on random
    input, once (``probes``).
    """

    reading: Reading
    norms: dict[str, float]
    signature: tuple[Any, ...]
    worst: float
    embedding: nn.Module | None = None
    length: int | None = None  # positions of a layer's states, for models that read no tokens
    tried: dict[str, bool] = field(default_factory=dict)
    _proofs: dict[tuple[str, str, bool], list[Derivation]] = field(default_factory=dict)

    @property
    def codebooks(self) -> int:
        """How many rows of ids the model reads a sample (audio models read several)."""
        count = self.reading.architecture.codebooks
        return count(self.reading.config) if count else 1

    @property
    def streams(self) -> int:
        """How many states the model keeps a position (hyper-connections keep several)."""
        count = self.reading.architecture.streams
        return count(self.reading.config) if count else 1

    @property
    def position_limit(self) -> int | None:
        """How many positions the model's config admits; None where it does not say."""
        return position_limit(self.reading.config)

    def proofs(self, via: str, route: str, jointly: bool = False) -> list[Derivation]:
        """One proof a layer, searched once.  Raises ``NotControllable`` with the layer that has none."""
        for name, value in (("via", via), ("route", route)):
            if not isinstance(value, str):
                raise BadInput(f"{name} must be a name, got {type(value).__name__}")
        key = (via, route, jointly)
        if key not in self._proofs:
            self._proofs[key] = [_prove(layer, *key) for layer in self.reading.layers]
        return self._proofs[key]


def _prove(layer: Layer, via: str, route: str, jointly: bool) -> Derivation:
    try:
        return derive(layer.block, via, route, jointly=jointly)  # type: ignore[arg-type]
    except NotControllable as refused:
        raise NotControllable(
            refused.culprit, refused.reason, refused.hint, f"layer {layer.index}", refused.remedies
        ) from None


_CHECKED: weakref.WeakKeyDictionary[nn.Module, dict[str, Checked]] = weakref.WeakKeyDictionary()
_READ: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Reading, tuple[Any, ...]]]] = weakref.WeakKeyDictionary()


def checked_reading(model: nn.Module, example: Mapping[str, Any] | None = None, place: str | None = None) -> Checked:
    """The model's reading at ``place``, compared with its modules once per model and state of its parameters.

    Raises ``BadInput`` for models that cannot be patched as they are (training mode, meta device,
    quantised or non-finite parameters) and ``ReadingError`` where expression and module disagree.
    """
    modules = modules_of(model)
    refuse_training(model, modules)
    refuse_offloaded(model, modules)
    refuse_fully_sharded(modules)
    refuse_uneven(model)
    architecture = architecture_of(model)
    place = architecture.place(place)
    known = _CHECKED.setdefault(model, {}).get(place)
    if (
        known is not None
        and known.reading.architecture is architecture  # it may have been registered anew
        and (carried(model) or known.signature == _signature(model, known.reading))
    ):
        return known
    reading = architectures.read(model, place)
    _refuse_unusable(model, reading)
    norms = _norms(model, reading)
    worst, embedding, length = compare(model, reading, example)
    signature = _signature(model, reading)
    found = _CHECKED[model][place] = Checked(reading, norms, signature, worst, embedding, length)
    _READ.setdefault(model, {})[place] = reading, signature
    return found


def known_reading(model: nn.Module, place: str | None = None) -> Reading:
    """The model's reading at ``place``, for a patch that was made already: read anew only when something was replaced or written to.

    It is not compared with the modules.  Raises what ``architectures.read`` does.
    """
    architecture = architecture_of(model)
    place = architecture.place(place)
    known = _READ.setdefault(model, {})
    reading, signature = known.get(place, (None, ()))
    if reading is None or reading.architecture is not architecture or signature != _signature(model, reading):
        reading = architectures.read(model, place)
        known[place] = reading, _signature(model, reading)
    return reading


def _signature(model: nn.Module, reading: Reading) -> tuple[Any, ...]:
    """What is the same as long as nothing was replaced or written to: modules, settings, parameters and their versions."""
    modules = modules_of(model)
    found: list[Any] = [module for _, module in modules[1:]]  # the model itself could never be forgotten then
    found.append(settings_of(modules))
    for layer in reading.layers:
        for name in layer.params:
            module, attribute = layer.params.holder(name)
            parameter = module._parameters.get(attribute, module._buffers.get(attribute))
            pieces = list(quantised.pieces(name, module, parameter))
            with looking():
                for _, piece in pieces:
                    piece = here(piece)
                    version = 0 if piece.is_inference() else piece._version
                    found.append((id(parameter), version, piece.data_ptr()))
    return tuple(found)


def _refuse_unusable(model: nn.Module, reading: Reading) -> None:
    held = dict((*model.named_parameters(), *model.named_buffers()))
    patched = [(layer.params, name) for layer in reading.layers for name in layer.params if name in held]
    for name in dict.fromkeys((*(name for _, name in patched), *held)):
        if held[name].is_meta:
            raise BadInput(f"parameter {name} is on the meta device: load the weights first")
    for params, name in patched:
        if isinstance(held[name], nn.Parameter) and not (name in params.quantised or held[name].is_floating_point()):
            raise BadInput(f"parameter {name} is {held[name].dtype}: quantised parameters cannot be patched")


def _norms(model: nn.Module, reading: Reading) -> dict[str, float]:
    norms = {}
    for layer in reading.layers:
        for name, value in layer.params.items():
            if not value.is_floating_point():
                continue
            norm = float(
                gathered(torch.linalg.vector_norm(value, dtype=torch.promote_types(value.dtype, torch.float32)))
            )
            if not norm < float("inf") and not _finite(value):
                raise BadInput(f"parameter {name} holds NaN or infinite values: nothing was changed")
            norms[name] = norm
    for name, value in stored(model):
        checked = name in norms or not isinstance(value, nn.Parameter) or not value.is_floating_point()
        if not checked and not _finite(value.detach()):
            raise BadInput(f"parameter {name} holds NaN or infinite values: nothing was changed")
    return norms


def _finite(value: Tensor) -> bool:
    total = gathered(
        value.sum(dtype=torch.promote_types(value.dtype, torch.float32))
    )  # the same answer on every device
    return value.is_meta or bool(torch.isfinite(total)) or bool(gathered(torch.isfinite(value).all()))
