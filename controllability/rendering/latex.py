"""A proof as LaTeX: a theorem, its side conditions, and the derivation rule by rule."""

from __future__ import annotations

from controllability.proof import Proof
from controllability.rules import Step

SYMBOLS = {
    "θ": r"$\theta$", "φ": r"$\varphi$", "δ": r"$\delta$", "Δ": r"$\Delta$", "∘": r"$\circ$", "ᵀ": r"$^{\top}$",
    "²": r"$^{2}$", "‖": r"$\|$", "√": r"$\sqrt{\ }$", "ε": r"$\varepsilon$", "≠": r"$\neq$", "↦": r"$\mapsto$",
    "−": r"$-$", "⁻¹": r"$^{-1}$", "₁": r"$_{1}$", "₂": r"$_{2}$", "…": r"\dots{}", "μ": r"$\mu$", "·": r"$\cdot$",
    "'": r"$'$", "*": r"$*$", "<": r"$<$", ">": r"$>$", "≤": r"$\leq$", "|": r"$|$", "+": r"$+$",
}  # fmt: skip
ESCAPES = {
    "\\": r"\textbackslash{}",
    "_": r"\_",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "{": r"\{",
    "}": r"\}",
    "^": r"\^{}",
    "~": r"\~{}",
    "$": r"\$",
}


def escape(text: str) -> str:
    """Plain text with our mathematical signs as LaTeX."""
    text = text.replace("⁻¹", "\0")
    out = "".join(ESCAPES.get(c, SYMBOLS.get(c, c)) for c in text)
    return out.replace("\0", SYMBOLS["⁻¹"])


def proof_latex(proof: Proof, level: str = "derived") -> str:
    """A document that compiles stand-alone."""
    moved = ", ".join(rf"\texttt{{{escape(name)}}}" for name in sorted(map(str, proof.root.moved)))
    conditions = "\n".join(
        rf"\item {escape(c.statement)} (\texttt{{{escape(c.where)}}})" for c in dict.fromkeys(proof.conditions)
    )
    listed = f"\\begin{{itemize}}\n{conditions}\n\\end{{itemize}}" if conditions else "none.\n"
    return "\n".join([
        r"\documentclass{article}", r"\usepackage[T1]{fontenc}", r"\usepackage{amsmath,amsthm}",
        r"\newtheorem{theorem}{Theorem}", r"\begin{document}", r"\sloppy",
        r"\begin{theorem}", f"The block {escape(proof.block.describe())} admits a perfect patch that moves {moved}.",
        f"Level of proof: {level}. Side conditions: {listed}", r"\end{theorem}", r"\begin{proof}[Derivation]", *_items(proof.root), r"\end{proof}", r"\end{document}", "",
    ])  # fmt: skip


def _items(step: Step, depth: int = 0) -> list[str]:
    indent = rf"\par\noindent\hspace*{{{depth}em}}"
    line = rf"{indent}\textbf{{{escape(step.rule.name)}}} ({escape(step.rule.statement)}; {escape(step.rule.when)}) at {escape(step.place.describe())}: {escape(step.rule.patch)}."
    return [line, *(item for premise in step.premises for item in _items(premise, depth + 1))]
