"""How a component is moved: one parameter at a time, its input or its output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from controllability.arrays import Array
from controllability.deltas import Delta
from controllability.errors import SideConditionFailed
from controllability.interfaces.component import Component
from controllability.interfaces.condition import Condition, measure
from controllability.interfaces.joint import Jointly
from controllability.interfaces.param import Param, Params


@dataclass(frozen=True)
class Steering:
    """One way to change a component's output by moving one of its parameters.

    ``solve(params, x, gap)`` returns the delta that adds ``gap`` (..., out) to the output at
    input ``x`` (..., in); ``effect(x, delta)`` is what a delta adds to the output.  ``jointly`` does it for many tokens with one delta.
    """

    rule: str
    param: Param
    conditions: tuple[Condition, ...]
    solve: Callable[[Params, Array, Array], Delta]
    effect: Callable[[Array, Delta], Array]
    jointly: Jointly | None = None


class InputControllable(ABC):
    """f with, for admissible (x, x'), parameters θ' such that f(x; θ') = f(x'; θ).  [G, Def. 3]"""

    @abstractmethod
    def input_steerings(self) -> tuple[Steering, ...]:
        """The ways to do it, the preferred one first."""

    def steer_input(self, params: Params, x: Array, x_target: Array) -> dict[str, Delta]:
        """The patch with which the output at ``x`` is what it was at ``x_target`` (same shapes).

        Raises ``SideConditionFailed`` when no way is open at these numbers.
        """
        assert isinstance(self, Component)
        gap = self(params, x_target) - self(params, x)
        return first_open(self.input_steerings(), params, x, gap)


class OutputControllable(ABC):
    """g with, for admissible x and δ, parameters φ' such that g(x; φ') = g(x; φ) + δ.  [G, Def. 4]"""

    @abstractmethod
    def output_steerings(self) -> tuple[Steering, ...]:
        """The ways to do it, the preferred one first."""

    def steer_output(self, params: Params, x: Array, delta: Array) -> dict[str, Delta]:
        """The patch that adds ``delta`` (..., out) to the output at ``x`` (..., in).

        Raises ``SideConditionFailed`` when no way is open at these numbers.
        """
        return first_open(self.output_steerings(), params, x, delta)


class Steerable(InputControllable, OutputControllable):
    """A leaf whose output is affine in its own parameters: one construction serves both sides.

    The input rule is the output rule with gap = f(x') − f(x).
    """

    @abstractmethod
    def steerings(self, side: str) -> tuple[Steering, ...]:
        """The ways to add a gap to the output; ``side`` is 'I' or 'O' and names the rule."""

    def input_steerings(self) -> tuple[Steering, ...]:
        return self.steerings("I")

    def output_steerings(self) -> tuple[Steering, ...]:
        return self.steerings("O")


class Bijection(ABC):
    """A component that can be undone on its image, its parameters staying as they are."""

    @abstractmethod
    def invert(self, params: Params, y: Array) -> Array:
        """The x with self(params, x) = y."""

    def image_conditions(self) -> tuple[Condition, ...]:
        """What must hold for a target to be in the image; none for a bijection onto everything."""
        return ()

    def image_margin(self, params: Params, y: Array) -> Array:
        """How far each target (..., d) is from leaving the image, shape (..., 1); positive inside."""
        raise NotImplementedError(f"{type(self).__name__} has image conditions but no image_margin")


def first_open(steerings: tuple[Steering, ...], params: Params, x: Array, gap: Array) -> dict[str, Delta]:
    """The delta of the first steering whose conditions hold on these numbers."""
    failure: SideConditionFailed | None = None
    for steering in steerings:
        try:
            for condition in steering.conditions:
                measure(condition, x, gap)
        except SideConditionFailed as failed:
            failure = failure or failed
            continue
        return {str(steering.param): steering.solve(params, x, gap)}
    assert failure is not None
    raise failure
