"""A reading is never trusted: expression and real modules must agree on random input first."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import architectures
from architectures.reading import Layer, Reading
from controllability.arrays import arithmetic, relative_error
from controllability.errors import BadInput, NotControllable, ReadingError
from controllability.models.hooks import Installation, carried, first_tensor
from controllability.proof import Proof
from controllability.prover import prove
from controllability.trace import Path, Trace

# largest relative difference that rounding explains; norms inside a float64 model run in float32
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.1}


@dataclass(frozen=True, eq=False)
class Checked:
    """A reading that agreed with the model, and the norm of every parameter it reads."""

    reading: Reading
    norms: dict[str, float]
    signature: tuple[Any, ...]
    worst: float
    _proofs: dict[tuple[str, str], list[Proof]] = field(default_factory=dict)

    def proofs(self, via: str, route: str) -> list[Proof]:
        """One proof a layer, searched once.  Raises ``NotControllable`` with the layer that has none."""
        if (via, route) not in self._proofs:
            self._proofs[via, route] = [_prove(layer, via, route) for layer in self.reading.layers]
        return self._proofs[via, route]


def _prove(layer: Layer, via: str, route: str) -> Proof:
    try:
        return prove(layer.block, via, route)  # type: ignore[arg-type]
    except NotControllable as refused:
        raise NotControllable(refused.culprit, refused.reason, refused.hint, f"layer {layer.index}") from None


_CHECKED: weakref.WeakKeyDictionary[nn.Module, Checked] = weakref.WeakKeyDictionary()


def checked_reading(model: nn.Module) -> Checked:
    """The model's reading, compared with its modules once per model and state of its parameters.

    Raises ``BadInput`` for models that cannot be patched as they are (training mode, meta device,
    quantised or non-finite parameters) and ``ReadingError`` where expression and module disagree.
    """
    if any(module.training for module in model.modules()):
        raise BadInput("the model is in training mode: call model.eval() first, dropout would make runs differ")
    known = _CHECKED.get(model)
    if known is not None and (carried(model) or known.signature == _signature(known.reading)):
        return known
    reading = architectures.read(model)
    _refuse_unusable(model, reading)
    norms = _norms(model, reading)
    worst = compare(model, reading)
    _CHECKED[model] = Checked(reading, norms, _signature(reading), worst)
    return _CHECKED[model]


def _signature(reading: Reading) -> tuple[Any, ...]:
    found = []
    for layer in reading.layers:
        for name in layer.params:
            module, attribute = layer.params.holder(name)
            parameter = module._parameters[attribute]
            version = 0 if parameter.is_inference() else parameter._version
            found.append((id(parameter), version, parameter.data_ptr()))
    return tuple(found)


def _refuse_unusable(model: nn.Module, reading: Reading) -> None:
    for layer in reading.layers:
        for name, value in layer.params.items():
            if value.is_meta:
                raise BadInput(f"parameter {name} is on the meta device: load the weights first")
            if not value.is_floating_point():
                raise BadInput(f"parameter {name} is {value.dtype}: quantised parameters cannot be patched")


def _norms(model: nn.Module, reading: Reading) -> dict[str, float]:
    norms = {}
    for layer in reading.layers:
        for name, value in layer.params.items():
            norm = float(torch.linalg.vector_norm(value, dtype=torch.promote_types(value.dtype, torch.float32)))
            if not norm < float("inf") and not bool(torch.isfinite(value).all()):
                raise BadInput(f"parameter {name} holds NaN or infinite values: nothing was changed")
            norms[name] = norm
    for name, value in model.named_parameters():
        if name not in norms and value.is_floating_point() and not _finite(value.detach()):
            raise BadInput(f"parameter {name} holds NaN or infinite values: nothing was changed")
    return norms


def _finite(value: Tensor) -> bool:
    total = value.sum(dtype=torch.promote_types(value.dtype, torch.float32))
    return value.is_meta or bool(torch.isfinite(total)) or bool(torch.isfinite(value).all())


@torch.no_grad()
def compare(model: nn.Module, reading: Reading, length: int = 4, seed: int = 0) -> float:
    """Run the model once on random tokens and hold every tapped module against its expression.

    Returns the largest relative difference.  Raises ``ReadingError`` with the first component that
    disagrees, by how much, and on which layer.
    """
    seen: list[dict[Path, Tensor]] = [{} for _ in reading.layers]
    states: list[Tensor | None] = [None] * len(reading.layers)
    installation = Installation()
    try:
        for layer in reading.layers:
            _watch(installation, model, layer, seen[layer.index], states)
        vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, int(vocabulary), (1, length), generator=generator)
        padding = getattr(model.config, "pad_token_id", None)
        ids = torch.where(ids == padding, (ids + 1) % int(vocabulary), ids) if padding is not None else ids
        model(input_ids=ids.to(model.get_input_embeddings().weight.device), use_cache=False)  # type: ignore[operator, union-attr]
    finally:
        installation.undo()
    worst = 0.0
    for layer in reading.layers:
        state = states[layer.index]
        if state is None or () not in seen[layer.index]:
            raise ReadingError(
                f"layer {layer.index} ({layer.name}): its modules did not run in the model's forward pass"
            )
        worst = max(worst, _compare_layer(layer, state, seen[layer.index]))
    return worst


def _watch(
    installation: Installation, model: nn.Module, layer: Layer, seen: dict[Path, Tensor], states: list[Tensor | None]
) -> None:
    root = Trace(layer.block, {}, None)
    for tap in layer.taps:
        module = model.get_submodule(tap.module)
        if root.feeds_from_root(tap.inlet):
            installation.before(module, lambda m, args: states.__setitem__(layer.index, args[0].clone()))
        installation.after(module, lambda m, args, out, path=tap.outlet: seen.__setitem__(path, out.clone()))
    installation.after(
        model.get_submodule(layer.name), lambda m, args, out: seen.__setitem__((), first_tensor(out).clone())
    )


def _compare_layer(layer: Layer, state: Tensor, seen: dict[Path, Tensor]) -> float:
    xp = arithmetic(state)
    tolerance = TOLERANCE[state.dtype]
    params = {name: xp.lift(value) for name, value in layer.params.items()}
    trace = Trace(layer.block, params, xp.lift(state))
    worst = 0.0
    for path, real in sorted(seen.items(), key=lambda item: (not item[0], item[0])):
        expected = trace.output(path)
        if expected.shape != real.shape:
            raise ReadingError(
                f"layer {layer.index}: {_name(layer, path)} gives {tuple(expected.shape)}, the module {tuple(real.shape)}"
            )
        if not bool(torch.isfinite(real).all()):
            raise BadInput(
                f"layer {layer.index} ({layer.name}): {_name(layer, path)} is not finite on random input: "
                "the model overflows; take another dtype or mend the weights"
            )
        error = relative_error(expected, xp.lift(real))
        if not error <= tolerance:
            raise ReadingError(
                f"layer {layer.index} ({layer.name}): expression and module disagree at {_name(layer, path)}: "
                f"relative difference {error:.3g} on random input, rounding explains {tolerance:.0e}; "
                "the family changed or has a switch that is not declared"
            )
        worst = max(worst, error)
    return worst


def _name(layer: Layer, path: Path) -> str:
    return next((tap.module for tap in layer.taps if tap.outlet == path), "the output of the whole layer")
