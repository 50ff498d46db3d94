"""How a component is moved: one parameter at a time, its input or its output."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from controllability.arrays import Array, arithmetic
from controllability.deltas import Delta, PatchedMatrix
from controllability.errors import BadInput, SideConditionFailed
from controllability.interfaces.component import Component
from controllability.interfaces.condition import Condition, measure
from controllability.interfaces.joint import JointUpdate
from controllability.interfaces.param import Param, Params


@dataclass(frozen=True)
class Update:
    """One way to change a component's output by moving one of its parameters.

    ``kind`` names the rule: linear, bias, scale, experts.  ``solve(params, x, delta)`` returns the change of ``param`` that adds
    ``delta`` (..., out) to the output at input ``x`` (..., in); ``effect(params, x, change)`` is what a change adds to the output.
    ``jointly`` does it for many tokens with one change.
    """

    kind: str
    param: Param
    conditions: tuple[Condition, ...]
    solve: Callable[[Params, Array, Array], Delta]
    effect: Callable[[Params, Array, Any], Array]
    jointly: JointUpdate | None = None

    def rule(self, side: str) -> str:
        """The name of the leaf's own rule on one side, "input" or another."""
        return f"{'I' if side == 'input' else 'O'}-{self.kind}"


class _OldWords:
    """Refuses a class that states its updates under the words of version 0.1."""

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        for old in ("input_steerings", "output_steerings", "steerings"):
            if old in vars(cls):
                raise TypeError(f"{cls.__name__}.{old} is called {old.replace('steerings', 'updates')} now")


class InputControllable(_OldWords, ABC):
    """f with, for admissible (x, x'), parameters θ' such that f(x; θ') = f(x'; θ).  [G, Def. 3]"""

    @abstractmethod
    def input_updates(self) -> tuple[Update, ...]:
        """The ways to do it, the preferred one first."""

    def steer_input(self, params: Params, x: Array, x_target: Array) -> dict[str, Delta]:
        """The patch with which the output at ``x`` is what it was at ``x_target`` (same shapes).

        Raises ``BadInput`` for a length that the parameters do not take, ``SideConditionFailed`` when no way is open at these numbers.
        """
        assert isinstance(self, Component)
        delta = _value(self, params, "x_target", x_target) - _value(self, params, "x", x)
        return first_open(self.input_updates(), params, x, delta)


class OutputControllable(_OldWords, ABC):
    """g with, for admissible x and δ, parameters φ' such that g(x; φ') = g(x; φ) + δ.  [G, Def. 4]"""

    @abstractmethod
    def output_updates(self) -> tuple[Update, ...]:
        """The ways to do it, the preferred one first."""

    def steer_output(self, params: Params, x: Array, delta: Array) -> dict[str, Delta]:
        """The patch that adds ``delta`` (..., out) to the output at ``x`` (..., in).

        Raises ``BadInput`` for lengths that do not fit, ``SideConditionFailed`` when no way is open at these numbers.
        """
        assert isinstance(self, Component)
        arithmetic(delta)
        size = _value(self, params, "x", x).shape[-1:]
        if delta.shape[-1:] != size:
            raise BadInput(
                f"delta has shape {tuple(delta.shape)}, but {self.describe()} gives vectors of length {size[0]}"
            )
        return first_open(self.output_updates(), params, x, delta)


class Steerable(InputControllable, OutputControllable):
    """A leaf whose output is affine in its own parameters: one construction serves both sides.

    On the input side the wanted change is f(x') − f(x).
    """

    takes_patched = False  # whether it computes with a parameter on which a patch of each token's own lies

    @abstractmethod
    def updates(self) -> tuple[Update, ...]:
        """The ways to add a wanted change δ to the output, the preferred one first."""

    def input_updates(self) -> tuple[Update, ...]:
        return self.updates()

    def output_updates(self) -> tuple[Update, ...]:
        return self.updates()


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


def _value(component: Component, params: Params, name: str, x: Array) -> Array:
    """The output at ``x``.  Raises ``BadInput`` where the parameters take inputs of another length."""
    arithmetic(x)
    y = cause = None
    try:
        y = component(params, x) if x.shape else None
    except BadInput:
        raise
    except (ValueError, RuntimeError) as error:  # NumPy's and torch's words for it
        cause = error
    if y is None or (y.shape[-1] != x.shape[-1] == component.output_width(x.shape[-1])):  # the last: it was spread
        values = {str(param): param.value(params) for param in component.own_parameters()}
        arrays = {key: value.base if isinstance(value, PatchedMatrix) else value for key, value in values.items()}
        held = ", ".join(f"{key} has shape {tuple(array.shape)}" for key, array in arrays.items())
        raise BadInput(
            f"{name} has shape {tuple(x.shape)}, which {component.describe()} does not take: {held}"
        ) from cause
    return y


def updates_of(component: Component, *sides: str) -> tuple[Update, ...]:
    """The updates that a component states for these sides, "input" and "output"; none where it states nothing."""
    found: tuple[Update, ...] = ()
    if "input" in sides and isinstance(component, InputControllable):
        found += component.input_updates()
    if "output" in sides and isinstance(component, OutputControllable):
        found += component.output_updates()
    return found


def first_open(updates: tuple[Update, ...], params: Params, x: Array, delta: Array) -> dict[str, Delta]:
    """The delta of the first update whose conditions hold on these numbers."""
    failure: SideConditionFailed | None = None
    for update in updates:
        try:
            for condition in update.conditions:
                measure(condition, x, delta)
        except SideConditionFailed as failed:
            failure = failure or failed
            continue
        return {str(update.param): update.solve(params, x, delta)}
    assert failure is not None
    raise failure
