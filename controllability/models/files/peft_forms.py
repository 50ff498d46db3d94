"""How PEFT reaches each patched parameter: a LoRA beside a module, a LoRA on a parameter, a whole module, or not.

Everything that PEFT 0.21 does differently from one module to the next is said here, once:

- ``target_modules`` wraps a ``Linear`` or ``Conv1D`` and adds B A x to its output, so the module's forward must be theirs;
- ``target_parameters`` wraps the module that holds a 2-D or 3-D parameter and adds the dense ΔW while it runs.  Wrappers
  nest, the parameter registered last outermost, and each adds ``.base_layer`` to the names inside;
- stacked experts keep lora_A expert by expert, (experts · rank, ·), and lora_B rank by rank, (·, rank · experts).
  Which of the two sides of the stored matrices goes into A hangs on the module's ``is_transposed``;
- vectors have no LoRA form: ``modules_to_save`` keeps a copy of the whole module;
- names are matched by their ends.
"""

from collections.abc import Iterable

from torch import nn

from controllability.deltas import Shift
from controllability.models.patches.applier import Entry
from controllability.models.patches.record import Form
from controllability.models.transformers_parts import is_conv1d

# PEFT takes these for the per-expert matrices of transformers 4, in models whose experts are stacked now
TAKEN_FOR_EXPERTS = ("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


def forms_of(model: nn.Module, entries: Iterable[Entry]) -> dict[str, Form]:
    """Parameter name -> its form, for every parameter that the entries move.

    >>> import torch
    >>> from controllability.deltas import LowRank
    >>> from controllability.interfaces import Param
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> forms_of(model, [Entry(Param("0.weight"), LowRank(torch.ones(1, 2), torch.ones(1, 3)))])["0.weight"].kind
    'module'
    """
    entries = list(entries)
    names = list(dict.fromkeys(entry.param.name for entry in entries))
    whole = {e.module for e in entries if isinstance(e.delta, Shift) or len(_shape(model, e.param.name)) not in (2, 3)}
    stacked = any(parameter.ndim > 2 for parameter in model.parameters())
    found = {name: _form(model, name, whole, stacked) for name in names}
    return {name: _named(model, name, form, found) for name, form in found.items()}


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if attribute == "weight" and plain_linear(module) == "out_in":  # weights of 4 bits are packed
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    stored = module._parameters.get(attribute)
    return () if stored is None else tuple(stored.shape)


def _form(model: nn.Module, name: str, whole: set[str], stacked: bool) -> Form:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    shape = _shape(model, name)
    if why := _unreachable(model, path, module, attribute):
        return Form("none", shape, why=why)
    if path in whole:
        within = next((n for n, _ in module.named_children()), None)
        why = f"a vector in module {path}, which holds others ({within}, …): PEFT could only save all of them"
        return Form("dense", shape) if within is None else Form("none", shape, why=why)
    plain = plain_linear(module)
    if plain and attribute == "weight" and not (stacked and path.rpartition(".")[2] in TAKEN_FOR_EXPERTS):
        return Form("module", shape, swapped=plain == "in_out")
    return Form("parameter", shape, swapped=len(shape) == 3 and bool(getattr(module, "is_transposed", False)))


def plain_linear(module: nn.Module) -> str:
    """How a module stores the matrix of y = W x + b, if that is all it does: 'out_in', 'in_out', or ''."""
    forward = type(module).forward
    quantised = type(module).__module__.startswith("bitsandbytes.")  # the same map from packed weights
    if isinstance(module, nn.Linear) and (quantised or forward is nn.Linear.forward):
        return "out_in"
    return "in_out" if is_conv1d(module) else ""


def _unreachable(model: nn.Module, path: str, module: nn.Module, attribute: str) -> str:
    if module._parameters.get(attribute) is None:
        return "it is no parameter of its module, and PEFT reaches nothing else"
    if not path:
        return "it lies in the model itself, which PEFT cannot wrap"
    names = [name for name, other in model.named_modules(remove_duplicate=False) if other is module and name != path]
    if names:
        return f"module {path} is also {names[0]}, and PEFT would reach one of them only"
    alike = [name for name, _ in model.named_modules() if name.endswith(f".{path}")]
    if alike:
        return f"PEFT matches names by their ends and would also reach module {alike[0]}"
    return ""


def _named(model: nn.Module, name: str, form: Form, forms: dict[str, Form]) -> Form:
    """The form with its key: each wrapper around a module adds '.base_layer' to what is inside it."""
    path, _, attribute = name.rpartition(".")
    wrapped = [other.rpartition(".")[::2] for other, f in forms.items() if f.kind == "parameter"]
    key, walked = "", ""
    for part in path.split("."):
        key = f"{key}.{part}" if key else part
        walked = f"{walked}.{part}" if walked else part
        if walked != path:
            key += ".base_layer" * sum(owner == walked for owner, _ in wrapped)
    if form.kind == "parameter":
        order = list(model.get_submodule(path)._parameters)
        later = [a for owner, a in wrapped if owner == path and order.index(a) > order.index(attribute)]
        key += ".base_layer" * len(later)
    return Form(form.kind, form.shape, form.swapped, key, form.why)
