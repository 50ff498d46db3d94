"""What a builder sees of one layer: parameter names, sizes, settings; the live module if there is one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from controllability.components import (
    XIELU,
    Activation,
    Bias,
    ExpertLinear,
    Fixed,
    Gate,
    Linear,
    Normalize,
    Sequence,
    Sum,
    Times,
    layer_norm,
    rms_norm,
)
from controllability.components.activation import FORMULAS
from controllability.errors import ReadingError
from controllability.interfaces import Component, Param

# transformers' names of activations -> ours, where they differ
ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh", "swish": "silu", "linear": "identity",
    "relu_squared": "relu2",
}  # fmt: skip
LEARNED = {"xielu": "XIELUActivation", "prelu": "PReLU"}  # activations with parameters -> the class of their modules
ACTIVATION_KEYS = (
    "hidden_act", "hidden_activation", "activation_function", "activation", "mlp_hidden_act", "ffn_activation",
    "dense_act_fn", "afn",
)  # fmt: skip


@dataclass(frozen=True)
class View:
    """One layer as a builder sees it.

    An abstract block has an empty prefix, sizes named "d" and "h", and its architecture's ``settings``;
    on a live model the prefix is the layer's module name, and what the live modules show (biases,
    storage, ε) is read from them, other settings from the ``config``.
    """

    prefix: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    layer: Any = None
    config: Any = None
    index: int = 0
    sites: dict[str, Any] = field(default_factory=dict)  # how live modules are tapped, where it is special
    parent: Any = None  # the module two levels above the layer, for models without layer modules

    # ------------------------------------------------------------------------------- looking around

    @property
    def live(self) -> bool:
        """Whether this is a layer of a live model."""
        return self.layer is not None

    def get(self, name: str) -> Any:
        """The live module, parameter or buffer called ``name`` inside the layer; None if there is none."""
        found = self.layer
        for part in name.split(".") if name else ():
            found = getattr(found, part, None)
            if found is None:
                return None
        return found

    def has(self, name: str, default: bool = False) -> bool:
        """Whether the layer has ``name``; abstract blocks say so in their setting ``has``, or take the default."""
        if self.live:
            return self.get(name) is not None
        return name in self.settings.get("has", ()) or (default and name not in self.settings.get("lacks", ()))

    def setting(self, *keys: str, default: Any = None) -> Any:
        """The first of these that the config (or the abstract block's settings) has."""
        for key in keys:
            value = self.settings.get(key)
            if self.live and key not in self.settings:
                value = getattr(self.config, key, None)
            if value is not None:
                return value
        return default

    def size(self, name: str) -> int | str:
        """A number where one was given, else the name itself; "2h" is twice h, and "E+1" one more than E."""
        stem = name.lstrip("0123456789").removesuffix("+1")
        number = self.sizes.get(stem, stem)
        if stem in ("", name) or not isinstance(number, int):
            return int(name) if not stem else self.sizes.get(name, name)
        return int(name[: name.index(stem)] or 1) * number + name.endswith("+1")

    # ------------------------------------------------------------------------------------ components

    def param(self, name: str, *shape: str) -> Param:
        """A parameter or buffer of this layer, by its name inside it; ``shape`` names its sizes, one for each axis.

        >>> view = View("layers.0.", sizes={"d": 16})
        >>> view.param("mlp.gain", "d", "h")
        Param(name='layers.0.mlp.gain', shape=(16, 'h'), index=())
        """
        return Param(self.prefix + name, tuple(self.size(s) for s in shape))

    def linear(self, module: str, out: str, into: str, bias: bool = False) -> Linear:
        """A linear map under the layer: ``{module}.weight``, maybe ``{module}.bias``.

        On a live model the bias is there if the module has one, and Conv1D stores (in, out); on an
        abstract block ``bias`` and the setting ``bias`` say so.
        """
        conv = type(self.get(module)).__name__ == "Conv1D" if self.live else bool(self.settings.get("conv1d"))
        has_bias = self.has(f"{module}.bias", default=bias or bool(self.settings.get("bias")))
        weight = self.param(f"{module}.weight", *((into, out) if conv else (out, into)))
        return Linear(weight, self.param(f"{module}.bias", out) if has_bias else None, "in_out" if conv else "out_in")

    def router(self, module: str, weight: str = "weight", bias: str = "bias") -> Linear:
        """A router's linear map d → E, computed inside a module that goes on to choose: tapped at its weight."""
        has_bias = self.has(f"{module}.{bias}")
        if weight == "weight" and type(self.get(module)).__name__ != "Linear":
            self.sites[self.prefix + module] = "weight"
        return Linear(
            self.param(f"{module}.{weight}", "E", "d"), self.param(f"{module}.{bias}", "E") if has_bias else None
        )

    def experts(
        self, name: str, out: str, into: str, transposed: bool = False, stacked: int | None = None
    ) -> ExpertLinear:
        """Stacked experts' matrices ``name`` and, if the model has it, ``{name}_bias``."""
        shape = ("E", into, out) if transposed else ("E", out, into)
        bias = self.param(f"{name}_bias", "E", out) if self.has(f"{name}_bias") else None
        return ExpertLinear(self.param(name, *shape), bias, "in_out" if transposed else "out_in", stacked)

    def rms_norm(self, module: str, offset: int = 0, size: str = "d") -> Sequence:
        """RMSNorm under the layer; on a live model its bias is there if the module has one."""
        norm = rms_norm(self.prefix + module, self.size(size), self.eps(module, 1e-6), offset)
        return norm >> Bias(self.param(f"{module}.bias", size)) if self.has(f"{module}.bias") else norm

    def layer_norm(self, module: str, bias: bool = True, offset: int = 0, size: str = "d") -> Sequence:
        """LayerNorm under the layer; on a live model its bias is there if the module has one."""
        has_bias = self.has(f"{module}.bias", default=bias)
        return layer_norm(self.prefix + module, self.size(size), self.eps(module, 1e-5), offset, has_bias)

    def bare_norm(self, module: str, kind: Any = "rms") -> Normalize:
        """A normalisation without parameters."""
        return Normalize(kind, self.eps(module, 1e-5), self.prefix + module)

    def eps(self, module: str, default: float) -> Any:
        """ε as the live module holds it, else the setting ``eps``, else the default."""
        if self.live:
            held = self.get(module)
            for attribute in ("variance_epsilon", "eps", "epsilon", "norm_eps"):
                value = getattr(held, attribute, None)
                if isinstance(value, int | float):
                    return value
        return self.settings.get("eps", default)

    def activation(
        self, *keys: str, default: str = "silu", module: str = "mlp.act_fn", renamed: Any = None
    ) -> Component:
        """The activation that the config names under one of ``keys``.

        Raises ``ReadingError`` for one that is not known.
        """
        name = self.setting("activation", *keys, *ACTIVATION_KEYS, default=default)
        if isinstance(name, Component):
            return name
        name = (renamed or {}).get(name, name)
        name = ACTIVATIONS.get(str(name), str(name))
        if name in LEARNED:
            return self._learned(name, module)
        if name not in FORMULAS:
            known = ", ".join(sorted({*ACTIVATIONS, *FORMULAS, *LEARNED}))
            raise ReadingError(f"activation {name!r} is not declared: known are {known}")
        return Activation(name)

    def _learned(self, name: str, module: str) -> Component:
        """An activation with parameters; its module is found by its class, the one beside ``module`` if there are several."""
        classes = {n: type(m).__name__ for n, m in self.layer.named_modules()} if self.live else {}
        found = [n for n, c in classes.items() if c == LEARNED[name]]
        beside = [n for n in found if n.rpartition(".")[0] == module.rpartition(".")[0]]
        where = (beside or found or [module])[0]
        if name == "xielu":
            return XIELU(*(self.param(f"{where}.{p}", "one") for p in ("alpha_p", "alpha_n", "beta", "eps")))
        self.sites[self.prefix + where] = "skip"  # relu(x) − a relu(−x), a learned
        relu, slope = Activation("relu"), Gate(self.param(f"{where}.weight", "one"))
        return Fixed(Sum((relu, Times(-1) >> relu >> slope >> Times(-1))))
