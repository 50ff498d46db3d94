"""The orders in which a context's chunks are absorbed, as paths from no patch to the whole one."""

import random
from collections.abc import Sequence
from itertools import permutations as every_order
from math import factorial
from typing import Any

from controllability.errors import BadInput
from controllability.instrument.states import Kept, State

FEW = 4  # chunks of which all orders are run
SAMPLED = 8


def orders_of(order: Any, count: int, permutations: int | None, seed: int) -> list[Kept]:
    """The orders that are asked for.  Raises ``BadInput``."""
    if permutations is not None and order != "all":
        raise BadInput("permutations says how many orders are drawn: it belongs to order='all'")
    if order in ("forward", "backward"):
        return [tuple(range(count))]
    if order == "all":
        wanted = permutations if permutations is not None else SAMPLED if count > FEW else factorial(count)
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= factorial(count):
            raise BadInput(f"permutations: {count} chunks have {factorial(count)} orders, got {wanted!r}")
        if count <= FEW:
            return sorted(random.Random(seed).sample([*every_order(range(count))], wanted))
        rng, drawn = random.Random(seed), dict[Kept, None]()
        while len(drawn) < wanted:
            drawn[tuple(rng.sample(range(count), count))] = None
        return [*drawn]
    if (
        isinstance(order, str)
        or not isinstance(order, Sequence)
        or sorted(map(str, order)) != sorted(map(str, range(count)))
    ):
        raise BadInput(
            f"order: choose forward, backward, all, or give a permutation of 0 … {count - 1}, got {order!r:.80}"
        )
    return [tuple(order)]


def path(order: Kept, backward: bool) -> list[State]:
    """The states from no patch to the whole one: chunks are added to the target, or (backward) taken from the source."""
    if backward:
        return [(tuple(sorted(order[i:])), tuple(sorted(order))) for i in range(len(order) + 1)]
    return [((), tuple(sorted(order[:i]))) for i in range(len(order) + 1)]
