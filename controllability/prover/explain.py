"""Why a block has no proof: the smallest culprit, the rule that failed on it, and the nearest change that helps."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from controllability.errors import NotControllable
from controllability.interfaces import (
    Component,
    InputControllable,
    OutputControllable,
    Place,
    leaves,
    node,
    overlap,
    updates_of,
)
from controllability.prover.edits import short
from controllability.prover.remedies import TWICE, Remedy, remedies
from controllability.rules import RULES, Attempt, Failure, Side, is_about
from controllability.rules.base import Search

IMPLEMENT = "if it can be steered, implement"
STEERED = {"input": "steers its input", "output": "moves its output"}


def refusal(
    asked: Remedy, attempt: Attempt, prover: Search, derive: Callable[[Remedy], list[Failure]]
) -> NotControllable:
    """The error for a question without a derivation; ``derive`` answers another one: [] where a proof exists.

    ``asked`` is the question (block, via, route, frozen) as a remedy that changes nothing.
    """
    failures = explained(attempt.failures, asked.block, prover)
    culprit = failures[0]
    found, tried = remedies(asked, failures, derive)
    if found:
        proved = "tried: both have a proof" if len(found) > 1 else "tried: it has a proof"
        hint = f"{'; or '.join(remedy.change for remedy in found)} ({proved})"
    else:
        hint = f"none of the {tried} changes that were tried helps, alone or two together; {culprit.rule} asks: {culprit.hint}"
    if culprit.hint.startswith(IMPLEMENT) and found:
        hint += f"; {culprit.hint}"
    frozen = f", frozen {_listed(sorted(asked.frozen))}" if asked.frozen else ""
    many = ", jointly" if asked.jointly else ""
    question = f"prove via {asked.via}, route {asked.route}{many}{frozen}"
    return NotControllable(culprit.place.describe(), stated(culprit, asked.block), hint, question, found)


def explained(failures: Iterable[Failure], block: Component, prover: Search) -> list[Failure]:
    """The minimal failures, the most telling first: that one's place is the culprit.

    A failure is minimal when its place has no derivation of the side that was asked, while everything
    below it passes: it is a leaf; or each premise of the rule that failed has a derivation of its own and
    only together they have none (a parameter with two uses, no inner function left before the outer one);
    or no part has anything to steer.  A parameter that is used twice explains more than one that is frozen,
    that more than a component without parameters; of equals the smallest, and of those the last is taken.
    """
    found = [_shrunk(f, prover) for failure in failures for f in _lowest(failure, prover)]
    failing = [f for f in found if _fails(f, block, prover)]
    telling = [f for f in failing if not f.place.component.is_skip]
    if not telling:  # a skip cannot be steered: what keeps Theorem 1 from the branches beside it?
        beside = [Place(node(block, f.place.path[:-1]), f.place.path[:-1]) for f in failing if f.place.path]
        telling = [f for place in beside for cause in _splits(place, prover) for f in _lowest(cause, prover)]
    telling = [*reversed(telling or failing or found)]
    return sorted(telling, key=lambda f: (-f.weight, len(leaves(f.place.component))))


def leaf_failure(place: Place, side: Side, jointly: bool = False) -> Failure:
    """The failure of a component about which no rule says anything."""
    component = place.component
    known = isinstance(component, InputControllable if side == "input" else OutputControllable)
    if side == "through":
        reason = "there is no inner function before the outer one"
        return Failure(place, f"{side} side", reason, "put a linear map before it", weight=-1, side=side)
    if jointly and updates_of(component, side):
        reason = "what moves its output serves one token, and no one change of it many"
        return Failure(place, f"{side} side", reason, "ask for each token, or the last one, by itself", side=side)
    reason = f"it has no parameter that {STEERED[side]}"
    if side == "input":
        hint = "a linear map, a scale or a bias before it"
    else:
        reason += ", and it cannot be undone from every target"
        hint = "a linear map or a bias after it"
    if not (known or component.children()) and component.parameters():
        reason = f"{type(component).__name__} does not implement {side.title()}Controllable"
        hint = f"{IMPLEMENT} {side}_updates in its class"
    return Failure(place, f"{side} side", reason, hint, side=side)


def _lowest(failure: Failure, prover: Search) -> Iterator[Failure]:
    if failure.rule == "theorem-1" and failure.weight != TWICE:  # said of a branch: it should carry f and g
        failure = replace(failure, side="through")
    below = failure.because or tuple(_between(failure, prover))
    if not below:
        yield failure
    for cause in below:
        yield from _lowest(cause, prover)


def _between(failure: Failure, prover: Search) -> Iterator[Failure]:
    """What keeps Theorem 1 from every split of a branch, where its rules said nothing."""
    if failure.rule == "through side" and failure.place.component.sequential:
        yield from _split(failure.place, prover)
    if failure.rule == "theorem-1" and failure.weight != TWICE:
        yield from (f for f in prover.attempt(failure.place, "through").failures if f.place != failure.place)
    if failure.rule == "input side" and is_about("theorem-1", failure.place.component):
        yield from _splits(failure.place, prover)


def _splits(place: Place, prover: Search) -> Iterator[Failure]:
    for part in place.parts():
        if part.component.sequential:
            yield from _split(part, prover)


def _split(branch: Place, prover: Search) -> Iterator[Failure]:
    """Why g∘f has no split: g fails wherever it starts, or what stands before the shortest g fails."""
    count = len(branch.component.children())
    for split in reversed(range(1, count)):
        if prover.attempt(branch.slice(split, count), "output").steps:
            inner = prover.attempt(branch.slice(0, split), "input")
            yield from () if inner.steps else inner.failures
            return
    yield from prover.attempt(branch.slice(1, count), "output").failures


def _shrunk(failure: Failure, prover: Search) -> Failure:
    """Theorem 1 names the whole sum; where one branch uses a parameter twice by itself, that part is the culprit."""
    if failure.rule != "theorem-1" or failure.weight != TWICE:
        return failure
    for branch in failure.place.parts():
        parts = branch.component.children() if branch.component.sequential else ()
        reads = [part.parameters() for part in parts]
        tied = [i for i, own in enumerate(reads) if any(overlap(own, other) for other in reads[:i] + reads[i + 1 :])]
        if tied:
            place = branch.slice(tied[0], tied[-1] + 1)
            if not prover.attempt(place, "through").steps:
                return replace(failure, place=place, side="through")
    return failure


def _fails(failure: Failure, block: Component, prover: Search) -> bool:
    """Whether the place of a failure has no derivation by another rule; an expert's last map is judged in its mixture."""
    place = failure.place
    if failure.rule[2:].startswith("mixture") and failure.rule[0] in "OT" and not place.component.chosen:
        place = Place(node(block, place.path[:-1]), place.path[:-1])
    return not prover.attempt(place, failure.side or "input").steps


def stated(failure: Failure, block: Component) -> str:
    """'rule on (its arguments): reason', the arguments in the user's own names."""
    place, rule = failure.place, failure.rule
    if rule.endswith("side"):  # no rule applies at the place: name the one that asked for it
        if not place.path or place.component.children():
            return failure.reason
        place = Place(node(block, place.path[:-1]), place.path[:-1])
        rule = _asking(place.component, failure)
    named = ", ".join(f"{letter} = {short(text)}" for letter, text in _arguments(rule, place, failure))
    return f"{rule} on ({named}): {failure.reason}" if named else f"{rule}: {failure.reason}"


def _asking(parent: Component, failure: Failure) -> str:
    """The rule of ``parent`` that needed the failed side of its part."""
    if failure.side == "through":
        return "T-before" if parent.sequential else "T-sum"
    if failure.side == "input" and parent.sequential:
        return "I-after" if failure.place.path[-1] == 0 else "I-before"
    asking = (rule.name for rule in RULES if rule.side == failure.side and is_about(rule.name, parent))
    return next(asking, f"{failure.side} side")


LETTERS = {
    "I-before": "pf", "I-after": "fq", "O-after-fixed": "pg", "O-through-bijection": "gq", "O-times": "gc",
    "O-normalised": "gn", "O-centred": "gn", "T-before": "pc",
}  # fmt: skip
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _arguments(rule: str, place: Place, failure: Failure) -> Iterator[tuple[str, str]]:
    """(letter in the rule's statement, component) for each argument."""
    rule, component = rule.removesuffix(" jointly"), place.component
    if rule == "theorem-1":
        terms = [p.describe() for p in component.children()] if is_about(rule, component) else [component.describe()]
        yield from zip(("s", "g∘f") if len(terms) == 2 else ("g∘f", *"stuvw"), terms, strict=False)
    elif rule[2:] == "mixture":
        parts = component.children() if component.chosen else (component,)
        yield from zip(("router", "inner", "last")[-len(parts) :], (p.describe() for p in parts), strict=True)
    elif rule in LETTERS:
        last = len(component.children()) - 1
        if failure.place.path[:-1] == place.path and failure.place != place:  # what follows the culprit plays no part
            last = max(failure.place.path[-1], 1)
        for letter, (start, stop) in zip(LETTERS[rule], ((0, last), (last, last + 1)), strict=True):
            yield letter, place.slice(start, stop).describe()
    elif component.outlet is None and is_about(rule, component):
        letter = "f" if rule[0] == "I" else "g"
        for i, part in enumerate(component.children()):
            yield letter + str(i + 1).translate(SUBSCRIPTS), part.describe()
    elif not component.children():
        yield "f" if rule[0] == "I" else "g", component.describe()


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
