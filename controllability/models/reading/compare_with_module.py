"""Whether expression and module agree: one run on random input, every tapped module held against its expression."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from architectures.reading import Layer, Reading, Tap
from controllability.arrays import arithmetic, errors_and_sizes, relative_error
from controllability.arrays.sharded import gathered
from controllability.components.mixture import CHOSEN, SHARES
from controllability.errors import ControllabilityError, Overflow, ReadingError
from controllability.execution.trace import Trace
from controllability.interfaces import Path, node
from controllability.models.hooks.guards import refuse_bypassed
from controllability.models.hooks.installation import HookStack
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.reading.random_inputs import random_inputs, refuse_ids
from controllability.models.reading.tolerances import EIGHT_BITS, TOLERANCE


class Comparer:
    """Listens to one layer and keeps everything that its first call shows."""

    def __init__(self) -> None:
        self.calls = self.length = 0
        self.states: dict[int, Tensor] = {}
        self.seen: dict[Path, Tensor] = {}
        self.read: dict[Path, Tensor] = {}
        self.bound: dict[Path, dict[str, Tensor]] = {}

    def begins(self) -> None:
        self.calls += 1

    def entering(self, index: int, value: Tensor) -> None:
        if self.calls == 1:
            self.states[index] = gathered(value).clone()
            self.length = int(value.shape[1])

    def routed(self, path: Path, index: Tensor, shares: Tensor) -> None:
        if self.calls == 1:
            self.bound[path] = {CHOSEN: index.clone(), SHARES: shares.clone()}

    def computed(self, tap: Tap, x: Tensor, y: Tensor) -> None:
        if self.calls == 1:
            self.seen[tap.outlet] = gathered(y).clone()
            if tap.kind == "module":
                self.read[tap.outlet] = gathered(x).clone()

    def leaving(self, value: Tensor) -> None:
        if self.calls == 1:
            self.seen.setdefault((), gathered(value).clone())


def compare(
    model: nn.Module, reading: Reading, inputs: Mapping[str, Any] | None = None
) -> tuple[float, nn.Module | None, int | None]:
    """Run the model once on random input and hold every tapped module against its expression.

    ``inputs`` is an example of the forward's keyword arguments: its tensors are replaced by random ones, by others where
    the model overflows on them.  Returns the largest relative difference, the module that embedded the token ids, and how
    many positions every layer had.  Raises ``ReadingError`` with the first component that disagrees, by how much, and on
    which layer.
    """
    for seed in range(2):
        with suppress(Overflow):
            return _compare_once(model, reading, inputs, seed)
    return _compare_once(model, reading, inputs, 2)


@torch.no_grad()
def _compare_once(
    model: nn.Module, reading: Reading, inputs: Mapping[str, Any] | None, seed: int
) -> tuple[float, nn.Module | None, int | None]:
    drawn = random_inputs(model, inputs, seed)
    comparers = [Comparer() for _ in reading.layers]
    with LayerHooks(model, reading) as hooks:
        embeddings = _listen_for(drawn.get("input_ids"), model, inputs, hooks.installation)
        hooks.run(comparers, drawn)
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
    lengths = {c.length for c in comparers if c.calls}
    return worst, embeddings[0] if len(embeddings) == 1 else None, lengths.pop() if len(lengths) == 1 else None


def _listen_for(
    ids: Any, model: nn.Module, example: Mapping[str, Any] | None, installation: HookStack
) -> list[nn.Module]:
    """The embeddings that are given ``ids`` in the run that follows: models need not say which one it is."""
    found: list[nn.Module] = []

    def listen(module: nn.Embedding) -> None:
        def hook(x: Any) -> None:
            if not isinstance(x, Tensor) or x.shape != ids.shape or not torch.equal(x.to(ids.device), ids):
                return
            found.append(module)
            if int(ids.min()) < 0 or int(ids.max()) >= module.num_embeddings:  # drawn from those of the example
                refuse_ids((example or {}).get("input_ids", ids), module.num_embeddings, "target")

        installation.before(module, hook)

    if isinstance(ids, Tensor):
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                listen(module)
    return found


def _compare_layer(layer: Layer, comparer: Comparer) -> float:
    refuse_bypassed(layer, layer.taps, comparer.seen)
    states = [comparer.states[i] for i in range(len(layer.inputs))]
    xp = arithmetic(states[0])
    tolerance = TOLERANCE.of({value.dtype for value in (*states, *comparer.seen.values(), *layer.params.values())})
    held = {name: gathered(value) for name, value in layer.params.items()}
    params = {name: xp.lift(value) if value.is_floating_point() else value for name, value in held.items()}
    lifted = [xp.lift(s) for s in states]
    trace = Trace(layer.block, params, lifted[0] if len(lifted) == 1 else lifted)
    for path, bound in comparer.bound.items():
        _compare_choice(layer, trace, path, bound, tolerance)
    worst = _compare_quantised(layer, trace, comparer, tolerance)
    for path, real in sorted(comparer.seen.items(), key=lambda item: (not item[0], item[0])):
        expected = _computed(layer, trace, path)
        if expected.shape != real.shape:
            raise ReadingError(
                f"layer {layer.index}: {_name(layer, path)} gives {tuple(expected.shape)}, the module {tuple(real.shape)}"
            )
        finite = torch.isfinite(real).all(-1)  # a position that overflows says nothing about the expression
        if not bool(finite.any()):
            raise Overflow(
                f"layer {layer.index} ({layer.name}): {_name(layer, path)} is not finite on random input: "
                "the model overflows; take another dtype or mend the weights"
            )
        expected, real = expected[finite], real[finite]
        error = relative_error(expected, xp.lift(real))
        if not error <= tolerance:
            raise ReadingError(
                f"layer {layer.index} ({layer.name}): expression and module disagree at {_name(layer, path)}: "
                f"relative difference {error:.3g} on random input, rounding explains {tolerance:.0e}; "
                f"{_largest(expected, real)}; {_culprit(layer, trace, path, comparer, tolerance)}; "
                "the declaration is wrong, the family changed, or a switch is on that nobody declared"
            )
        worst = max(worst, error)
    return worst


def _compare_quantised(layer: Layer, trace: Trace, comparer: Comparer, tolerance: float) -> float:
    """Hold quantised linear layers against the numbers that they stand for, each at the input that it really had.

    Where one rounds its input to 8 bits, that is coarser than what holds for everything else.  So what a quantised layer
    reads must agree as closely as anything, and what it gave is then taken from the model for all that follows.
    """
    worst = 0.0
    for tap in layer.taps:
        leaf = node(layer.block, tap.outlet)
        if not any(p.name in layer.params.quantised for p in leaf.own_parameters()) or tap.outlet not in comparer.seen:
            continue
        x, y = comparer.read[tap.outlet], comparer.seen[tap.outlet]
        finite = torch.isfinite(y).all(-1)
        if not bool(finite.any()):
            continue  # said below, as of any layer
        xp = arithmetic(y)
        found = leaf(trace.params_at(tap.outlet), xp.lift(x))
        both = (trace.input(tap.inlet), x), (found, y)
        pairs = (((a[finite], xp.lift(b[finite])) if a.shape == b.shape else None) for a, b in both)
        read, computed = (relative_error(*pair) if pair else float("inf") for pair in pairs)
        where = f"layer {layer.index} ({layer.name})"
        if not read <= tolerance:
            raise ReadingError(
                f"{where}: expression and module disagree at what {tap.module} reads: relative difference {read:.3g} on "
                f"random input, rounding explains {tolerance:.0e}; culprit: {_before(layer, tap.inlet) or 'its input'}; "
                "the declaration is wrong, the family changed, or a switch is on that nobody declared"
            )
        if not computed <= max(tolerance, EIGHT_BITS):
            raise ReadingError(
                f"{where}: the quantised {tap.module} does not compute what its dequantised weight says: relative "
                f"difference {computed:.3g} on random input, inputs rounded to 8 bits explain {EIGHT_BITS}; it is quantised "
                "in a way that is not known here; nothing was changed"
            )
        trace.observe_output(tap.outlet, xp.lift(y))
        worst = max(worst, read, computed)
    return worst


def _computed(layer: Layer, trace: Trace, path: Path) -> Tensor:
    try:
        return trace.output(path)
    except ControllabilityError:
        raise
    except Exception as error:  # a component of a user's own may raise anything
        raise ReadingError(
            f"layer {layer.index} ({layer.name}): the expression cannot be computed up to {_name(layer, path)} on random "
            f"input: {type(error).__name__}: {error}"
        ) from error


def _culprit(layer: Layer, trace: Trace, path: Path, comparer: Comparer, tolerance: float) -> str:
    """The smallest part that disagrees: a module's own leaves, or what the expression puts before them."""
    tap = next((t for t in layer.taps if t.outlet == path), None)
    if tap is None:
        return "every module agrees, what disagrees is how the expression puts them together"
    x, real = comparer.read.get(path), comparer.seen[path]
    own = " >> ".join(node(layer.block, p).describe() for p in tap.paths)
    before = _before(layer, tap.inlet)
    if x is None or not before:
        return f"culprit: {own}"
    value: Any = arithmetic(x).lift(x)
    for p in tap.paths:
        value = node(layer.block, p)(trace.params_at(p), value)
    if relative_error(value, arithmetic(real).lift(real)) <= tolerance:
        return f"culprit: {before}, which the expression puts before {own}"
    return f"culprit: {own}"


def _before(layer: Layer, path: Path) -> str:
    """The part that hands its output to the node at ``path``; '' where that is the block's own input."""
    for depth in reversed(range(len(path))):
        around = node(layer.block, path[:depth])
        if (source := around.source_of(path[depth])) is not None:
            return around.children()[source].describe()
    return ""


def _compare_choice(layer: Layer, trace: Trace, path: Path, real: dict[str, Tensor], tolerance: float) -> None:
    """The declared routing must choose the experts that the model chose, with the same shares.

    The model's own choice is then used for the rest, so that a near-tie is not taken for a wrong routing.
    """
    expected: dict[str, Any] = dict(trace.bound(path))
    same = torch.eq(expected[CHOSEN], real[CHOSEN]).all(-1)
    component = node(layer.block, path)
    margin = component.choice_margin(trace.params, lambda i: trace.output((*path, i)))[..., 0]
    wrong = ~same & (margin > tolerance)
    errors, sizes = errors_and_sizes(expected[SHARES].to(real[SHARES].dtype), real[SHARES])
    off = same & (errors / sizes.max().clamp_min(1e-30) > tolerance) & (margin > tolerance)
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
