"""How the rules are said in a report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """How a rule is said: what should hold, its formula, the letter of its input."""

    statement: str
    formula: str
    letter: str = "z"


WORDING = {
    "I-linear": Wording("ΔW z = W(z' − z)", "ΔW = W(z' − z) zᵀ/‖z‖²"),
    "I-experts": Wording("ΔW_e z = W_e(z' − z) for every chosen expert e", "ΔW_e = W_e(z' − z) zᵀ/‖z‖²"),
    "I-bias": Wording("Δb = f(z') − f(z)", "Δb = f(z') − f(z)"),
    "I-scale": Wording("Δm ∘ z = m ∘ (z' − z)", "Δm = m ∘ (z' − z)/z"),
    "O-linear": Wording("ΔW y = δ", "ΔW = δ yᵀ/‖y‖²", "y"),
    "O-mixture": Wording("Σ_j s_j ΔW_j y_j = δ", "ΔW_j = s_j δ y_jᵀ / Σ_k s_k²‖y_k‖²", "y_j"),
    "O-bias": Wording("Δb = δ", "Δb = δ", "y"),
    "O-scale": Wording("Δm ∘ y = δ", "Δm = δ/y", "y"),
    "O-normalised": Wording("(m + Δm) ∘ n((W + ΔW) y) = G", "a route for m' = m + Δm, then W reaches y* ∥ G/m'", "y"),
}


def statement(rule: str) -> str:
    """What should hold, its letters explained.

    >>> statement("I-linear")
    "ΔW z = W(z' − z), z the input in the patched run, z' in the target run"
    """
    wording = WORDING[rule]
    if rule.startswith("I"):
        return f"{wording.statement}, z the input in the patched run, z' in the target run"
    if rule == "O-normalised":
        return f"{wording.statement}, y the input in the patched run, G what the branch must give"
    return f"{wording.statement}, {wording.letter} the input in the patched run, δ what the output still lacks"
