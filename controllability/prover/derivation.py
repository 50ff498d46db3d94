"""A derivation: the tree of rules that concludes that a block can be patched, and its execution.  (theory 6, level 1)"""

from dataclasses import dataclass
from functools import cached_property

from controllability.arrays import Array, arithmetic
from controllability.errors import SideConditionFailed, within_depth
from controllability.execution.patch import Patch
from controllability.execution.patched_run import PatchedRun
from controllability.execution.trace import Trace
from controllability.execution.validation import check_instance, check_result, missed
from controllability.interfaces import Component, Condition, JointOptions, Layout, Params
from controllability.rules import Step, construct
from controllability.symbolic.definitions import definitions


@dataclass(frozen=True, repr=False)
class Derivation:
    """``root`` concludes, rule by rule, that ``block`` is patchable; ``alternatives`` move other parameters.

    ``via`` says which theorem, ``route`` what a normalised output does, ``frozen`` what may not move, ``jointly`` whether
    one patch serves many tokens.
    """

    block: Component
    root: Step
    alternatives: tuple[Step, ...]
    via: str
    route: str
    frozen: frozenset[str] = frozenset()
    jointly: bool = False

    def __repr__(self) -> str:
        many = f"{', jointly' * self.jointly}, moves {len(self.root.moved)} parameters"
        return f"{type(self).__name__}(via {self.via}, route {self.route}{many})"

    @cached_property
    def layout(self) -> Layout:
        """What the block says of itself, asked once for all executions."""
        return Layout.of(self.block)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Every side condition of the derivation; tested whenever it is executed."""
        return tuple(condition for step in self.root.walk() for condition in step.conditions)

    @property
    def rules(self) -> tuple[str, ...]:
        """The names of the rules used, each once, in the order of the tree."""
        return tuple(dict.fromkeys(step.rule.name for step in self.root.walk()))

    @property
    def max_tokens(self) -> dict[str, int | str]:
        """For how many tokens in general position each steered parameter serves, by a joint proof; {} of another."""
        found: dict[str, int | str] = {}
        for step in self.root.walk():
            if step.max_tokens is not None and step.update is not None:
                found[str(step.update.param)] = step.max_tokens
        return found

    def patched_run(
        self, params: Params, source: Trace | Array, target: Trace | Array, choice: int = 0,
        joint: JointOptions | None = None,
    ) -> PatchedRun:  # fmt: skip
        """The source run in which this proof's patch is solved on demand; ``choice`` > 0 takes an alternative.

        ``joint`` says how a joint proof solves for its tokens; exactly unless it says otherwise.
        """
        joint = (joint or JointOptions()) if self.jointly else None
        run = PatchedRun(self.block, params, source, target, joint, self.layout)
        root = (self.root, *self.alternatives)[choice]
        construct(root, run, run.wanted)
        return run

    @within_depth
    def construct(
        self, params: Params, source: Trace | Array, target: Trace | Array, joint: JointOptions | None = None
    ) -> Patch:
        """The patch with which the block at ``source`` gives what it gave at ``target``.

        A joint proof gives one patch for all tokens of states (T, d), as ``joint`` says (exactly by default).
        States are (..., d), or traces with node values that were already observed.  When a side
        condition fails on the numbers the alternatives are tried in order; raises
        ``SideConditionFailed`` with the first condition when none is open, ``BadInput`` when the
        numbers do not fit the block, and ``NotVerified`` when the patched block misses its target by more than rounding
        explains (``patch.residual`` is what it misses it by; a fit promises none, and symbols have none).
        """
        states = [x.state if isinstance(x, Trace) else x for x in (source, target)]
        check_instance(self.layout, params, *states)
        first = states[0][0] if isinstance(states[0], tuple | list) else states[0]
        xp = arithmetic(first)
        failure: SideConditionFailed | None = None
        for choice in range(1 + len(self.alternatives)):
            run = self.patched_run(params, source, target, choice, joint)
            try:
                if not xp.symbolic:
                    with xp.own_modes(first):
                        deltas = run.deltas()
                        check_result(deltas)
                        exact = run.joint is None or (run.joint.exact and not run.joint.may_fall_short)
                        residual = missed(run.output(()), run.wanted(), params, exact)
                        return Patch(deltas, run.journal, residual=residual)
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
