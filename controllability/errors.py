"""Every error of the package.  Each says what was asked, what failed, the culprit, what to do."""

from __future__ import annotations


class ControllabilityError(Exception):
    """Base of all errors that the package raises on purpose."""


class BadInput(ControllabilityError, ValueError):
    """What was passed in cannot be used; nothing was changed."""


class NotControllable(ControllabilityError):
    """No derivation exists: the component can never be controlled this way.

    ``culprit`` is the smallest component that fails while its parts pass, ``reason`` says which
    rule failed on which argument, ``hint`` what would help.
    """

    def __init__(self, culprit: str, reason: str, hint: str, asked: str = "") -> None:
        self.culprit, self.reason, self.hint, self.asked = culprit, reason, hint, asked
        head = f"{asked}: not controllable" if asked else "not controllable"
        super().__init__(f"{head}\n  culprit: {culprit}\n  reason:  {reason}\n  hint:    {hint}")


class SideConditionFailed(ControllabilityError):
    """A proof exists, but one of its side conditions fails on these numbers.

    ``statement`` is the condition, ``where`` the component, ``position`` the row of the batch and
    ``margin`` the distance from violation (0 or negative).
    """

    def __init__(
        self, statement: str, where: str, margin: float | None, position: object = None, tried: str = "", hint: str = ""
    ) -> None:
        self.statement, self.where, self.margin = statement, where, margin
        self.position, self.tried, self.hint = position, tried, hint
        self.layer: int | None = None
        self.final = False  # no other derivation may go around it
        super().__init__(statement)

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer}, "
        position = f", position {self.position}" if isinstance(self.position, int) else f", {self.position}"
        position = "" if self.position is None else position
        margin = "" if self.margin is None else f" (margin {self.margin:.3g})"
        tried = f"\n  tried: {self.tried}" if self.tried else ""
        hint = f"\n  hint:  {self.hint}" if self.hint else ""
        return f"side condition failed at {layer}{self.where}{position}: {self.statement}{margin}{tried}{hint}"


class NotExact(ControllabilityError, ArithmeticError):
    """An exact arithmetic cannot represent a value, for example an irrational root."""


class ReadingError(ControllabilityError):
    """A live model and its block expression disagree, or the architecture is not registered."""


class NotVerified(ControllabilityError):
    """A patch was made, and holding it against the target run failed."""


class PatchError(ControllabilityError):
    """A patch does not fit: another model, another shape, a corrupt file, a patch already applied."""
