"""What transformers does not promise to keep, all in one place: where it changed, one line names the versions that were tested."""

import copy
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from controllability.errors import BadInput

TESTED = "5.20 to 5.24"  # of transformers, by tests/versions.py: docs/versions.md

CACHE = ("past_key_values", "cache")  # what a forward calls its cache: the second from 5.24 on


def part(module: str, name: str = "") -> Any:
    """``name`` in ``transformers.MODULE``, or the module.  Raises ``BadInput`` with the tested versions where it is not there."""
    try:
        found = import_module(f"transformers.{module}")
        return getattr(found, name) if name else found
    except (ImportError, AttributeError):
        raise changed(f"{module}.{name}".rstrip(".")) from None


def changed(what: str) -> BadInput:
    """The error to raise where a part of transformers is missing, or is not what it was."""
    from transformers import __version__

    return BadInput(
        f"transformers {__version__} has no {what} as it was: tested with {TESTED}; install one of those. Nothing was changed"
    )


# --------------------------------------------------------------------------------------------------- experts


def is_fused(experts: nn.Module) -> bool:
    """Whether a module of experts looks its forward up by the name of an implementation."""
    return hasattr(experts, "_apply_gate") and hasattr(experts, "is_transposed")


def first_stage(experts: Any) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The name of the first matrices of fused experts, and what comes between them and the last ones."""
    return ("gate_up_proj", experts._apply_gate) if experts.has_gate else ("up_proj", experts.act_fn)


def implemented(config: Any, name: str, forward: Callable[..., Tensor]) -> Any:
    """A copy of the config of fused experts by which they compute with ``forward``, registered as ``name``."""
    functions = part("integrations.moe", "ALL_EXPERTS_FUNCTIONS")
    if name not in functions:
        functions.register(name, forward)
    own = copy.copy(config)
    vars(own)["_experts_implementation_internal"] = name
    if getattr(own, "_experts_implementation", "") != name:
        raise changed("config._experts_implementation")
    return own


def grouped_linear(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows (N, in) sorted by expert, weights (E, out, in), where each expert's rows end -> (N, out)."""
    return part("integrations.moe", "_grouped_linear")(rows, weights, ends)


# --------------------------------------------------------------------------------------- caches, modules, GGUF


def cache_of(inputs: Mapping[str, Any]) -> Any:
    """The cache among the inputs of a forward, whatever it is called; None where there is none."""
    return next((inputs[name] for name in CACHE if inputs.get(name) is not None), None)


def empty_cache(config: Any = None) -> Any:
    """A usual cache; without a config no layer of it forgets what left its window."""
    return part("cache_utils", "DynamicCache")(config=config)


def is_usual_cache(cache: Any) -> bool:
    """Whether a cache is the usual one, which grows as it is filled."""
    return type(cache) is part("cache_utils", "DynamicCache")


def is_plain_cache(cache: Any) -> bool:
    """Whether it is, and every layer of it keeps keys and values, a position each, and nothing else."""
    plain = part("cache_utils", "DynamicLayer"), part("cache_utils", "DynamicSlidingWindowLayer")
    return is_usual_cache(cache) and all(type(layer) in plain for layer in cache.layers)


def window_before(module: Any, cache: Any) -> Tensor | None:
    """What a short convolution keeps in its cache (B, d, K): the inputs before these; None where there are none."""
    if cache is None:
        return None
    if not hasattr(cache, "get_conv_state"):
        raise changed("cache.get_conv_state")
    return cache.get_conv_state(module.layer_idx, state_idx=module.conv_idx)


def hands_on_states(model: nn.Module) -> bool:
    """Whether a model keeps something else than keys and values from token to token, as far as it says."""
    return getattr(model, "_is_stateful", True) is not False


def after_step(model: Any, output: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options of the next step of a generation."""
    if not hasattr(model, "_update_model_kwargs_for_generation"):
        raise changed("model._update_model_kwargs_for_generation")
    return model._update_model_kwargs_for_generation(output, options)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear map, which stores (in, out), and computes as it does."""
    kind = part("pytorch_utils", "Conv1D")
    return isinstance(module, kind) and type(module).forward is kind.forward


def reports_misfits() -> bool:
    """Whether weights of another shape in a GGUF file are reported when it is loaded."""
    from transformers import __version__

    return tuple(map(int, __version__.split(".")[:2])) >= (5, 23)


def gguf_architectures() -> set[str]:
    """The architectures that transformers reads from GGUF, by the names in the files."""
    older = part("modeling_gguf_pytorch_utils", "GGUF_SUPPORTED_ARCHITECTURES")
    return {*older, *part("integrations.gguf.gguf_config_mapping", "GGUF_CONFIG_ARCHS")} - {"general", "tokenizer"}


def as_in_checkpoint(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors by the names, and in the layout, in which ``save_pretrained`` writes them: experts one by one, for instance."""
    if not isinstance(model, part("modeling_utils", "PreTrainedModel")):
        return tensors
    return part("core_model_loading", "revert_weight_conversion")(model, dict(tensors))
