"""What was reduced before, as long as the code that it speaks of is the same."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

from controllability.interfaces import Component
from controllability.prover.edits import nodes
from controllability.rules import RULES

ROOMS = tuple(
    f"controllability.{room}"
    for room in ("arrays", "components", "deltas", "execution", "interfaces", "rules", "solvers", "symbolic")
)


class Cache:
    """Results by question and by code: a rule that was changed meanwhile is reduced anew."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def recall(self, question: Any, component: Component, compute: Callable[[], Any]) -> Any:
        """The answer to ``question`` about ``component``, computed once."""
        key = (question, code_of(component))
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


def code_of(component: Component) -> tuple[Any, ...]:
    """Every function that has a part in a rule, a component or a delta: the objects themselves, so that none is confused."""
    rooms = sorted(name for name in [*sys.modules] if name.startswith(ROOMS))  # some are loaded on first use only
    ours = [f for name in rooms for value in vars(sys.modules[name]).values() for f in _functions(value, name)]
    rules = [f for rule in RULES for f in vars(rule).values() if callable(f)]
    foreign = {type(c) for _, c in nodes(component) if not type(c).__module__.startswith(ROOMS)}
    named = sorted(foreign, key=lambda c: (c.__module__, c.__qualname__))
    return (*ours, *rules, *(f for c in named for f in _functions(c, c.__module__)))


def _functions(value: Any, module: str) -> Iterator[Any]:
    if isinstance(value, type):
        if value.__module__ == module:
            yield from (f for f in vars(value).values() if callable(f) or isinstance(f, property | staticmethod))
    elif callable(value):
        yield value
