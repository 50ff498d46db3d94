"""The half of a layer that mixes positions: attention, a scan, a shift, a convolution.  (theory 8)

Theorem 1b reads the mixing only through the vector that the linear map behind it gets.  So all of it is one opaque input of the
block, and that map takes the patch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from architectures.feed_forward import Norm
from architectures.registry import StatePoint
from architectures.view import View
from controllability.components import Fixed, Mixed, Select, Sequence, Sum, Times
from controllability.interfaces import Component

LAYER_INPUT = StatePoint("")


def state(view: View) -> Select:
    """The residual state that enters the layer."""
    return Select(0, "hidden state", view.size("d"))


@dataclass(frozen=True)
class Mixer:
    """skip(x) + c · after(W a) + what stands beside it, a being what the map W behind the mixing reads.

    ``outer`` names that map, or several with spaces between: of those the one that the layer has.  ``entry`` is where x is seen,
    ``output`` where the sum is: by default what the feed-forward half reads, or the layer's output where there is none.
    """

    outer: str = "self_attn.o_proj"
    after: Callable[[View], Component | None] | None = None
    times: Callable[[View], Any] | None = None
    skip: Callable[[View], Component] | None = None
    beside: Callable[[View], Component] | None = None
    entry: StatePoint = LAYER_INPUT
    output: StatePoint | None = None

    def __call__(self, view: View) -> Component | None:
        names = self.outer.split()
        found = next((name for name in names if view.has(name)), None) if view.live else names[0]
        if found is None:
            return None  # it mixes nothing
        view.sites["inputs"] = (self.entry, StatePoint(found))
        if self.output is not None:
            view.sites["output"] = self.output
        x, branch = state(view), [Mixed(1, "mixed positions", view.size("m")), view.linear(found, "d", "m")]
        if self.after is not None and (more := self.after(view)) is not None:
            branch.append(more)
        if self.times is not None and (factor := self.times(view)) != 1:
            branch.append(Times(factor))
        terms = [x if self.skip is None else Sequence((x, self.skip(view))), Sequence(tuple(branch))]
        return Sum((*terms, *((Fixed(self.beside(view)),) if self.beside else ())))


def there(norm: Norm) -> Callable[[View], Component | None]:
    """A norm that only some layers, or models, have."""
    return lambda view: norm(view) if view.has(norm.module, default=True) else None
