"""How PEFT would reach one patched parameter: what a saved patch remembers for an export without the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["module", "parameter", "dense", "none"]


@dataclass(frozen=True)
class Form:
    """How PEFT reaches one parameter.

    ``kind`` says by which list of the config; "none" comes with a reason ``why``.  ``shape`` is that of the stored
    parameter, ``swapped`` that lora_A holds its rows and lora_B its columns, ``key`` the module's name in an adapter file.
    """

    kind: Kind
    shape: tuple[int, ...]
    swapped: bool = False
    key: str = ""
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Form:
        """What ``to_dict`` gave."""
        fields: dict[str, Any] = data | {"shape": tuple(data["shape"])}
        return Form(**fields)
