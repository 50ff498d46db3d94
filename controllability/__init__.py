"""Context into weights, exactly, with a proof."""

from typing import TYPE_CHECKING, Any

from controllability.cli.name_clash import find_ours as _find_ours
from controllability.version import __version__ as __version__

_find_ours()

# Names are loaded on first use: `import controllability` loads neither torch, transformers nor SymPy.
_ROOMS = {
    "errors": "BadInput ControllabilityError ControllabilityWarning NotControllable NotExact NotVerified PatchError ReadingError SideConditionFailed",
    "interfaces": "Component Condition InputControllable OutputControllable Param",
    "execution.trace": "Trace",
    "execution.patch": "Patch",
    "execution.sampling": "sample",
    "verification.verify": "verify",
    "proof": "Proof prove",
    "models.loading": "encode load_model",
    "models": "ModelPatch diff exact_mode finalize_merges generate import_peft load_moments load_patch patch_model save_moments second_moments",
    "compiling": "compile_context export_servable further_questions",
    "instrument": "attribute dynamics read_survey survey",
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names.split()}
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "BadInput", "Component", "Condition", "ControllabilityError", "ControllabilityWarning", "InputControllable",
    "ModelPatch", "NotControllable",
    "NotExact", "NotVerified", "OutputControllable", "Param", "Patch", "PatchError", "Proof",
    "ReadingError", "SideConditionFailed", "Trace", "attribute", "compile_context", "diff", "dynamics", "encode", "exact_mode", "export_servable", "finalize_merges", "further_questions", "generate",
    "import_peft", "load_model", "load_moments", "load_patch", "patch_model", "prove", "read_survey", "sample", "save_moments", "second_moments",
    "survey", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'controllability' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"controllability.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if TYPE_CHECKING:
    from controllability.compiling import compile_context, export_servable, further_questions
    from controllability.errors import (
        BadInput,
        ControllabilityError,
        ControllabilityWarning,
        NotControllable,
        NotExact,
        NotVerified,
        PatchError,
        ReadingError,
        SideConditionFailed,
    )  # fmt: skip
    from controllability.execution.patch import Patch
    from controllability.execution.sampling import sample
    from controllability.execution.trace import Trace
    from controllability.instrument import attribute, dynamics, read_survey, survey
    from controllability.interfaces import Component, Condition, InputControllable, OutputControllable, Param
    from controllability.models import (
        ModelPatch,
        diff,
        exact_mode,
        finalize_merges,
        generate,
        import_peft,
        load_moments,
        load_patch,
        patch_model,
        save_moments,
        second_moments,
    )  # fmt: skip
    from controllability.models.loading import encode, load_model
    from controllability.proof import Proof, prove
    from controllability.verification.verify import verify
