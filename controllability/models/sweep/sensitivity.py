"""How much a small disturbance grows on its way to the logits: plain numbers, ready for JSON and texts.  (new)"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

FRAGILE = 20.0  # ratio above which a patch is exact where it was made and fragile elsewhere
ROUNDINGS = 4.0  # unit roundoffs by which one layer's state is off, in a run that rounds otherwise


@dataclass(frozen=True)
class Sensitivity:
    """The relative change of the logits at the patched positions over that of all states, with the patch and without.

    Every entry of the input and of every layer's state is disturbed at once, by the same small relative amount and
    independently: what another kernel, a cache, a merge or a coarser dtype does.  ``note`` says why there are no numbers.
    """

    patched: float | None
    plain: float | None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How much more the patched model magnifies than the plain one."""
        return self.patched / self.plain if self.patched is not None and self.plain else None

    @property
    def fragile(self) -> bool:
        """Whether the patch is exact here and fragile elsewhere."""
        return self.ratio is not None and self.ratio > FRAGILE

    def expected(self, dtype: torch.dtype) -> float | None:
        """The relative error of the logits to expect of a run that rounds to ``dtype`` in its own way."""
        return None if self.patched is None else self.patched * ROUNDINGS * torch.finfo(dtype).eps / 2

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: ``patched``, ``plain``, ``ratio``, and ``note`` where there is one."""
        numbers = {"patched": self.patched, "plain": self.plain, "ratio": self.ratio}
        return numbers | ({"note": self.note} if self.note else {})

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Sensitivity":
        """What ``to_dict`` gave."""
        return Sensitivity(**{name: data[name] for name in asdict(Sensitivity(None, None)) if name in data})

    def __str__(self) -> str:
        if self.patched is None:
            return f"sensitivity: not measured ({self.note})"
        told = f"sensitivity: a small disturbance grows {self.patched:.2g} times with the patch, {self.plain:.2g} times without"
        return told + ("; exact here, fragile elsewhere" if self.fragile else "")
