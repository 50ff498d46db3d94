"""Residual topologies: how the feed-forward half, its norms and the skip are put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from architectures.feed_forward import FeedForward, Norm
from architectures.mixers import Mixer
from architectures.registry import Architecture, Build, Refusal, StatePoint, add
from architectures.view import View
from controllability.components import Fixed, Identity, Select, Sum, Times, residual
from controllability.interfaces import Component

ATTENTION = Mixer()
Number = Callable[[View], Any]


@dataclass(frozen=True)
class Shape:
    """What families have in common: a builder and what to print about it."""

    build: Build
    topology: str
    feed_forward: str
    inputs: tuple[StatePoint, ...] | None = None
    output: StatePoint | None = None
    mixer: Build | None = ATTENTION


def kind_of(half: FeedForward) -> str:
    """'gated', 'mixture of experts', …"""
    kind = getattr(half, "kind", "feed-forward")
    if getattr(half, "dense", None) is not None:
        kind += f", {kind_of(half.dense)} in some layers"  # type: ignore[attr-defined]
    return kind + (", shared experts" if getattr(half, "shared", None) else "")


def _then(*parts: Component | None) -> Component:
    found = [p for p in parts if p is not None]
    first = found[0]
    for part in found[1:]:
        first = first >> part
    return first


def sequential(
    pre: Norm | None, half: FeedForward, post: Norm | None = None, times: Number | None = None,
    skip: Callable[[View], Component] | None = None, mixer: Mixer | None = None,
) -> Shape:  # fmt: skip
    """skip(x) + c · post(half(pre(x))): pre-norm, post-norm on the output, or both."""

    def build(view: View) -> Component:
        factor = times(view) if times else 1
        branch = _then(
            pre(view) if pre else None, half(view), post(view) if post else None, Times(factor) if factor != 1 else None
        )
        return residual(branch, skip(view) if skip else Identity())

    norms = {(True, False): "pre-norm", (True, True): "pre- and post-norm", (False, True): "post-norm on the output"}
    topology = f"sequential, {norms.get((pre is not None, post is not None), 'no norm')}"
    topology += ", multiplier" if times else ""
    topology += ", gain on the skip" if skip else ""
    return Shape(build, topology, kind_of(half), mixer=mixer or Mixer(times=times))


def after_norm(norm: Norm, half: FeedForward, times: Callable[[View], tuple[Any, Any]] | None = None) -> Shape:
    """h = norm(x); α h + β half(h): the residual is taken after the norm."""

    def build(view: View) -> Component:
        if times is None:
            return norm(view) >> residual(half(view))
        alpha, beta = times(view)
        return norm(view) >> residual(half(view) >> Times(beta), Times(alpha))

    return Shape(build, "residual after the norm" + (", multipliers" if times else ""), kind_of(half))


def post_ln(half: FeedForward, norm: Norm, state: str = "", after: str = "", mixer: Build | None = None) -> Shape:
    """norm(x + half(x)): the sum inside the last norm is reproduced.  ``after`` names the module that shows it."""

    def build(view: View) -> Component:
        return residual(half(view)) >> norm(view)

    return Shape(
        build, "post-norm after the sum", kind_of(half), (StatePoint(state),) if state else None,
        StatePoint(after, "after") if after else None, mixer,
    )  # fmt: skip


def parallel(pre: Norm, half: FeedForward, attention: str, outer: str = "o_proj") -> Shape:
    """x + a + half(pre(x)), a being what attention adds: the block has two inputs."""

    def branch(view: View) -> Component:
        return _then(Select(0, "hidden state", view.size("d")), pre(view), half(view))

    def build(view: View) -> Component:
        x, a = Select(0, "hidden state", view.size("d")), Select(1, "attention output", view.size("d"))
        return Sum((x, a, branch(view)))

    mixer = Mixer(f"{attention}.{outer}", beside=branch, output=StatePoint("", "after"))
    return Shape(build, "parallel", kind_of(half), (StatePoint(""), StatePoint(attention, "after")), mixer=mixer)


def family(
    name: str, layers: str, shape: Shape, mixer: Build | str | tuple[Build, ...] | None = None, **options: Any
) -> None:
    """Declare a family: its name (and other model types after spaces), its layer classes, its shape.

    ``mixer`` writes the half that mixes positions, where its shape's does not; a text names the map behind the mixing.
    """
    names = name.split()
    if isinstance(mixer, str) and isinstance(shape.mixer, Mixer):
        mixer = replace(shape.mixer, outer=mixer)
    mixer = mixer or shape.mixer or ()
    options = {"inputs": shape.inputs, "output": shape.output} | options
    options["mixer"] = mixer if isinstance(mixer, tuple) else (mixer,)
    add(
        Architecture(
            names[0], tuple(names), tuple(layers.split()), shape.topology, shape.feed_forward, shape.build, **options
        )
    )


def without_feed_forward(
    name: str, layers: str, culprit: str, reason: str, hint: str, topology: str = "", kind: str = "",
    mixer: Build | tuple[Build, ...] = (), mixer_class: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Declare a family whose feed-forward half cannot be patched, with the reason and what would be needed: ``mixer``, if that can."""
    names, refusal = name.split(), Refusal(culprit, reason, hint)
    halves = mixer if isinstance(mixer, tuple) else (mixer,)
    add(
        Architecture(
            names[0], tuple(names), tuple(layers.split()), topology, kind, None, half_refused=refusal, mixer=halves,
            mixer_class=mixer_class,
        )
    )  # fmt: skip


def fixed_scale(name: str, size: str = "d") -> Callable[[View], Component]:
    """A per-channel gain stored at the layer itself; it stays as it is."""
    from controllability.components import Scale

    return lambda view: Fixed(Scale(view.param(name, size)))


def either(condition: Callable[[View], Any], yes: Shape, no: Shape) -> Shape:
    """One of two shapes, as a switch of the config or the live layer says."""

    def build(view: View) -> Component | None:
        shape = yes if condition(view) else no
        if shape.inputs:
            view.sites["inputs"] = shape.inputs
        if shape.output:
            view.sites["output"] = shape.output
        return shape.build(view)

    def mixer(view: View) -> Component | None:
        build = (yes if condition(view) else no).mixer
        return build(view) if build else None

    return Shape(build, f"{yes.topology}, or {no.topology}", yes.feed_forward, mixer=mixer)
