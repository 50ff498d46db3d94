"""The face of a proof: find it, check it, print it, save it."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from controllability.checks import check
from controllability.interfaces import Component
from controllability.proof_files.read import derivation_from_dict
from controllability.proof_files.write import proof_dict
from controllability.prover.derivation import Derivation
from controllability.prover.search import Via, derive
from controllability.rendering.closed_form import ClosedForm, closed_form, formula
from controllability.rendering.text import proof_text


@dataclass(frozen=True, repr=False)
class Proof(Derivation):
    """A derivation that can be checked, printed and saved.

    Level "derived" (theory, section 6): the tree follows the rules; ``check`` runs higher levels.
    """

    @classmethod
    def of(cls, found: Derivation) -> "Proof":
        """The face of a derivation."""
        return cls(**{f.name: getattr(found, f.name) for f in fields(Derivation)})

    def check(self, level: str = "symbolic", seed: int = 0) -> list[dict[str, Any]]:
        """Run the checks of a level: [{rule, status, method}].  See ``controllability.checks``."""
        if level != "machine":
            return check(self, level, seed)
        from controllability.rocq.check import machine

        return machine(self)

    def to_rocq(self) -> str:
        """The proof as a certificate for Coq (Rocq), a ``.v`` file (docs/kernel.md).  Raises ``BadInput`` for what has no lemma."""
        from controllability.rocq.certificate import certificate

        return certificate(self)

    def __str__(self) -> str:
        return proof_text(self)

    def formula(self, expand: bool = True, **sizes: int) -> dict[str, Any]:
        """Each ΔW as a SymPy matrix at small explicit sizes (d=2, h=3 …).  See ``controllability.rendering.closed_form.formula``."""
        return formula(self, expand, **sizes)

    def closed_form(self) -> ClosedForm:
        """The patch in index notation, every size a symbol.  See ``controllability.rendering.closed_form.closed_form``."""
        return closed_form(self)

    def to_latex(self, level: str = "derived", name: str = "") -> str:
        """A theorem, the patch in closed form and the derivation, compilable stand-alone; ``level`` as it was run."""
        from controllability.rendering.latex import proof_latex

        return proof_latex(self, level, name)

    def to_dict(self) -> dict[str, Any]:
        """Block, tree and options as JSON-ready data, from which the proof can be rebuilt (docs/proof-format.md)."""
        return proof_dict(self)

    @classmethod
    def from_dict(cls, data: Any, components: Iterable[type] = ()) -> "Proof":
        """The proof that ``to_dict`` wrote, each node checked again without search; data is never executed.

        ``components`` are the block's classes that are not of this package.  Raises ``BadInput`` with the JSON path
        of data that is no proof, and ``NotVerified`` with the node that does not follow from its premises.
        """
        return cls.of(derivation_from_dict(data, components))


def prove(
    block: Component, via: Via = "input-output", route: str = "auto", frozen: Iterable[str] = (), jointly: bool = False
) -> Proof:
    """A proof that ``block`` can be patched: f(v; θ') = f(v'; θ) for admissible states v, v'.

    With ``jointly`` the patch is one for many tokens at once (theory 5), and ``proof.max_tokens`` says for how many in general position.

    ``via`` chooses Theorem 1 ("input-output") or 1b ("output"), ``route`` what a normalised output does (balanced, scale,
    secular, uniform, ball; auto takes balanced), ``frozen`` names parameters that must not move.  Raises ``NotControllable`` with the
    smallest culprit and the nearest change that has a proof, and ``BadInput`` for unknown options.  Sound, not
    complete: a refusal means that no derivation was found.

    >>> from controllability.components import Linear, Activation, residual
    >>> from controllability.interfaces import Param
    >>> up, down = Linear(Param("up", ("h", "d"))), Linear(Param("down", ("d", "h")))
    >>> proof = prove(residual(up >> Activation("silu") >> down))
    >>> proof.root.rule.name, sorted(map(str, proof.root.moved))
    ('theorem-1', ['down', 'up'])
    """
    return Proof.of(derive(block, via, route, frozen, jointly))
