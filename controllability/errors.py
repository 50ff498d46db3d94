"""Every error of the package.  Each says what was asked, what failed, the culprit, what to do."""

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_a_line(error: BaseException, length: int = 300) -> str:
    """What somebody else's error says, in one line of at most ``length`` characters."""
    return " ".join(str(error).split())[:length]


def printable(text: str, but: str = "") -> str:
    r"""The text with signs that a terminal would obey, or cannot show, written as their codes, ``but`` for these.

    >>> print(printable("W\x1b[31m and ΔW"))
    W\x1b[31m and ΔW
    """
    return "".join(c if c.isprintable() or c in but else c.encode("unicode_escape").decode() for c in text)


class ControllabilityError(Exception):
    """Base of all errors that the package raises on purpose.  ``page`` is the page of the site that says what to do."""

    page = "api.html#errors"


class ControllabilityWarning(UserWarning):
    """What was asked for was done, and can be used less than one would think."""


class BadInput(ControllabilityError, ValueError):
    """What was passed in cannot be used; nothing was changed."""


class Overflow(BadInput):
    """The model's own numbers leave the range of its dtype."""

    page = "precision.html#symptom-cause-what-to-do"


def too_deep() -> BadInput:
    """What to raise in place of Python's ``RecursionError``."""
    return BadInput(
        "nested too deeply: each part inside another, and each step of a sequence, takes up to 8 calls one inside another, and Python "
        f"allows {sys.getrecursionlimit()} here (1000 are enough for 100 steps); cut the block into smaller ones, or raise "
        "sys.setrecursionlimit"
    )


def within_depth(function: Callable[P, T]) -> Callable[P, T]:
    """The function, for which an expression that is nested too deeply is a ``BadInput`` that states the limit."""

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        try:
            return function(*args, **options)
        except RecursionError:
            raise too_deep() from None

    return call


class Remedy(Protocol):
    """A change of a refused question that was tried and has a proof: ``ct.prove(remedy.block, **remedy.options)``."""

    @property
    def change(self) -> str:
        """What to do, in words."""
        ...

    @property
    def block(self) -> Any:
        """The changed block, a component."""
        ...

    @property
    def options(self) -> dict[str, Any]:
        """The options of ``prove``."""
        ...


class NotControllable(ControllabilityError):
    """No derivation exists: the component can never be controlled this way.

    ``culprit`` is the smallest component that fails while its parts pass, ``reason`` says which
    rule failed on which argument, ``hint`` what would help.  ``remedies`` are the changes that the hint
    names, each with a block that has a proof; ``remedy`` is the first of them, None if none was found.
    """

    page = "refusals.html#no-proof"

    def __init__(
        self, culprit: str, reason: str, hint: str, asked: str = "", remedies: tuple[Remedy, ...] = ()
    ) -> None:
        self.culprit, self.reason, self.hint, self.asked = culprit, reason, hint, asked
        self.remedies = remedies
        head = f"{asked}: not controllable" if asked else "not controllable"
        super().__init__(f"{head}\n  culprit: {culprit}\n  reason:  {reason}\n  hint:    {hint}")

    @property
    def remedy(self) -> Remedy | None:
        """The first remedy: ``ct.prove(remedy.block, **remedy.options)`` succeeds."""
        return self.remedies[0] if self.remedies else None


class Certificate(Protocol):
    """Why no one patch serves all tokens, in a form that can be checked; ``weights`` has one number a token."""

    @property
    def weights(self) -> Any:
        """λ."""
        ...

    def holds(self) -> bool:
        """Whether it holds in exact arithmetic."""
        ...

    def named(self, names: Sequence[str]) -> "Certificate":
        """This certificate with a name for each token, which the text and the data then use."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        ...


class SideConditionFailed(ControllabilityError):
    """A proof exists, but one of its side conditions fails on these numbers.

    ``statement`` is the condition, ``where`` the component, ``position`` the token (a row, all token axes
    counted through; ``tokens`` are their sizes), ``margin`` the distance from violation (0 or negative;
    None where there is no distance) and ``hint`` what to do.  ``certificate`` proves that no one patch serves all
    tokens, where many were asked for: it prints, and says whether it holds in exact arithmetic.
    """

    page = "refusals.html#a-side-condition-fails-on-the-numbers"

    def __init__(
        self, statement: str, where: str, margin: float | None, position: object = None, tried: str = "",
        hint: str = "", tokens: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.statement, self.where, self.margin = statement, where, margin
        self.position, self.tried, self.hint, self.tokens = position, tried, hint, tokens
        self.layer: int | None = None
        self.final = False  # no other derivation may go around it
        self.certificate: Certificate | None = None
        super().__init__(statement)

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer}, "
        position = f", {self._token()}" if isinstance(self.position, int) else f", {self.position}"
        position = "" if self.position is None else position
        margin = "" if self.margin is None else f" (margin {self.margin:.3g})"
        tried = f"\n  tried: {self.tried}" if self.tried else ""
        hint = f"\n  hint:  {self.hint}" if self.hint else ""
        proof = f"\n  proof: {self.certificate}" if self.certificate is not None else ""
        return f"side condition failed at {layer}{self.where}{position}: {self.statement}{margin}{proof}{tried}{hint}"

    def _token(self) -> str:
        """'position 5', and where that is when tokens stand along several axes."""
        assert isinstance(self.position, int)
        index: list[int] = []
        rest = self.position
        for size in reversed([size for size in self.tokens if size > 1]):
            index.insert(0, rest % size)
            rest //= size
        return f"position {self.position}" + (f" (token {index})" if len(index) > 1 else "")


class NotExact(ControllabilityError, ArithmeticError):
    """An exact arithmetic cannot represent a value, for example an irrational root."""

    page = "proofs.html#numbers"


class ReadingError(ControllabilityError):
    """A live model and its block expression disagree, or the architecture is not registered."""

    page = "architectures.html"


class NotVerified(ControllabilityError):
    """A patch was made, and holding it against the target run failed."""

    page = "precision.html#symptom-cause-what-to-do"


class PatchError(ControllabilityError):
    """A patch does not fit: another model, another shape, a corrupt file, a patch already applied."""

    page = "applying.html"
