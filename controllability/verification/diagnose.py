"""The cause: which derivation a patch tries to follow, and the first rules of it that fail."""

import contextlib
import math
import textwrap
from dataclasses import dataclass, field

import numpy as np

from controllability.arrays import Array, arithmetic, relative_error
from controllability.errors import ControllabilityError
from controllability.interfaces import Path, Place, node
from controllability.prover.search import Prover, Via
from controllability.rules import Step
from controllability.verification.evidence import Evidence, fed_by, place_name
from controllability.verification.known_mistakes import recognise
from controllability.verification.plain_numbers import is_zero, largest, per_token
from controllability.verification.replay import (
    SAFETY,
    Instance,
    Measured,
    Steered,
    as_given,
    measure,
    rounding,
    steered,
)
from controllability.verification.rule_words import statement

VIAS: tuple[Via, ...] = ("input-output", "output")
WIDTH = 97  # of a report, with its indentation
FIT = 1024  # machine epsilons within which two vectors count as equal
ROUNDS = 8  # violated rules that are mended one after the other


@dataclass(frozen=True)
class Problem:
    """One rule that a patch breaks: where, by how much (relative to what is demanded), and what it looks like.

    ``kind`` is a short name of the mistake, 'unknown' where no known one fits.
    """

    rule: str
    parameter: str
    place: str
    statement: str
    relative: float
    kind: str
    how: str
    remedy: str
    position: tuple[int, ...] = ()

    def __str__(self) -> str:
        at = f" at {place_name(self.position)}" if self.position else ""
        off = f"off by {self.relative:.2g}{at}: " if math.isfinite(self.relative) else ""
        said = [("should hold: ", self.statement), ("looks like: ", self.how), ("do: ", self.remedy)]
        lines = textwrap.wrap(f"{off}{self.rule} at {self.place}", WIDTH)
        for name, text in said:
            lines += textwrap.wrap(name + text, WIDTH, subsequent_indent=" " * len(name)) if text else []
        return "\n   ".join(lines)


@dataclass(frozen=True)
class Verification:
    """``residual`` and the negative control ``unpatched``: max |difference| / max |target|.

    ``exact`` says that the difference is exactly 0: with symbols, that every entry reduced to 0 (the
    numbers are then None).  ``rounding`` is the residual up to which rounding alone may be the cause:
    16 times what four random changes of every number by one machine epsilon do to it, at most √epsilon.
    ``problems`` says what is wrong where it is more than that; ``derivation`` names the proof that the
    patch follows best, and ``follows`` the rules that fail only because an earlier one does.
    """

    residual: float | None
    unpatched: float | None
    exact: bool
    rounding: float | None = None
    problems: tuple[Problem, ...] = ()
    derivation: str = ""
    follows: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the patch is right, up to rounding."""
        return self.exact or (self.residual is not None and not self.problems)

    def __str__(self) -> str:
        verdict = "right patch" if self.ok else "wrong patch"
        if self.residual is None:
            return f"{verdict}: the residual {'reduces' if self.exact else 'does not reduce'} to 0 in symbols"
        found = f"residual {_said(self.residual)}; unpatched {_said(self.unpatched)}"
        lines = [f"{verdict}: {found}; rounding explains {_said(self.rounding, 1)}"]
        wide, indent = WIDTH + 3, "  "
        if self.derivation:
            lines += textwrap.wrap(f"compared with {self.derivation}", wide, subsequent_indent=indent)
        lines += [f"{number}. {problem}" for number, problem in enumerate(self.problems, 1)]
        if self.follows:
            lines += textwrap.wrap(f"only follow from this: {'; '.join(self.follows)}", wide, subsequent_indent=indent)
        return "\n".join(lines)


def _said(number: float | None, digits: int = 2) -> str:
    return "–" if number is None else f"{number:.{digits}g}" if math.isfinite(number) else "not finite"


def diagnose(instance: Instance) -> Verification:
    """Hold a patch against the target; where it fails by more than rounding, say which rule it breaks and how."""
    epsilon = instance.epsilon
    plain = measure(instance, None, frozenset(), 0.0)
    wanted = plain.run.target.output(())
    residual = relative_error(plain.run.output(()), wanted)
    unpatched = relative_error(instance.block(instance.params, instance.source), wanted)
    size = per_token(wanted, instance.tokens)
    noise = rounding(instance, None, plain, epsilon)[None]
    room = np.minimum(SAFETY * noise, math.sqrt(epsilon) * size)
    allowed = float(room.max() / size.max()) if size.max() else 0.0
    short = ~(per_token(plain.missing, instance.tokens) <= room)
    found = Examined()
    if short.any() or instance.turned:
        found = _best(instance, epsilon)
        if not found.problems:
            found = Examined(found.derivation, (_unexplained(instance, plain, short, found),))
    return Verification(residual, unpatched, residual == 0, allowed, found.problems, found.derivation, found.follows)


@dataclass(frozen=True)
class Examined:
    """A derivation held against a patch."""

    derivation: str = ""
    problems: tuple[Problem, ...] = ()
    follows: tuple[str, ...] = ()

    @property
    def rank(self) -> tuple[int, int]:
        """The derivation that explains most leaves the fewest unknown mistakes, and has the fewest problems."""
        return sum(p.kind == "unknown" for p in self.problems), len(self.problems)


def _best(instance: Instance, epsilon: float) -> Examined:
    """The derivation whose parameters match the patch's best, and which of several explains most.

    Where it leaves a mistake unknown the patch may be a part of a larger one: all of it right, and a parameter missing.
    """
    moved = {p for p, delta in instance.given.items() if not is_zero(delta)} | set(instance.turned)
    ranked: dict[int, list[Step]] = {}
    for step in derivations(instance):
        ranked.setdefault(len(step.moved ^ moved), []).append(step)
    for distance in sorted(ranked):
        if found := _examinable(instance, ranked[distance], epsilon):
            best = min(found, key=lambda e: e.rank)
            larger = [step for step in ranked.get(distance + 1, []) if step.moved > moved] if best.rank[0] else []
            whole = [e for e in _examinable(instance, larger, epsilon) if {p.kind for p in e.problems} == {"not-moved"}]
            return whole[0] if whole else best
    return Examined()


def _examinable(instance: Instance, steps: list[Step], epsilon: float) -> list[Examined]:
    """Derivations held against the patch, without those that cannot be executed on these numbers."""
    found: list[Examined] = []
    for step in steps:
        with contextlib.suppress(ControllabilityError, ArithmeticError):
            found.append(_examined(instance, step, epsilon))
    return [e for e in found if e.problems]


def derivations(instance: Instance) -> list[Step]:
    """All that the prover finds, by Theorem 1 and by 1b; the cheapest first if the patch says nothing about them."""
    place = Place(instance.block)
    found: list[Step] = []
    for via in VIAS:
        found += Prover(instance.block, via, "auto", frozenset()).attempt(place, "input").steps
    if not instance.given and not instance.turned:
        found.sort(key=lambda step: step.cost)
    return [as_given(step) for step in found]


@dataclass
class _Checked:
    """One execution with some leaves mended: what fails, and where the most."""

    measured: Measured
    failing: dict[Path, Array]
    noisy: dict[Path, Array] = field(default_factory=dict)
    tolerance: dict[Path, Array] = field(default_factory=dict)


def _checked(instance: Instance, step: Step, mended: frozenset[Path], epsilon: float) -> _Checked:
    fit = fit_of(epsilon)
    measured = measure(instance, step, mended, fit)
    noise = rounding(instance, step, measured, epsilon)
    found = _Checked(measured, {})
    for path, (demand, given) in measured.leaves.items():
        raw = measured.run.raw(path)
        size = per_token(arithmetic(raw).lift(raw), instance.tokens) + per_token(demand, instance.tokens)
        error = per_token(demand - given, instance.tokens)
        cap = math.sqrt(epsilon) * size
        room = np.minimum(SAFETY * noise[path], cap)
        found.failing[path] = np.where(error <= room, -1.0, np.where(np.isnan(error), np.inf, error))
        found.noisy[path] = (error > cap) & (error <= SAFETY * noise[path]) & np.isfinite(noise[path])
        found.tolerance[path] = room
    return found


def fit_of(epsilon: float) -> float:
    """The relative difference up to which two vectors count as equal."""
    return min(FIT * epsilon, math.sqrt(epsilon))


def _examined(instance: Instance, step: Step, epsilon: float) -> Examined:
    """Mend the first rule that fails, look again, and so on: what fails in both is a problem of its own."""
    places = steered(step, instance)
    first = _checked(instance, step, frozenset(), epsilon)
    wrong = [leaf for leaf in places if _fails(first, leaf) or leaf.param in instance.turned]
    problems: list[Problem] = []
    mended: frozenset[Path] = frozenset()
    now = first
    for _ in range(ROUNDS):
        left = [leaf for leaf in wrong if leaf.path not in mended]
        broken = next((leaf for leaf in left if _fails(now, leaf) or leaf.param in instance.turned), None)
        if broken is None:
            break
        problems.append(_problem(instance, step, now, broken, epsilon))
        mended |= {broken.path}
        now = _checked(instance, step, mended, epsilon)
    named = "theorem-1b" if any(s.rule.name == "theorem-1b" for s in step.walk()) else step.rule.name
    named = "theorem-1" if any(s.rule.name == "theorem-1" for s in step.walk()) else named
    follows = [f"{leaf.rule or 'the change'} at {leaf.param}" for leaf in wrong if leaf.path not in mended]
    names = ", ".join(sorted(map(str, step.moved)))
    return Examined(f"{named}, moving {names}", tuple(problems), tuple(follows))


def _fails(checked: _Checked, leaf: Steered) -> bool:
    return leaf.path in checked.failing and bool((checked.failing[leaf.path] >= 0).any())


def _problem(instance: Instance, step: Step, checked: _Checked, leaf: Steered, epsilon: float) -> Problem:
    errors = checked.failing[leaf.path]
    position = tuple(int(i) for i in np.unravel_index(int(np.argmax(errors)), errors.shape))
    component = node(instance.block, leaf.path)
    place = f"{component.describe()}, which reads {fed_by(instance.block, leaf.path)}"
    evidence = Evidence(instance, step, checked.measured, leaf, position)
    if not leaf.rule:
        return _moved_too(leaf, place, evidence, position)
    tolerance = float(checked.tolerance[leaf.path][position])
    case = evidence.case(fit_of(epsilon), tolerance, epsilon, bool(checked.noisy[leaf.path][position]))
    mistake = recognise(case)
    demand, given = (evidence.at(x) for x in checked.measured.leaves[leaf.path])
    off = float(largest(demand - given) / largest(demand)) if largest(demand) else math.inf
    named = leaf.rule, str(leaf.param), place, statement(leaf.rule)
    return Problem(*named, off, mistake.kind, mistake.how, mistake.remedy, position)


def _moved_too(leaf: Steered, place: str, evidence: Evidence, position: tuple[int, ...]) -> Problem:
    _, given = evidence.measured.leaves[leaf.path]
    raw = evidence.at(evidence.run.raw(leaf.path))
    off = float(largest(evidence.at(given)) / (largest(raw) or 1))
    how = f"the patch moves {leaf.param}, which this derivation leaves as it is: what the others were made for changes"
    return Problem(
        "stays fixed", str(leaf.param), place, f"{leaf.param} stays as it is", off, "moved-too", how,
        f"leave {leaf.param} out", position,
    )  # fmt: skip


def _unexplained(instance: Instance, plain: Measured, short: Array, found: Examined) -> Problem:
    """The output is wrong though every rule holds, or there is no rule to hold it against."""
    errors = np.where(short, per_token(plain.missing, instance.tokens), -1.0)
    position = tuple(int(i) for i in np.unravel_index(int(np.argmax(errors)), errors.shape))
    how = "every rule of the derivation holds, the output is wrong all the same"
    if not found.derivation:
        how = "no derivation of this block could be executed on these numbers: there is no rule to compare with"
    remedy = "prove(block).construct(params, source, target) gives a patch, or the reason why not"
    off = float(np.nanmax(errors) / (per_token(plain.run.target.output(()), instance.tokens).max() or 1))
    statement = "the patched block gives at the source what the block gives at the target"
    named = "the whole block", "", instance.block.describe(), statement
    return Problem(*named, off, "unknown", how, remedy, position)
