"""What a rule is: derivations go up (``derive``), and when a proof is executed wanted outputs go down (``construct``)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any, Literal, Protocol

from controllability.arrays import Array, arithmetic
from controllability.execution.patched_run import PatchedRun
from controllability.interfaces import Component, Condition, Param, Path, Place, Update, overlap

Side = Literal["input", "output", "through"]
Target = Callable[[], Array]


class Search(Protocol):
    """What a rule may ask the prover."""

    via: str
    route: str
    jointly: bool
    normalised: frozenset[Path]
    per_expert_rows: frozenset[Path]

    def attempt(self, place: Place, side: Side) -> "Attempt":
        """The derivations of one side at a place."""
        ...

    def is_frozen(self, param: Param) -> bool:
        """Whether a parameter must not move."""
        ...


@dataclass(frozen=True)
class Step:
    """A node of a proof: a rule applied at a place, from premises, moving some parameters.

    ``cost`` orders alternatives: 0 moves weights, 1 a bias, 2 a scale whose condition is fragile.  ``route`` says how a
    normalised output chooses its scale; ``note`` is for a reader only.
    """

    rule: "Rule"
    place: Place
    premises: "tuple[Step, ...]" = ()
    moved: frozenset[Param] = frozenset()
    conditions: tuple[Condition, ...] = ()
    cost: int = 0
    note: str = ""
    update: Update | None = field(default=None, compare=False)
    max_tokens: int | str | None = None  # tokens in general position that the rule itself serves with one patch
    route: str = ""

    @property
    def printed_note(self) -> str:
        """What a proof prints beside the step: its route, or its note."""
        return f"route {self.route}" if self.route else self.note

    def walk(self) -> "Iterator[Step]":
        """This step and every step below it."""
        yield self
        for premise in self.premises:
            yield from premise.walk()


@dataclass(frozen=True)
class Failure:
    """Why a rule does not apply at a place; ``because`` are the failures below it."""

    place: Place
    rule: str
    reason: str
    hint: str
    because: "tuple[Failure, ...]" = ()
    weight: int = 0
    side: Side | None = None  # what was asked of the place; the prover fills it in


@dataclass
class Attempt:
    """The derivations found at a place, best first, and what failed."""

    steps: list[Step] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def add(
        self, rule: "Rule", place: Place, premises: tuple[Step, ...], twice: tuple[Param, ...], own: Iterable[Param] = (),
        **more: Any,
    ) -> None:  # fmt: skip
        """Add the conclusion from ``premises``, which moves what they move and its ``own``; a failure where a parameter is used ``twice``.

        The cost is that of all premises, unless ``more``, fields of the step, say otherwise.
        """
        if twice:
            self.failures.append(shared(place, rule.name, twice))
            return
        moved = frozenset(own).union(*(p.moved for p in premises))
        self.steps.append(Step(rule, place, premises, moved, **{"cost": sum(p.cost for p in premises), **more}))


class Rule(ABC):
    """One row of the table.  ``statement``, ``when`` and ``patch`` are what a reader sees."""

    name: str
    side: Side
    statement: str
    when: str
    patch: str
    source: str
    claim: str = (
        ""  # what the conclusion is worth in a model, where it is not that every layer gives the target's state
    )
    jointly: bool | None = None  # whether it serves many tokens with one patch, or each with its own; None for both
    about: type | UnionType = Component  # the class of component that its statement names; any by default

    def conclude(self, place: Place, prover: Search) -> Attempt:
        """``derive`` where the component is of the class that the rule is about, else nothing."""
        return self.derive(place, prover) if isinstance(place.component, self.about) else Attempt()

    @abstractmethod
    def derive(self, place: Place, prover: Search) -> Attempt:
        """Every way in which this rule concludes its side at ``place``."""

    @abstractmethod
    def schema(self, step: Step) -> "Schema":
        """The rule's own shape at ``step``, its parts undefined functions: what its check executes."""

    def variants(self, step: Step) -> dict[str, Step]:
        """The ways in which ``construct`` may go on, each checked; '' names the only one."""
        return {"": step}

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        """Pass the wanted output on.  By default to the only premise."""
        construct(step.premises[0], run, wanted)


def construct(step: Step, run: PatchedRun, wanted: Target) -> None:
    """Execute ``step``: announce to ``run`` which leaves are steered and to what."""
    step.rule.construct(step, run, wanted)


def disturbs(moved: frozenset[Param], *places: Place) -> tuple[Param, ...]:
    """The moved parameters that one of ``places`` reads."""
    return tuple(p for place in places for p in overlap(moved, place.component.parameters()))


def shared(place: Place, rule: str, params: tuple[Param, ...]) -> Failure:
    """The failure of a rule because a parameter has two uses."""
    names = ", ".join(dict.fromkeys(map(str, params)))
    return Failure(
        place, rule, f"parameter {names} is used twice: moving it for one use would change the other",
        f"untie {names}, or leave it out of the patch (frozen=...)", weight=2,
    )  # fmt: skip


def per_expert_rows(place: Place, rule: str) -> Failure:
    """The failure of a rule because a token has several rows at a place, and its one change would serve all."""
    reason = "a token has one row for each chosen expert here, and one change cannot serve them all"
    return Failure(place, rule, reason, "steer the experts' own maps", weight=1)


def lifted(
    rule: Rule, place: Place, part: Place, fixed: tuple[Place, ...], attempt: Attempt,
    conditions: tuple[Condition, ...] = (), cost_at_least: int = 0, note: str = "",
) -> Attempt:  # fmt: skip
    """The derivations found at ``part`` as derivations at ``place``, where ``fixed`` must stay as it is."""
    found = Attempt(failures=list(attempt.failures))
    for step in attempt.steps:
        how = {"conditions": conditions, "cost": max(step.cost, cost_at_least), "note": note}
        found.add(rule, place, (step,), disturbs(step.moved, *fixed), **how)
    return found


def target_output(step: Step, run: PatchedRun) -> Target:
    """What the target run gave at the place of ``step``."""
    return lambda: run.target.output(step.place.outlet)


def rest_of_sum(step: Step, moved: Step, run: PatchedRun, wanted: Target) -> Target:
    """What the moved term must give: the wanted sum less the other terms, as they are now."""
    inside = moved.place.outlet[: len(step.place.path) + 1]
    others = [part.outlet for part in step.place.parts() if part.path != inside]

    def rest() -> Array:
        value = wanted()
        xp = arithmetic(value)
        value = xp.lift(value)
        for outlet in others:
            value = value - xp.lift(run.output(outlet))
        return xp.name(value)

    return rest


@dataclass(frozen=True)
class Schema:
    """A rule's own shape: the component, the premises that are assumed, the step to execute."""

    component: Component
    premises: tuple[Step, ...] = ()
    update: Update | None = None

    def step(self, of: Step) -> Step:
        """``of`` on this shape."""
        moved = frozenset[Param]().union(*(p.moved for p in self.premises))
        return replace(of, place=Place(self.component), premises=self.premises, moved=moved, update=self.update)
