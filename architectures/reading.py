"""Reading a live model into block expressions, its parameters bound without copying."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from architectures import quantised
from architectures.registry import FEED_FORWARD, MIXER, Architecture, Build, StatePoint, by_layers, find, full_name
from architectures.taps import Tap as Tap, taps as taps
from architectures.view import View
from architectures.widths import misfits
from controllability.arrays import Array
from controllability.arrays.one_line import OneLine
from controllability.errors import BadInput, NotControllable, ReadingError
from controllability.interfaces import Component, Layout, OutputControllable, Param, Path, leaves, node


class LiveParams(Mapping[str, Array]):
    """Parameter or buffer name -> the tensor that the live module holds right now.

    No copy is made, but of the quantised ones: for those it is the numbers that they stand for, computed anew each
    time.  ``quantised`` are their names.
    """

    def __init__(self, model: Any, params: frozenset[Param]) -> None:
        self._where: dict[str, tuple[Any, str]] = {}
        self.quantised: frozenset[str] = frozenset()
        problems = []
        for param in sorted(params, key=str):
            path, _, attribute = param.name.rpartition(".")
            try:
                module = model.get_submodule(path)
            except AttributeError:
                problems.append(_absent(model, param.name))
                continue
            refuse_quantised(path, module, attribute)
            held = module._parameters.get(attribute, module._buffers.get(attribute))
            if held is None:
                problems.append(_absent(model, param.name))
                continue
            if quantised.kind(held):
                self.quantised |= {param.name}
            if problem := _misshapen(param, quantised.shape(held)):
                problems.append(problem)
            self._where[param.name] = (module, attribute)
        if problems:
            raise ReadingError(f"{'; '.join(problems)}: its layers are not what was registered")

    def __getitem__(self, name: str) -> Array:
        module, attribute = self._where[name]
        held = module._parameters.get(attribute)
        held = held if held is not None else module._buffers[attribute]
        if name in self.quantised:
            return quantised.dequantised(module, held, name)
        return getattr(held, "stored", held).detach()  # a weight that is listened to: the one behind it

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shaped(self) -> dict[str, Array]:
        """Every name with an array of which only the shape counts: no quantised weight is dequantised for it."""
        stand_ins = {}
        for name in self.quantised:
            module, attribute = self._where[name]
            stand_ins[name] = quantised.stand_in(module._parameters[attribute])
        return {name: stand_ins[name] if name in stand_ins else self[name] for name in self}

    @property
    def dtypes(self) -> set[Any]:
        """The types of the numbers that the layer computes with; no quantised weight is dequantised for it."""
        held = [(module._parameters.get(a), module._buffers.get(a)) for module, a in self._where.values()]
        return {quantised.dtype(value if value is not None else buffer) for value, buffer in held}

    def holder(self, name: str) -> tuple[Any, str]:
        """The module that holds a parameter, and its attribute name there."""
        return self._where[name]


def _absent(model: Any, name: str) -> str:
    """'the model has no parameter …', and the one that may be meant."""
    held = [n for n, _ in (*model.named_parameters(), *model.named_buffers()) if n.count(".") == name.count(".")]
    close = get_close_matches(name, held, 1, 0.8)
    return f"the model has no parameter {name}" + (f" (close to it: {close[0]})" if close else "")


def _misshapen(param: Param, shape: tuple[int, ...]) -> str:
    """What is wrong with a shape, as far as it can be said of one parameter alone."""
    if not param.shape or param.index or (not shape and param.shape == ("one",)):
        return ""
    if len(shape) != len(param.shape):
        return f"{param.name} has shape {shape}, declared with {len(param.shape)} axes ({', '.join(map(str, param.shape))})"
    if any(isinstance(wanted, int) and wanted != n for wanted, n in zip(param.shape, shape, strict=True)):
        return f"{param.name} has shape {shape}, declared ({', '.join(map(str, param.shape))})"
    return ""


def refuse_quantised(path: str, module: Any, attribute: str) -> None:
    """Raise ``BadInput`` for a module that holds its weights as small integers or packed numbers of an unknown kind."""
    held = {n: t for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    if attribute in held and quantised.kind(held[attribute]):
        return
    packed = [n for n, t in held.items() if quantised.packed(t) and not quantised.kind(t)]
    if attribute not in held:  # packed into wider integers under another name, or kept behind a method
        packed += [n for n, t in held.items() if t.ndim > 1 and not t.is_floating_point()]
    if packed:
        what = f"parameter {path}.{packed[0]} is {held[packed[0]].dtype}"
    elif inspect.ismethod(getattr(module, attribute, None)):
        what = f"module {path} is a {full_name(type(module))}"
    else:
        return
    raise BadInput(
        f"{what}: quantised parameters cannot be patched; load the model unquantised, or dequantise it. Of the quantised "
        "layers, linear ones of torchao and bitsandbytes can be patched as they are. Nothing was changed"
    )


@dataclass(frozen=True, eq=False, repr=False)
class Layer(OneLine):
    """One layer of a live model: its block expression, bound parameters, and where to look.

    ``inputs`` and ``output`` name modules by their full names; ``index`` counts the halves that take a patch: those of
    the reading's place.
    """

    index: int
    name: str
    block: Component
    params: LiveParams
    taps: tuple[Tap, ...]
    inputs: tuple[StatePoint, ...]
    output: StatePoint
    experts: Mapping[Path, str] = field(default_factory=dict)  # the module that runs the experts of a mixture
    final: bool = False  # whether nothing behind it makes good what it misses, though it is not the last

    @property
    def end(self) -> str:
        """The module with which the block is over: the layer, or what shows the output behind it."""
        return self.name if f"{self.output.module}.".startswith(f"{self.name}.") else self.output.module


@dataclass(frozen=True, eq=False, repr=False)
class Reading(OneLine):
    """A live model read at a place: its architecture and one ``Layer`` for each half there, in the order of the model."""

    architecture: Architecture
    layers: tuple[Layer, ...]
    config: Any
    place: str = FEED_FORWARD


def architecture_of(model: Any) -> Architecture:
    """The registered architecture of a live model.

    By a layer class that was registered itself; else by its model type or its text model's; for a model without
    one by the names of its layer classes.  Raises ``BadInput`` when nothing fits.
    """
    classes = {type(m) for m in model.modules()}
    if found := by_layers({full_name(c) for c in classes}):
        return found
    config = getattr(model, "config", None)
    kinds = [getattr(config, "model_type", None)]
    if config is not None and hasattr(config, "get_text_config"):
        kinds.append(getattr(config.get_text_config(), "model_type", None))
    problem: BadInput | None = None
    for kind in dict.fromkeys(k for k in kinds if k):
        try:
            return find(kind)
        except BadInput as unknown:
            problem = problem or unknown
    if not problem and (found := by_layers({c.__name__ for c in classes})):
        return found
    raise problem or BadInput(
        f"{type(model).__name__} has no config.model_type, and no registered layer class is in it: "
        "register it with architectures.register(name, layer_class=...)"
    )


def read(model: Any, place: str | None = None) -> Reading:
    """Read a live model: ``.layers``, each with ``.block`` and ``.params``.

    ``place`` says which halves: "feed-forward", "mixer", or by default the first that the family has.
    Nothing is copied.  The reading is not trusted before ``controllability.models`` has compared it
    with the real modules on random input.  Raises ``BadInput`` when the model's type is not registered,
    ``NotControllable`` when it is refused by name, and ``ReadingError`` when its modules are not what the
    registered family has.
    """
    architecture = architecture_of(model)
    place = architecture.place(place)
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    if architecture.under and text is not None and getattr(config, "is_encoder_decoder", False):
        text = config
    under = f".{architecture.under}." if architecture.under else ""
    found = [(n, m) for n, m in model.named_modules() if architecture.is_layer(m, place) and under in f".{n}."]
    if not found:
        wanted = " or ".join(architecture.classes(place))
        raise ReadingError(f"{architecture.name}: no module of class {wanted} in {type(model).__name__}")
    if not found[0][0]:
        raise ReadingError(
            f"{architecture.name}: the model is itself a {type(model).__name__}, which was registered as a layer: "
            "pass the model whose layers are of that class"
        )
    layers: list[Layer] = []
    last: tuple[str, Component | None] = ("", None)
    for position, (name, module) in enumerate(found):
        around = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
        for build in architecture.builders(place):
            view = View(f"{name}.", {}, {}, module, text, position, parent=around)
            built = _built(architecture, build, name, view)
            last = (name, built)
            if built is not None:
                if place == MIXER and "output" not in view.sites:
                    view.sites["output"] = _behind_mixer(model, architecture, name, replace(view, sites={}))
                layers.append(_layer(model, architecture, len(layers), name, built, view))
    if place == FEED_FORWARD and layers and architecture.tail is not None:
        layers[-1] = replace(layers[-1], final=True)
        layers += _tail(model, architecture, len(layers), found[-1][0], text)
    if place == FEED_FORWARD and layers and last[1] is None:
        raise NotControllable(
            f"{architecture.name}: layer {last[0]} ({type(model.get_submodule(last[0])).__name__})",
            "it mixes positions after the last feed-forward half, and nothing after it can make up for the context",
            "end the model with a layer that has a feed-forward half", f"a live {type(model).__name__}",
        )  # fmt: skip
    if not layers:
        half = "map behind what mixes positions" if place == MIXER else "feed-forward half"
        raise ReadingError(
            f"{architecture.name}: none of its {len(found)} layers has a {half} (its builder returned None)"
        )
    return Reading(architecture, tuple(layers), text, place)


def _built(architecture: Architecture, build: Build, name: str, view: View) -> Component | None:
    try:
        built = build(view)
    except (AttributeError, KeyError, TypeError) as missing:
        raise ReadingError(f"{architecture.name}: layer {name} is not what was declared: {missing}") from missing
    if not isinstance(built, Component | None):
        raise ReadingError(f"{architecture.name}: the builder of layer {name} returned a {type(built).__name__}")
    return built


def _behind_mixer(model: Any, architecture: Architecture, name: str, view: View) -> StatePoint:
    """Where the mixer's half ends: what the feed-forward half behind it reads, or the layer's output."""
    block = None if architecture.build is None else _built(architecture, architecture.build, name, view)
    if block is None:
        return StatePoint("", "after")
    wanted = view.sites.get("inputs") or architecture.inputs
    return (wanted or _default_inputs(name, block, taps(block, view.sites)))[0]


def _tail(model: Any, architecture: Architecture, index: int, last: str, config: Any) -> list[Layer]:
    """The blocks behind the layers, each a module of its own that shows its input and its output."""
    assert architecture.tail is not None
    around = last.rpartition(".")[0].rpartition(".")[0]
    view = View(f"{around}." if around else "", {}, {}, model.get_submodule(around), config)
    own = {"inputs": (StatePoint(""),), "output": StatePoint("", "after")}
    blocks = architecture.tail(view).items()
    return [
        replace(_layer(model, architecture, index + i, view.prefix + name, block, replace(view, sites=own)), final=True)
        for i, (name, block) in enumerate(blocks)
    ]


def _layer(model: Any, architecture: Architecture, index: int, name: str, block: Component, view: View) -> Layer:
    params = LiveParams(model, block.parameters())
    if problems := misfits(block, params.shaped()):
        raise ReadingError(
            f"{architecture.name}: layer {name}: {'; '.join(problems)}: its layers are not what was registered"
        )
    found = taps(block, view.sites)
    _refuse_crowded(architecture, name, block, found)
    _refuse_quantised_stages(name, block, found, params)
    _refuse_unknown(model, architecture, name, block, found, params)
    wanted = view.sites.get("inputs") or architecture.inputs or _default_inputs(name, block, found)
    inputs = tuple(replace(s, module=_join(name, s.module)) for s in wanted)
    output = view.sites.get("output") or architecture.output or StatePoint("", "after")
    experts = {t.mixture: view.sites.get(f"{t.module}|experts", t.module) for t in found if t.mixture is not None}
    output = replace(output, module=_join(name, output.module))
    return Layer(index, name, block, params, found, inputs, output, experts)


def _join(layer: str, module: str) -> str:
    while module.startswith("../"):
        layer, module = layer.rpartition(".")[0], module[3:]
    return ".".join(part for part in (layer, module) if part)


def _default_inputs(name: str, block: Component, found: tuple[Tap, ...]) -> tuple[StatePoint, ...]:
    """The block's input is what the first module that reads it gets."""
    for tap in found:
        if reads_input(block, tap.inlet):
            inside = tap.module.removeprefix(f"{name}.")
            return (StatePoint(inside if tap.kind == "module" else inside.split(".")[0]),)
    raise ReadingError(
        f"layer {name}: no module reads the block's input as it is: say where it is seen, "
        "with inputs=(architectures.StatePoint(module),) in the registration"
    )


def reads_input(block: Component, path: Path) -> bool:
    """Whether the node at ``path`` gets the block's own input as it is."""
    layout = Layout.of(block)
    return not layout.around(path) and all(layout.source[path[:depth]] is None for depth in range(1, len(path) + 1))


def _refuse_crowded(architecture: Architecture, name: str, block: Component, found: tuple[Tap, ...]) -> None:
    """A module shows one input and one output: it can be one linear map or one norm, not several in turn."""
    inside: dict[str, dict[Param, Component]] = {}
    for tap in found:
        if tap.kind == "module":
            leaves_of = [node(block, path) for path in tap.paths]
            inside.setdefault(tap.module, {}).update({p: leaf for leaf in leaves_of for p in leaf.own_parameters()})
    for module, held in inside.items():
        parts = list(dict.fromkeys(held.values()))
        ways = [way for part in parts if isinstance(part, OutputControllable) for way in part.output_updates()]
        if len(parts) > 1 and any(way.kind == "linear" for way in ways):
            raise ReadingError(
                f"{architecture.name}: layer {name}: module {module} computes {' and '.join(p.describe() for p in parts)} "
                "in one forward, of which only what goes in and what comes out can be seen: give every linear map a "
                "module of its own (torch.nn.Linear)"
            )


def _refuse_quantised_stages(name: str, block: Component, found: tuple[Tap, ...], params: LiveParams) -> None:
    """What is seen at a weight inside a module, or computed by our own code, needs the weight as plain numbers."""
    for tap in found:
        own = [p.name for path in tap.paths for p in node(block, path).own_parameters()]
        if bad := [n for n in own if n in params.quantised and (tap.kind != "module" or len(tap.paths) > 1)]:
            what = (
                "experts in one tensor" if tap.mixture is not None else "a weight that is used inside a larger module"
            )
            raise BadInput(
                f"layer {name}: parameter {bad[0]} is quantised, and {what}: that cannot be patched, only linear layers of "
                "their own can; leave it out of the quantisation. Nothing was changed"
            )


def _refuse_unknown(
    model: Any, architecture: Architecture, name: str, block: Component, found: tuple[Tap, ...], params: LiveParams
) -> None:
    """Every parameter and buffer under the modules of the half must be in the expression; what mixes positions is no part of it."""
    roots, mixer = set(), any(leaf.mixes for _, leaf in leaves(block))
    for tap in found:
        inside = tap.module.removeprefix(f"{name}.")
        whole = (
            mixer or (tap.kind == "module" and len(tap.paths) > 1) or inside == tap.module
        )  # a norm, or behind the layer
        roots.add(tap.module if whole else _join(name, inside.split(".")[0]))
    unknown = []
    for root in sorted(roots):
        module = model.get_submodule(root)
        held = [*module.named_parameters(root), *module.named_buffers(root)]
        unknown += [
            n
            for n, _ in held
            if n not in params and not n.removeprefix(f"{name}.").startswith(architecture.ignored or ("\0",))
        ]
    if unknown:
        raise ReadingError(
            f"{architecture.name}: layer {name} has {', '.join(unknown)} in its feed-forward half, which the "
            "registered expression does not know: the family changed, or a switch is on that nobody declared"
        )
