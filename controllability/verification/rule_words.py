"""What a rule demands at a leaf, as a report says it.  How the change is made stands in the rule table."""

import re

from controllability.rules import RULES

DEMANDS = {
    "I-linear": "ΔW z = W(z' − z)",
    "I-experts": "ΔW_e z_j = W_e(z'_j − z_j) for every chosen expert e",
    "I-bias": "Δb = f(z') − f(z)",
    "I-scale": "Δm ∘ z = m ∘ (z' − z)",
    "O-linear": "ΔW y = δ",
    "O-mixture": "Σ_j s_j ΔW_j y_j = δ",
    "O-bias": "Δb = δ",
    "O-scale": "Δm ∘ y = δ",
    "O-normalised": "(m + Δm) ∘ n((W + ΔW) y) = G",
    "O-centred": "(m + Δm) ∘ n((W + ΔW) y) = G",
}


def letter(rule: str) -> str:
    """What a rule calls its input: z on the input side, y on the output side."""
    return {"I-experts": "z_j", "O-mixture": "y_j"}.get(rule, "z" if rule.startswith("I") else "y")


def formula(rule: str) -> str:
    """How a rule makes the change, from the rule table.

    >>> formula("I-linear")
    "ΔW = W(z' − z) zᵀ/‖z‖²"
    """
    patch = next(known.patch for known in RULES if known.name == rule)
    return re.sub(r"\s*([−∘])\s*", r" \1 ", patch)


def demanded(rule: str) -> str:
    """What a rule demands; of one's own rules, how it makes the change."""
    return DEMANDS.get(rule) or formula(rule)


def statement(rule: str) -> str:
    """What should hold, its letters explained.

    >>> statement("I-linear")
    "ΔW z = W(z' − z), z the input in the patched run, z' in the target run"
    """
    z = letter(rule)
    rest = f"{z}' in the target run" if rule.startswith("I") else "δ what the output still lacks"
    rest = "G what the branch must give" if rule in ("O-normalised", "O-centred") else rest
    return f"{demanded(rule)}, {z} the input in the patched run, {rest}"
