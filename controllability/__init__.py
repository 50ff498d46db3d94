"""Context into weights, exactly, with a proof."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from controllability.version import __version__ as __version__

# Names are loaded on first use: `import controllability` loads neither torch, transformers nor SymPy.
_HOME = {
    "BadInput": "errors",
    "ControllabilityError": "errors",
    "NotControllable": "errors",
    "NotExact": "errors",
    "NotVerified": "errors",
    "PatchError": "errors",
    "ReadingError": "errors",
    "SideConditionFailed": "errors",
    "Component": "interfaces",
    "Condition": "interfaces",
    "InputControllable": "interfaces",
    "OutputControllable": "interfaces",
    "Param": "interfaces",
    "Trace": "execution.trace",
    "Patch": "execution.patch",
    "Proof": "proof",
    "prove": "proof",
    "verify": "verification.verify",
    "sample": "execution.sampling",
    "ModelPatch": "models",
    "compile_context": "compiling",
    "diff": "models",
    "exact_mode": "models",
    "generate": "models",
    "import_peft": "models",
    "load_patch": "models",
    "patch_model": "models",
}
__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'controllability' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"controllability.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]


if TYPE_CHECKING:
    from controllability.compiling import compile_context as compile_context
    from controllability.errors import BadInput as BadInput
    from controllability.errors import ControllabilityError as ControllabilityError
    from controllability.errors import NotControllable as NotControllable
    from controllability.errors import NotExact as NotExact
    from controllability.errors import NotVerified as NotVerified
    from controllability.errors import PatchError as PatchError
    from controllability.errors import ReadingError as ReadingError
    from controllability.errors import SideConditionFailed as SideConditionFailed
    from controllability.execution.patch import Patch as Patch
    from controllability.execution.sampling import sample as sample
    from controllability.execution.trace import Trace as Trace
    from controllability.interfaces import Component as Component
    from controllability.interfaces import Condition as Condition
    from controllability.interfaces import InputControllable as InputControllable
    from controllability.interfaces import OutputControllable as OutputControllable
    from controllability.interfaces import Param as Param
    from controllability.models import ModelPatch as ModelPatch
    from controllability.models import diff as diff
    from controllability.models import exact_mode as exact_mode
    from controllability.models import generate as generate
    from controllability.models import import_peft as import_peft
    from controllability.models import load_patch as load_patch
    from controllability.models import patch_model as patch_model
    from controllability.proof import Proof as Proof
    from controllability.proof import prove as prove
    from controllability.verification.verify import verify as verify
