"""Names and numbers in a certificate."""

import re
from fractions import Fraction
from functools import cache
from importlib.resources import files
from typing import Any

from controllability.errors import BadInput

WORDS = re.compile(r"\w+")
KEYWORDS = frozenset(WORDS.findall(
    "as at cofix else end exists exists2 fix for forall fun if in let match mod return Set SProp Prop Type then using where with "
    "Definition Theorem Section End Variables Proof Qed Print Assumptions From Require Import exact Finite"
))  # fmt: skip
BOUND = frozenset(WORDS.findall("a b c e i j k l m n o p q r s t x y z v H I S O R left right eq_refl"))
LOGIC = frozenset(
    WORDS.findall("R unit True I conj ex_intro fst snd tt inl inr nil cons Rlt_le Rle_refl Rabs sqrt tanh exp PI")
)
MOST_DIGITS = 40


@cache
def theory(name: str = "theory.v") -> str:
    """The text of the theory, or of another file beside it."""
    return files("controllability.rocq").joinpath(name).read_text(encoding="utf-8")


def without_comments(name: str = "theory.v") -> str:
    """The text of the theory alone, or of another file beside it."""
    return re.sub(r"\(\*.*?\*\)", " ", theory(name), flags=re.DOTALL)


@cache
def stated(name: str = "theory.v") -> frozenset[str]:
    """Every name that the theory states, or another file beside it."""
    text = without_comments(name)
    heads = r"\b(?:Definition|Lemma|Theorem|Fixpoint|Record|Class|Instance)\s+([A-Za-z_]\w*'?)"
    fields = r"[{;]\s*([A-Za-z_]\w*)\s*:(?!=)"
    return frozenset(re.findall(heads, text)) | frozenset(re.findall(fields, text))


def identifier(name: str, taken: set[str]) -> str:
    """A name of a parameter as Coq takes it: no keyword, nothing that is bound, none of those ``taken``; it is taken then."""
    plain = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")
    plain = plain if plain[:1].isalpha() else f"p_{plain}"
    plain = f"p_{plain}" if plain.startswith("finite_") else plain  # the sizes' own
    used = taken | KEYWORDS | BOUND | LOGIC | stated()
    found = next(n for n in (plain, *(f"{plain}_{i}" for i in range(2, len(taken) + 3))) if n not in used)
    taken.add(found)
    return found


def ratio(value: Any, what: str) -> tuple[int, int]:
    """A number as numerator and denominator.  Raises ``BadInput`` for one that is no fraction of usual size."""
    try:
        number = Fraction(repr(value)) if isinstance(value, float) else Fraction(value)
        if len(str(number.numerator)) + len(str(number.denominator)) <= MOST_DIGITS:
            return number.numerator, number.denominator
    except (TypeError, ValueError, OverflowError):
        pass
    raise BadInput(f"{what} is {value!r:.60}: a certificate takes fractions of at most {MOST_DIGITS} digits")


def number(value: Any, what: str) -> str:
    """A number as a fraction in Coq."""
    above, below = ratio(value, what)
    return f"({above} / {below})" if above >= 0 else f"(({above}) / {below})"
