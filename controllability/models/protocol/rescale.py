"""A copy of a model that fits into float16: the same function, its states divided by a power of two.  (new)"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from controllability.arrays import relative_error
from controllability.errors import BadInput
from controllability.models.hooks.installation import HookStack, first_tensor
from controllability.models.reading.checked_reading import known_reading
from controllability.models.reading.logits import result_of
from controllability.models.reading.tolerances import VERIFIED

HEADROOM = 4  # how many times larger the states of later tokens may be


@torch.no_grad()
def rescaled(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype = torch.float16) -> tuple[nn.Module, int]:
    """(a copy in ``dtype``, s): states are divided by s, the least power of two with which those of ``inputs`` fit.

    For models whose layers add to the state only what a norm with a scale gives, as Gemma 2 and 3: the embedding and those
    scales are divided by s, ε of the norms that read the state by s².  ``model`` (float32) is left as it was.  Raises
    ``BadInput`` where that would be another function.

    >>> from controllability.models.loading import load_model
    >>> model, tokenizer = load_model("embedded")
    >>> half, s = rescaled(model, tokenizer("Where does Mia live ?", return_tensors="pt"))
    >>> half.dtype, s
    (torch.float16, 1)
    """
    copied: Any = copy.deepcopy(model)
    largest, adding, reading = _norms(copied, inputs)
    s = 2 ** max(0, math.ceil(math.log2(HEADROOM * largest / torch.finfo(dtype).max)))
    if s > 1:
        wanted = result_of(model(**inputs))
        for norm in adding:
            zeros = torch.zeros_like(norm.weight)  # with them, a norm that stores its scale minus one still gives one
            offset = round(float(functional_call(norm, {"weight": zeros}, zeros + 1).mean()))
            norm.weight.copy_((offset + norm.weight) / s - offset)
        for norm in reading:
            vars(norm).update({k: v / s**2 for k, v in vars(norm).items() if k in ("eps", "variance_epsilon")})
        embedding, head = copied.get_input_embeddings(), copied.get_output_embeddings()
        scale = getattr(embedding, "embed_scale", None)
        if scale is None and head is not None and head.weight is embedding.weight:
            head.weight = nn.Parameter(head.weight.clone())
        (embedding.weight if scale is None else scale).div_(s)
        if not (error := relative_error(result_of(copied(**inputs)), wanted)) <= VERIFIED[torch.float32]:
            raise BadInput(
                f"{type(model).__name__} cannot be rescaled: its layers add more to the state than what norms with a scale give, "
                f"and with those divided by {s} the logits are off by {error:.2g} (relative); nothing was changed"
            )
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(dtype)
    return copied, s


def _norms(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[float, set[Any], set[Any]]:
    """The largest entry of a state, the norms whose outputs are added to the state, and those that read it."""
    layers = [model.get_submodule(layer.name) for layer in known_reading(model).layers]
    adding, reading, sizes, state = set[nn.Module](), set[nn.Module](), [1.0], [torch.empty(0)]

    def normed(norm: nn.Module, x: Tensor, y: Tensor) -> None:
        if torch.equal(x, state[-1]):
            reading.add(norm)
        else:
            adding.add(norm)
            state.append(state.pop() + y)

    with HookStack() as hooks:
        for layer in layers:
            hooks.before(layer, lambda x: state.append(x))
            hooks.after(layer, lambda _, y: sizes.append(float(first_tensor(y).abs().max())))
            for norm in layer.children():
                if [name for name, _ in norm.named_parameters()] == ["weight"] and norm.weight.ndim == 1:
                    hooks.after(norm, lambda x, y, norm=norm: normed(norm, x, y))
        model(**inputs)
    inside, kinds = {m for layer in layers for m in layer.modules()}, tuple({type(norm) for norm in reading})
    last = {module for module in model.modules() if module not in inside and isinstance(module, kinds)}
    return min(max(sizes), torch.finfo(torch.float32).max / HEADROOM), adding, reading | last
