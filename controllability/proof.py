"""Proof objects: a tree of rules that can be read, checked, and executed to construct the patch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from controllability.arrays import Array, arithmetic
from controllability.errors import BadInput, SideConditionFailed
from controllability.execution.patch import Patch
from controllability.execution.patched_run import PatchedRun
from controllability.execution.trace import Trace
from controllability.execution.validation import check_instance, check_result
from controllability.interfaces import Component, Condition, Params, Place, Together
from controllability.prover.explain import explained, refusal
from controllability.prover.remedies import Remedy
from controllability.prover.search import Prover, Via
from controllability.rules import Failure, Step, construct
from controllability.solvers.norm_scale import check_route
from controllability.symbolic.definitions import definitions

if TYPE_CHECKING:
    from controllability.rendering.closed_form import ClosedForm


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
        """Each ΔW as a SymPy matrix at small explicit sizes (d=2, h=3 …).  See ``controllability.rendering.closed_form.formula``."""
        from controllability.rendering.closed_form import formula

        return formula(self, expand, **sizes)

    def closed_form(self) -> ClosedForm:
        """The patch in index notation, every size a symbol.  See ``controllability.rendering.closed_form.closed_form``."""
        from controllability.rendering.closed_form import closed_form

        return closed_form(self)

    def to_latex(self, level: str = "derived", name: str = "") -> str:
        """A theorem, the patch in closed form and the derivation, compilable stand-alone; ``level`` as it was run."""
        from controllability.rendering.latex import proof_latex

        return proof_latex(self, level, name)

    def to_dict(self) -> dict[str, Any]:
        """Block, tree and options as JSON-ready data, from which the proof can be rebuilt (docs/proof-format.md)."""
        from controllability.proof_files.write import proof_dict

        return proof_dict(self)

    @classmethod
    def from_dict(cls, data: Any, components: Iterable[type] = ()) -> Proof:
        """The proof that ``to_dict`` wrote, each node checked again without search; data is never executed.

        ``components`` are the block's classes that are not of this package.  Raises ``BadInput`` with the JSON path
        of data that is no proof, and ``NotVerified`` with the node that does not follow from its premises.
        """
        from controllability.proof_files.read import proof_from_dict

        return proof_from_dict(data, components)


def prove(
    block: Component,
    via: Via = "input-output",
    route: str = "auto",
    frozen: Iterable[str] = (),
    jointly: bool = False,
) -> Proof:
    """A proof that ``block`` can be patched: f(v; θ') = f(v'; θ) for admissible states v, v'.

    With ``jointly`` the patch is one for many tokens at once (theory 5), and ``proof.most`` says for how many in general position.

    ``via`` chooses Theorem 1 ("input-output") or 1b ("output"), ``route`` what a normalised output
    does (auto, scale, secular, uniform, ball), ``frozen`` names parameters that must not move.
    Raises ``NotControllable`` with the smallest culprit and the nearest change that has a proof, and ``BadInput``
    for unknown options.
    Sound, not complete: a refusal means that no derivation was found.

    >>> from controllability.components import Linear, Activation, residual
    >>> up, down = Linear(Param("up", ("h", "d"))), Linear(Param("down", ("d", "h")))
    >>> proof = prove(residual(up >> Activation("silu") >> down))
    >>> proof.root.rule.name, sorted(map(str, proof.root.moved))
    ('theorem-1', ['down', 'up'])
    """
    if via not in get_args(Via):
        raise BadInput(f"unknown theorem via={via!r}: choose input-output (Theorem 1) or output (Theorem 1b)")
    check_route(route)
    if not isinstance(block, Component):
        raise BadInput(f"prove takes a component, got {type(block).__name__}; architectures.block(name) gives one")
    frozen = frozenset((frozen,) if isinstance(frozen, str) else frozen or ())
    if odd := [name for name in frozen if not isinstance(name, str)]:
        raise BadInput(f"frozen takes names of parameters, got {odd[0]!r}")
    known = {str(p) for p in block.parameters()} | {p.name for p in block.parameters()}
    if unknown := sorted(frozen - known):
        raise BadInput(
            f"frozen names {', '.join(unknown)}, which the block does not have; it has {', '.join(sorted(known))}"
        )
    prover = Prover(block, via, route, frozen, jointly)
    place = Place(block)
    attempt = prover.attempt(place, "input")
    if not attempt.steps:
        asked = Remedy("", block, via, route, frozen, jointly)
        raise refusal(asked, attempt, prover, _unproved)
    return Proof(block, attempt.steps[0], tuple(attempt.steps[1:]), via, route, frozen, jointly)


def _unproved(question: Remedy) -> list[Failure]:
    """Why a question to the prover has no answer, the most telling failure first; [] where it has one."""
    via: Via = "output" if question.via == "output" else "input-output"
    prover = Prover(question.block, via, question.route, question.frozen, question.jointly)
    attempt = prover.attempt(Place(question.block), "input")
    return [] if attempt.steps else explained(attempt.failures, question.block, prover)
