"""How many tokens one patch serves, in words: what a joint proof says beside its tree."""

from controllability.prover.derivation import Derivation

NORMALISED, EXPERTS = "O-normalised jointly", "I-experts jointly"


def reach(proof: Derivation) -> list[str]:
    """For how many tokens in general position each steered parameter serves; [] for a proof of a patch for each token.

    >>> from controllability import prove
    >>> from controllability.components import Linear, residual
    >>> from controllability.interfaces import Param
    >>> reach(prove(residual(Linear(Param("W", ("d", "h")))), via="output", jointly=True))
    ['W serves T ≤ h']
    """
    if not proof.jointly:
        return []
    lines = []
    for step in proof.root.walk():
        if step.max_tokens is not None and step.update is not None:
            most = step.max_tokens
            served = "tokens that ask for the same change (T = 1)" if most == 1 else f"T ≤ {most}"
            lines.append(f"{step.update.param} serves {served}" + " an expert" * (step.rule.name == EXPERTS))
        if step.rule.name == NORMALISED:
            where = step.place.parts()[-1].describe()
            lines.append(f"{where} serves T ≤ about d/2 with every RMS kept, and any T when ε > 0 and the RMS may move")
    return list(dict.fromkeys(lines))


def matrix_formulas(proof: Derivation) -> list[str]:
    """'parameter: its change' for each rule that moves one, with the tokens' vectors as columns of Z, Y and D."""
    found = [f"{s.update.param}: {s.rule.patch}" for s in proof.root.walk() if s.update is not None]
    for step in proof.root.walk():
        if step.rule.name == NORMALISED:
            found.append(f"{step.place.parts()[-1].describe()}: {step.rule.patch}")
    return list(dict.fromkeys(found))
