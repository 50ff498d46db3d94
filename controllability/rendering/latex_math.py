"""Words and index notation as LaTeX."""

import re
from typing import Any

from sympy.printing.latex import LatexPrinter

SYMBOLS = {
    "θ": r"\theta", "φ": r"\varphi", "δ": r"\delta", "Δ": r"\Delta", "∘": r"\circ", "ᵀ": r"^{\top}", "σ": r"\sigma",
    "²": r"^{2}", "‖": r"\|", "√": r"\surd", "ε": r"\varepsilon", "≠": r"\neq", "↦": r"\mapsto", "→": r"\to",
    "−": "-", "⁻": r"^{-}", "⁺": r"^{+}", "¹": r"^{1}", "₁": r"_{1}", "₂": r"_{2}", "…": r"\dots", "μ": r"\mu", "·": r"\cdot",
    "'": r"'", "*": "*", "<": "<", ">": ">", "≤": r"\leq", "≥": r"\geq", "|": "|", "+": "+", "=": "=", "Σ": r"\Sigma",
    "ᵢ": "_{i}", "α": r"\alpha", "β": r"\beta", "∈": r"\in", "×": r"\times", "ρ": r"\rho", "∞": r"\infty", "ₖ": "_{k}",
    "Π": r"\Pi", "λ": r"\lambda", "π": r"\pi", "∥": r"\|", "ʸ": r"^{y}", "ⱼ": "_{j}", "≈": r"\approx", "≫": r"\gg",
}  # fmt: skip
WORDS = {"—": "---", "–": "--", "“": "``", "”": "''", "’": "'", "ä": r"\"a", "ö": r"\"o", "ü": r"\"u"}
ESCAPES = {
    "\\": r"\textbackslash{}", "_": r"\_", "&": r"\&", "%": r"\%", "#": r"\#", "{": r"\{", "}": r"\}",
    "^": r"\^{}", "~": r"\~{}", "$": r"\$",
}  # fmt: skip
LETTERS = ("k", "l", "p", "q")  # bound indices, the innermost sum first


def escape(text: str) -> str:
    """Plain words with our mathematical signs as LaTeX text; runs of signs share one formula."""
    text = re.sub(r"(?<=[a-z])'(?=s\b)", "’", text).replace(">>", "≫")  # an apostrophe is no prime
    pieces = re.split(f"([{re.escape(''.join(SYMBOLS))}]+)", text)
    return "".join(_math(piece) if i % 2 else "".join(_plain(c) for c in piece) for i, piece in enumerate(pieces))


def _math(signs: str) -> str:
    written = "".join(SYMBOLS[c] + ("{}" if SYMBOLS[c][0] == "^" else " ") for c in signs).strip()
    return f"${written}$".replace("$^", "${}^").replace("' ^", "'{}^")


def _numbered(number: str) -> str:
    return f"^{{({number})}}" if number else ""


def _plain(character: str) -> str:
    known = ESCAPES.get(character) or WORDS.get(character)
    if known is None and ord(character) > 126:
        return f"(U+{ord(character):04X})"
    return known or character


class IndexPrinter(LatexPrinter):
    """SymPy's printer with entries as W_{ij}: ``names`` says how heads are written, ``letters`` how free indices are."""

    def __init__(self, names: dict[str, str], letters: dict[str, str]) -> None:
        super().__init__({"fold_short_frac": False})
        self.heads, self.letters = names, letters

    def _print_Symbol(self, expr: Any, style: str = "plain") -> str:  # noqa: N802 (named by SymPy)
        name = str(expr)
        if name in self.letters:
            return self.letters[name]
        if re.fullmatch(r"k_\d+", name):
            level = int(name[2:]) - 1
            return LETTERS[level] if level < len(LETTERS) else f"k_{{{level}}}"
        is_array = name in self.heads or re.fullmatch(r"t\d+|v\d*'?", name)
        return self.head(name) if is_array else super()._print_Symbol(expr)

    def head(self, name: str) -> str:
        """How an array is written."""
        if name in self.heads:
            return self.heads[name]
        if re.fullmatch(r"t\d+", name):
            return f"t^{{({name[1:]})}}"
        state = re.fullmatch(r"v(\d*)('?)", name)
        return f"v{state[2]}^{{({state[1]})}}" if state and state[1] else name

    def _print_Function(self, expr: Any, exp: str | None = None) -> str:  # noqa: N802 (named by SymPy)
        name, power = str(expr.func), f"^{{{exp}}}" if exp else ""
        if chosen := re.fullmatch(r"(e)xpert(\d*)|(s)hare(\d*)", name):
            letter, number = chosen[1] or chosen[3], chosen[2] or chosen[4]
            text = f"{letter}{_numbered(number)}_{{{self._print(expr.args[-1])}}}"
            return rf"\left({text}\right){power}" if number and power else f"{text}{power}"
        if name.startswith("phi_"):
            text = rf"\operatorname{{{name[4:].replace('_', '-')}}}\left({self._print(expr.args[0])}\right)"
        elif norm := re.fullmatch(r"n(_?layer)?(\d*)", name):
            of, *at = expr.args
            operator = (r"n_{\mathrm{layer}}" if norm[1] else "n") + _numbered(norm[2])
            text = rf"{operator}({self._print(of)})_{{{''.join(map(self._print, at))}}}"
        else:
            base, at = self.head(name), ",".join(map(self._print, expr.args))
            short = at.replace(",", "") if all(len(self._print(a)) == 1 for a in expr.args) else at
            text = f"{base}_{{{short}}}"
        return rf"\left({text}\right){power}" if power else text

    def _as_ordered_terms(self, expr: Any, order: str | None = None) -> list[Any]:
        """What is added before what is taken away: a' − a, as in the papers."""
        terms = super()._as_ordered_terms(expr, order=order)
        return sorted(terms, key=lambda term: bool(term.could_extract_minus_sign()))

    def _print_Sum(self, expr: Any) -> str:  # noqa: N802 (named by SymPy)
        indices = ",".join(self._print(bound) for bound, *_ in reversed(expr.limits))
        inside = self._print(expr.function)
        return rf"\sum_{{{indices}}} " + (rf"\left({inside}\right)" if expr.function.is_Add else inside)
