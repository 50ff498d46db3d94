"""What is registered: how a family's block is written down, abstractly and on a live model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from architectures import plugins
from architectures.view import View
from controllability.errors import BadInput, NotControllable
from controllability.interfaces import Component

Build = Callable[[View], Component | None]
PLACES = FEED_FORWARD, MIXER = "feed-forward", "mixer"  # which half of a layer takes the patch


@dataclass(frozen=True)
class StatePoint:
    """Where a live model shows one of a block's inputs, or its output.

    ``module`` is named inside the layer ('' is the layer itself); ``when`` is before it runs (its first
    argument, or the one that its forward calls ``argument``) or after (its output, the first of a tuple, what it calls
    ``argument``, or number ``item`` of a tuple or of streams that lie one behind the other on the first axis).  Of a module
    that runs several times in the layer ``run`` counts which time it is.  A registration names them, ``inputs=`` and
    ``output=``, where the block does not begin with a module that reads the layer's state, or does not end with the
    layer: a post-norm layer, or one with two inputs.  ``take(module, arguments)`` computes it before the module runs,
    where none of its arguments is it.  (Called ``Seen`` before.)

    >>> StatePoint("mlp")  # what enters the module mlp of the layer
    StatePoint(module='mlp', when='before', argument='', item=None, run=1)
    >>> StatePoint("", "after").when  # what the layer returns: the default output
    'after'
    """

    module: str
    when: Literal["before", "after"] = "before"
    argument: str = ""
    take: Callable[[Any, Mapping[str, Any]], Any] | None = field(default=None, repr=False)
    item: int | None = None
    run: int = 1


@dataclass(frozen=True)
class Refusal:
    """Why a family cannot be patched, and what would be needed."""

    culprit: str
    reason: str
    hint: str


@dataclass(frozen=True)
class Architecture:
    """One registered family.

    ``layer_class`` names the classes of its live layers (``Layer``, or in full ``package.module.Layer``), ``build``
    writes the block of one layer (None for a layer without a feed-forward half), ``defaults`` are the
    settings of the abstract block.
    ``inputs`` and ``output`` say where a live layer shows the block's input(s) and output, if not at the
    first module that reads it and at the layer's own output.  ``under`` restricts the layers to a part of
    the model; ``sequence_first`` says that states are (T, B, d); ``streams(config)`` how many rows a
    position has, one after the other on the sequence axis; ``codebooks(config)`` how many rows of ids a sample has;
    ``embeds(config)`` how wide ``inputs_embeds`` are, if not as the embedding matrix.  ``mixer`` writes the blocks of the
    halves of a layer that mix positions, ``mixer_class`` names the classes of their layers, if others; where ``build`` is None
    ``half_refused`` says why there is no block of a feed-forward half.  ``level`` says where a patched
    model is equal to its target: behind every layer, or at the logits only.  ``tail(view)`` names the blocks that follow
    the layers, each by the module that computes it; ``view`` is that of the module two levels above the layers.
    """

    name: str
    model_types: tuple[str, ...]
    layer_class: tuple[str, ...]
    topology: str
    feed_forward: str
    build: Build | None
    defaults: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[StatePoint, ...] | None = None
    output: StatePoint | None = None
    under: str = ""
    sequence_first: bool = False
    streams: Callable[[Any], int] | None = None
    codebooks: Callable[[Any], int] | None = None
    embeds: Callable[[Any], int] | None = None
    ignored: tuple[str, ...] = ()
    half_refused: Refusal | None = None
    mixer: tuple[Build, ...] = ()
    mixer_class: tuple[str, ...] = ()
    level: Literal["every layer", "logits"] = "every layer"
    tail: Callable[[View], Mapping[str, Component]] | None = None

    @property
    def refusal(self) -> Refusal | None:
        """Why none of its halves can be patched; None where one can."""
        return None if self.places else self.half_refused

    @property
    def places(self) -> tuple[str, ...]:
        """Where its layers can take a patch, the default first."""
        built = self.build is not None, bool(self.mixer)
        return tuple(place for place, there in zip(PLACES, built, strict=True) if there)

    def place(self, asked: str | None) -> str:
        """``asked``, or the default.  Raises ``BadInput`` for no place, ``NotControllable`` for one that this family does not have."""
        if asked is not None and asked not in PLACES:
            raise BadInput(f"unknown place {asked!r}: choose {' or '.join(PLACES)}")
        if asked in self.places or (asked is None and self.places):
            return asked or self.places[0]
        why = self.half_refused
        if asked == MIXER and self.places:
            why = Refusal(
                "what mixes its positions", "no map behind it is declared that reads one vector a token",
                f"place={FEED_FORWARD!r}, which takes the whole effect of the context",
            )  # fmt: skip
        assert why is not None
        raise NotControllable(f"{self.name}: {why.culprit}", why.reason, why.hint, f"architecture {self.name}")

    def builders(self, place: str) -> tuple[Build, ...]:
        """What writes the blocks of one layer at a place: one a half that takes a patch."""
        return self.mixer if place == MIXER else (self.build,) if self.build is not None else ()

    def classes(self, place: str = FEED_FORWARD) -> tuple[str, ...]:
        """The classes of the layers that are read at a place."""
        return (self.mixer_class if place == MIXER else ()) or self.layer_class

    def is_layer(self, module: Any, place: str = FEED_FORWARD) -> bool:
        """Whether a live module is one of its layers."""
        return not {type(module).__name__, full_name(type(module))}.isdisjoint(self.classes(place))


def full_name(cls: type) -> str:
    """'package.module.Class'.

    >>> full_name(StatePoint)
    'architectures.registry.StatePoint'
    """
    return f"{cls.__module__}.{cls.__qualname__}"


_REGISTERED: dict[str, Architecture] = {}


def register(
    name: str,
    *,
    layer_class: str | type | tuple[str | type, ...],
    model_types: tuple[str, ...] = (),
    topology: str = "sequential",
    feed_forward: str = "feed-forward",
    **options: Any,
) -> Callable[[Build], Build]:
    """Decorator that registers the builder of a family's block.

    ``layer_class`` is the class of a layer, or its name.  ``model_types`` are the ``config.model_type`` values it
    reads (``name`` if none is given); a model without a config is recognised by its layer classes, and one with
    layers of a class that was given as such always is.  ``options`` are the fields of ``Architecture``.
    Raises ``BadInput`` when the name or one of the model types is taken.

    >>> from controllability.components import residual
    >>> @register("toy", layer_class="ToyLayer", topology="residual", feed_forward="linear")
    ... def toy(view):
    ...     return residual(view.linear("mix", "d", "d"))
    >>> block("toy", d=4).width
    4
    >>> unregister("toy")
    """
    model_types = model_types or (name,)
    given = layer_class if isinstance(layer_class, tuple) else (layer_class,)
    classes = tuple(full_name(c) if isinstance(c, type) else c for c in given)

    def decorate(build: Build) -> Build:
        add(Architecture(name, model_types, classes, topology, feed_forward, build, **options))
        return build

    _refuse_taken(name, model_types)
    return decorate


def add(architecture: Architecture) -> None:
    """Register an architecture that is written out.  Raises ``BadInput`` when a name is taken."""
    _refuse_taken(architecture.name, architecture.model_types)
    _REGISTERED[architecture.name] = architecture


def _refuse_taken(name: str, model_types: tuple[str, ...]) -> None:
    taken = {t: a.name for a in _REGISTERED.values() for t in (*a.model_types, a.name)}
    if name in _REGISTERED:
        raise BadInput(
            f"architecture {name!r} is registered already: take another name, or architectures.unregister({name!r}) first"
        )
    for model_type in dict.fromkeys((name, *model_types)):
        if model_type in taken:
            raise BadInput(
                f"model type {model_type!r} is registered already, by architecture {taken[model_type]!r}: "
                f"architectures.unregister({taken[model_type]!r}) makes room"
            )


def unregister(name: str) -> None:
    """Forget an architecture (for tests and notebooks)."""
    plugins.load_once(_REGISTERED)  # else a plug-in's would come back
    _REGISTERED.pop(name, None)


def names() -> list[str]:
    """The registered architectures, those that are refused by name included.

    >>> "gemma3" in names()
    True
    """
    plugins.load_once(_REGISTERED)
    return sorted(_REGISTERED)


def find(name: str) -> Architecture:
    """The architecture called ``name``, or that reads the model type ``name``.

    Raises ``BadInput`` with the names close to it, and the plug-ins that could not be loaded.
    """
    plugins.load_once(_REGISTERED)
    for architecture in _REGISTERED.values():
        if name == architecture.name or name in architecture.model_types:
            return architecture
    from difflib import get_close_matches

    close = get_close_matches(str(name).lower(), names(), 3)
    near = f"; close to it: {', '.join(close)}" if close else ""
    raise BadInput(
        f"unknown architecture or model type {name!r}{near}; `controllability list` shows all {len(names())}, "
        "architectures.register adds one"
        + "".join(f"; the plug-in {who} could not be loaded: {why}" for who, why in plugins.failed().items())
    )


def by_layers(classes: set[str]) -> Architecture | None:
    """The architecture one of whose layer classes is among ``classes``, the last registered first.

    For models without a model type.  What a user registers comes after what is built in, so a class called
    ``Block`` is theirs and not openai-gpt's.
    """
    plugins.load_once(_REGISTERED)
    return next((a for a in reversed(_REGISTERED.values()) if classes & set(a.layer_class)), None)


def block(name: str, place: str | None = None, **sizes: Any) -> Component:
    """The abstract block expression of a family; parameters are named as inside one layer.

    ``place`` says which half takes the patch: "feed-forward", or "mixer", the map behind what mixes positions; by default the first
    that the family has.  ``sizes`` sets ``d``, ``h``, … to numbers; ``eps`` and other settings may be given as well.  Raises
    ``NotControllable`` for a family that is refused by name, or does not have that place.

    >>> sorted(map(str, block("gemma3").parameters()))[:2]
    ['mlp.down_proj.weight', 'mlp.gate_proj.weight']
    """
    architecture = find(name)
    build = architecture.builders(architecture.place(place))[-1]
    known = set(architecture.defaults) | {"eps", "activation"}
    asked: set[str] = set()
    settings = architecture.defaults | {k: v for k, v in sizes.items() if k in known}
    shape = {k: v for k, v in sizes.items() if k not in known}
    built = build(View("", _Noting(shape, asked), settings))
    if unknown := sorted(set(shape) - asked - {*"dhElrm"}):
        raise BadInput(
            f"architecture {architecture.name!r} has no size {unknown[0]}; it has {', '.join(sorted(asked))}"
        )
    if not isinstance(built, Component):
        raise BadInput(
            f"architecture {architecture.name!r} builds no abstract block: its builder returned {_kind(built)}; "
            "without a live layer it must return a component (its defaults say how)"
        )
    return built


class _Noting(dict[str, Any]):
    """Sizes, and which of them a builder asked for."""

    def __init__(self, sizes: Mapping[str, Any], asked: set[str]) -> None:
        super().__init__(sizes)
        self.asked = asked

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
