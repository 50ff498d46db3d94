"""A reading is never trusted: expression and real modules must agree on random input first."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import architectures
from architectures.reading import Layer, Reading, Tap
from controllability.arrays import arithmetic, relative_error
from controllability.components.mixture import CHOSEN, SHARES, Mixture
from controllability.errors import BadInput, NotControllable, ReadingError
from controllability.models.hooks import Installation, carried
from controllability.models.watch import Watch
from controllability.proof import Proof
from controllability.prover import prove
from controllability.trace import Path, Trace, node

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


def checked_reading(model: nn.Module, example: Mapping[str, Any] | None = None) -> Checked:
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
    worst = compare(model, reading, example)
    _CHECKED[model] = Checked(reading, norms, _signature(reading), worst)
    return _CHECKED[model]


def _signature(reading: Reading) -> tuple[Any, ...]:
    found = []
    for layer in reading.layers:
        for name in layer.params:
            module, attribute = layer.params.holder(name)
            parameter = module._parameters.get(attribute, module._buffers.get(attribute))
            version = 0 if parameter.is_inference() else parameter._version
            found.append((id(parameter), version, parameter.data_ptr()))
    return tuple(found)


def _refuse_unusable(model: nn.Module, reading: Reading) -> None:
    for layer in reading.layers:
        for name, value in layer.params.items():
            if value.is_meta:
                raise BadInput(f"parameter {name} is on the meta device: load the weights first")
            if not value.is_floating_point() and name in dict(model.named_parameters()):
                raise BadInput(f"parameter {name} is {value.dtype}: quantised parameters cannot be patched")


def _norms(model: nn.Module, reading: Reading) -> dict[str, float]:
    norms = {}
    for layer in reading.layers:
        for name, value in layer.params.items():
            if not value.is_floating_point():
                continue
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


class Comparer:
    """Listens to one layer and keeps everything that its first call shows."""

    def __init__(self) -> None:
        self.calls = 0
        self.states: dict[int, Tensor] = {}
        self.seen: dict[Path, Tensor] = {}
        self.bound: dict[Path, dict[str, Tensor]] = {}

    def begins(self) -> None:
        self.calls += 1

    def entering(self, index: int, value: Tensor) -> None:
        if self.calls == 1:
            self.states[index] = value.clone()

    def routed(self, path: Path, index: Tensor, shares: Tensor) -> None:
        if self.calls == 1:
            self.bound[path] = {CHOSEN: index.clone(), SHARES: shares.clone()}

    def computed(self, tap: Tap, x: Tensor, y: Tensor) -> None:
        if self.calls == 1:
            self.seen[tap.outlet] = y.clone()

    def leaving(self, value: Tensor) -> None:
        if self.calls == 1:
            self.seen.setdefault((), value.clone())


@torch.no_grad()
def compare(model: nn.Module, reading: Reading, inputs: Mapping[str, Any] | None = None, seed: int = 0) -> float:
    """Run the model once on random input and hold every tapped module against its expression.

    ``inputs`` is an example of the forward's keyword arguments: its tensors are replaced by random ones.
    Returns the largest relative difference.  Raises ``ReadingError`` with the first component that
    disagrees, by how much, and on which layer.
    """
    installation = Installation()
    comparers = [Comparer() for _ in reading.layers]
    try:
        for layer, comparer in zip(reading.layers, comparers, strict=True):
            Watch(model, layer, comparer, installation, sequence_first=reading.architecture.sequence_first)
        model(**random_inputs(model, inputs, seed))
    finally:
        installation.undo()
    worst = 0.0
    if not any(c.calls for c in comparers):
        raise ReadingError(f"{reading.architecture.name}: no layer ran in the model's forward pass")
    for layer, comparer in zip(reading.layers, comparers, strict=True):
        if not comparer.calls:
            continue  # a layer that this kind of input does not reach; refused later if only one run reaches it
        if len(comparer.states) < len(layer.inputs) or () not in comparer.seen:
            raise ReadingError(
                f"layer {layer.index} ({layer.name}): its modules did not run in the model's forward pass"
            )
        worst = max(worst, _compare_layer(layer, comparer))
    return worst


def random_inputs(
    model: nn.Module, example: Mapping[str, Any] | None, seed: int = 0, length: int = 8
) -> dict[str, Any]:
    """Random tensors in the form of ``example``; by default one sample of ``length`` token ids.

    Positions beyond ``length`` are cut off; masks are left out, so that every position counts.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    main = next((example[k] for k in ("input_ids", "inputs_embeds") if k in example), None) if example else None
    if example is None:
        example = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
        main = example["input_ids"]
    drawn: dict[str, Any] = {"use_cache": False} if "use_cache" in example or hasattr(model, "config") else {}
    drawn |= {k: v for k, v in example.items() if "mask" not in k and k != "labels"}
    for name, value in drawn.items():
        if not isinstance(value, Tensor):
            continue
        if main is not None and value.ndim > 1 and value.shape[1] == main.shape[1]:
            value = value[:, :length]
        if name == "position_ids" or (value.dtype == torch.bool):
            drawn[name] = value.to(device)
        elif value.is_floating_point():
            drawn[name] = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(device, value.dtype)
        elif name.endswith("input_ids"):
            drawn[name] = _random_ids(model, value.shape, generator).to(device)
        else:
            drawn[name] = value.to(device)
    return drawn


def input_embedding(model: nn.Module) -> Tensor | None:
    """The embedding matrix of the model's tokens (of the first codebook); None where there is none."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if getter else None
    except NotImplementedError:
        embedding = None
    if isinstance(embedding, nn.ModuleList):
        embedding = embedding[0]
    weight = getattr(embedding, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 else None


def text_config(model: nn.Module) -> Any:
    """The config of the language model, which composite models keep inside theirs."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _random_ids(model: nn.Module, shape: Any, generator: torch.Generator) -> Tensor:
    config, weight = text_config(model), input_embedding(model)
    sizes = [getattr(config, "vocab_size", None), None if weight is None else weight.shape[0]]
    size = min(int(s) for s in sizes if s) if any(sizes) else 2
    ids = torch.randint(0, size, shape, generator=generator)
    padding = getattr(config, "pad_token_id", None)
    return torch.where(ids == padding, (ids + 1) % size, ids) if padding is not None else ids


def _compare_layer(layer: Layer, comparer: Comparer) -> float:
    states = [comparer.states[i] for i in range(len(layer.inputs))]
    xp = arithmetic(states[0])
    dtypes = [s.dtype for s in states] + [v.dtype for v in layer.params.values() if v.dtype in TOLERANCE]
    tolerance = max(TOLERANCE[d] for d in dtypes)
    params = {name: xp.lift(value) if value.is_floating_point() else value for name, value in layer.params.items()}
    lifted = [xp.lift(s) for s in states]
    trace = Trace(layer.block, params, lifted[0] if len(lifted) == 1 else lifted)
    for path, bound in comparer.bound.items():
        _compare_choice(layer, trace, path, bound, tolerance)
    worst = 0.0
    for path, real in sorted(comparer.seen.items(), key=lambda item: (not item[0], item[0])):
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
                f"{_largest(expected, real)}; the family changed or has a switch that is not declared"
            )
        worst = max(worst, error)
    return worst


def _compare_choice(layer: Layer, trace: Trace, path: Path, real: dict[str, Tensor], tolerance: float) -> None:
    """The declared routing must choose the experts that the model chose, with the same shares.

    The model's own choice is then used for the rest, so that a near-tie is not taken for a wrong routing.
    """
    expected = trace.bound(path)
    same = (expected[CHOSEN] == real[CHOSEN]).all(-1)
    component = node(layer.block, path)
    assert isinstance(component, Mixture)
    margin = component.routing.margin(trace.params, trace.output((*path, 0)))[..., 0]
    wrong = ~same & (margin > tolerance)
    shares = (expected[SHARES].to(real[SHARES].dtype) - real[SHARES]).abs().amax(-1) / real[
        SHARES
    ].abs().amax().clamp_min(1e-30)
    off = same & (shares > tolerance)
    for what, bad in (("experts", wrong), ("shares of the experts", off)):
        if bool(bad.any()):
            at = tuple(bad.nonzero()[0].tolist())
            key = CHOSEN if what == "experts" else SHARES
            raise ReadingError(
                f"layer {layer.index} ({layer.name}): {component.describe()} gives {what} "
                f"{[round(v, 4) for v in expected[key][at].tolist()]} for a random input, the model "
                f"{[round(v, 4) for v in real[key][at].tolist()]}: the router is not what was declared"
            )
    trace.bind(path, real)


def _largest(expected: Tensor, real: Tensor) -> str:
    difference = (expected - real.to(expected.dtype)).abs()
    at = int(difference.reshape(-1).argmax())
    pair = expected.reshape(-1)[at].item(), real.reshape(-1)[at].item()
    return f"largest difference {difference.max().item():.3g} (expression {pair[0]:.6g}, module {pair[1]:.6g})"


def _name(layer: Layer, path: Path) -> str:
    return next((tap.module for tap in layer.taps if tap.outlet == path), "the output of the whole layer")
