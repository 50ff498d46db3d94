"""Proof objects: a tree of rules that can be read, checked, and executed to construct the patch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from controllability.arrays import Array, arithmetic
from controllability.errors import SideConditionFailed
from controllability.instance import check_instance, check_result
from controllability.interfaces import Component, Condition, Params, Together
from controllability.patch import Patch
from controllability.rules import Step, construct
from controllability.symbols import definitions
from controllability.trace import PatchedRun, Trace

if TYPE_CHECKING:
    from controllability.formulas import ClosedForm


@dataclass(frozen=True)
class Proof:
    """A derivation that ``block`` is patchable.  ``alternatives`` move other parameters.

    Level "derived" (theory, section 6): the tree follows the rules; ``check`` runs higher levels.
    """

    block: Component
    root: Step
    alternatives: tuple[Step, ...]
    via: str
    route: str
    frozen: frozenset[str] = frozenset()
    jointly: bool = False

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Every side condition of the derivation; tested whenever it is executed."""
        return tuple(condition for step in self.root.walk() for condition in step.conditions)

    @property
    def rules(self) -> tuple[str, ...]:
        """The names of the rules used, each once, in the order of the tree."""
        return tuple(dict.fromkeys(step.rule.name for step in self.root.walk()))

    @property
    def most(self) -> dict[str, int | str]:
        """For how many tokens in general position each steered parameter serves, by a joint proof; {} of another."""
        found: dict[str, int | str] = {}
        for step in self.root.walk():
            if step.most is not None and step.steering is not None:
                found[str(step.steering.param)] = step.most
        return found

    def patched_run(
        self,
        params: Params,
        source: Trace | Array,
        target: Trace | Array,
        choice: int = 0,
        together: Together | None = None,
    ) -> PatchedRun:
        """The source run in which this proof's patch is solved on demand; ``choice`` > 0 takes an alternative.

        ``together`` says how a joint proof solves for its tokens; exactly unless it says otherwise.
        """
        together = (together or Together()) if self.jointly else None
        run = PatchedRun(self.block, params, source, target, together)
        root = (self.root, *self.alternatives)[choice]
        construct(root, run, run.wanted)
        return run

    def construct(
        self, params: Params, source: Trace | Array, target: Trace | Array, together: Together | None = None
    ) -> Patch:
        """The patch with which the block at ``source`` gives what it gave at ``target``.

        A joint proof gives one patch for all tokens of states (T, d), as ``together`` says (exactly by default).
        States are (..., d), or traces with node values that were already observed.  When a side
        condition fails on the numbers the alternatives are tried in order; raises
        ``SideConditionFailed`` with the first condition when none is open, and ``BadInput`` when the
        numbers do not fit the block.
        """
        states = [x.state if isinstance(x, Trace) else x for x in (source, target)]
        check_instance(self.block, params, *states)
        failure: SideConditionFailed | None = None
        for choice in range(1 + len(self.alternatives)):
            run = self.patched_run(params, source, target, choice, together)
            try:
                first = states[0][0] if isinstance(states[0], tuple | list) else states[0]
                if not arithmetic(first).symbolic:
                    deltas = run.deltas()
                    check_result(deltas)
                    return Patch(deltas, run.journal)
                with definitions() as table:
                    return Patch(run.deltas(), run.journal, table)
            except SideConditionFailed as failed:
                failure = failure or failed
                if failed.final:
                    raise
        assert failure is not None
        if self.alternatives:
            failure.tried = f"{1 + len(self.alternatives)} derivations that move different parameters"
        raise failure

    def check(self, level: str = "symbolic", seed: int = 0) -> list[dict[str, Any]]:
        """Run the checks of a level: [{rule, status, method}].  See ``controllability.checks``."""
        from controllability.checks import check

        return check(self, level, seed)

    def __str__(self) -> str:
        from controllability.rendering.text import proof_text

        return proof_text(self)

    def formula(self, expand: bool = True, **sizes: int) -> dict[str, Any]:
        """Each ΔW as a SymPy matrix at small explicit sizes (d=2, h=3 …).  See ``controllability.formulas.formula``."""
        from controllability.formulas import formula

        return formula(self, expand, **sizes)

    def closed_form(self) -> ClosedForm:
        """The patch in index notation, every size a symbol.  See ``controllability.formulas.closed_form``."""
        from controllability.formulas import closed_form

        return closed_form(self)

    def to_latex(self, level: str = "derived", name: str = "") -> str:
        """A theorem, the patch in closed form and the derivation, compilable stand-alone; ``level`` as it was run."""
        from controllability.rendering.latex import proof_latex

        return proof_latex(self, level, name)

    def to_dict(self) -> dict[str, Any]:
        """Block, tree and options as JSON-ready data, from which the proof can be rebuilt (docs/proof-format.md)."""
        from controllability.rendering.data import proof_dict

        return proof_dict(self)

    @classmethod
    def from_dict(cls, data: Any, components: Iterable[type] = ()) -> Proof:
        """The proof that ``to_dict`` wrote, each node checked again without search; data is never executed.

        ``components`` are the block's classes that are not of this package.  Raises ``BadInput`` with the JSON path
        of data that is no proof, and ``NotVerified`` with the node that does not follow from its premises.
        """
        from controllability.certificate.proofs import proof_from_dict

        return proof_from_dict(data, components)
