"""How a leaf moves its output: by a rank-one change of a matrix, entry by entry, by an offset, or expert by expert.

A leaf's output is affine in each of its parameters, so one formula serves both sides: the change of the parameter that
adds a wanted δ to the output.  Source: [D] Thm 2.2; [G] lem:output_weight, lem:output_elem_multiply, lem:output_bias.
"""

from collections.abc import Callable
from dataclasses import replace

from controllability.arrays import Array, arithmetic, dot
from controllability.components.joint_updates import one_bias, one_matrix, one_set_of_experts, one_vector
from controllability.deltas import Delta, ExpertLowRank, LowRank, Shift
from controllability.interfaces import Component, Condition, Param, Params, Update
from controllability.solvers.right_vector import right_vector

INFINITE = float("inf")
CHOSEN = "(chosen experts)"  # names that a mixture binds for its experts, not stored parameters
SHARES = "(shares of the experts)"


def rank_one(leaf: Component, weight: Param, hint: str, transposed: bool) -> Update:
    """y = W x: ΔW = δ xᵀ/‖x‖², the unique solution of least Frobenius norm, for x ≠ 0."""
    nonzero = Condition(f"the input of {weight} is not zero", leaf.describe(), _size, hint)
    joint = one_matrix(weight, leaf.describe(), leaf.width, transposed)
    solve = lambda params, x, delta: rank_one_change(x, delta, transposed)  # noqa: E731
    return Update("linear", weight, (nonzero,), solve, lambda params, x, change: change.effect(x), joint)


def offset(leaf: Component, bias: Param) -> Update:
    """y = … + b: Δb = δ, with no condition."""
    solve = lambda params, x, delta: offset_change(x, delta)  # noqa: E731
    return Update("bias", bias, (), solve, lambda params, x, change: change.value, one_bias(bias, leaf.describe()))


def elementwise(leaf: Component, weight: Param, stored: Callable[[Params, Array], Delta]) -> Update:
    """y = m ∘ x: Δm = δ/x, 0 where both are 0; ``stored`` is a change of m as the parameter can hold it."""
    statement = f"no input coordinate of {weight} is zero where its output must change"
    hint = f"a scale cannot move a zero: add a bias after {leaf.describe()}"
    condition = Condition(statement, leaf.describe(), _smallest_needed_entry, hint)
    joint = one_vector(weight, leaf.describe(), lambda x: x, stored, "δ_t/x_t")
    solve = lambda params, x, delta: stored(params, quotient(x, delta))  # noqa: E731
    return Update("scale", weight, (condition,), solve, lambda params, x, change: change.value * x, joint)


def expertwise(leaf: Component, weight: Param, transposed: bool, count: Callable[[Params], int]) -> Update:
    """y_j = W_e x_j: ΔW_e = δ_j x_jᵀ/‖x_j‖² for every chosen expert whose output must change."""
    statement = f"no chosen expert's input of {weight} is zero where its output must change"
    hint = "an expert's matrix cannot move what it sees as zero: ask for via='output'"
    condition = Condition(statement, leaf.describe(), _smallest_needed_row, hint)
    joint = one_set_of_experts(
        weight, leaf.describe(), leaf.width, transposed, lambda params: params[CHOSEN], count
    )  # fmt: skip
    solve = lambda params, x, delta: expert_change(params[CHOSEN], x, delta, transposed, count(params))  # noqa: E731
    return Update("experts", weight, (condition,), solve, _experts_effect, joint)


def rank_one_change(x: Array, delta: Array, transposed: bool) -> Delta:
    """δ xᵀ/‖x‖²."""
    xp = arithmetic(x)
    if xp.exact:
        right = x / dot(x, x)
    else:  # x/‖x‖² without squaring a number that is too large or too small to be squared
        size = xp.largest(x)
        unit = x / size
        right = unit / (dot(unit, unit) * size)
    return LowRank(delta[..., None, :], right[..., None, :], transposed)


def turned(change: Delta, x: Array, others: Array) -> Delta:
    """The same change at ``x`` (N, in), which other inputs (N, T, in) feel least: rank-one changes of a matrix have that freedom."""
    if type(change) is not LowRank or change.right.shape[-2] != 1:
        return change
    return replace(change, right=right_vector(x, others)[..., None, :])


def offset_change(x: Array, delta: Array) -> Delta:
    """δ itself, whatever x is."""
    return Shift(delta)


def quotient(x: Array, delta: Array) -> Array:
    """δ/x, 0 where x is 0."""
    xp = arithmetic(x, delta)
    idle = xp.is_zero(x)
    return xp.where(idle, xp.zeros_like(delta), delta / xp.where(idle, x + 1, x))


def expert_change(index: Array, x: Array, delta: Array, transposed: bool, experts: int) -> ExpertLowRank:
    """δ_j x_jᵀ/‖x_j‖² for each chosen expert, 0 where x_j is 0."""
    xp = arithmetic(x, delta)
    x = spread(x, index)
    # x/‖x‖² without squaring a number that is too large or too small to be squared
    size = dot(x, x) if xp.exact else xp.largest(x)
    size = xp.where(xp.is_zero(size), size + 1, size)
    unit = x / size
    norm = dot(unit, unit)
    right = unit if xp.exact else unit / (xp.where(xp.is_zero(norm), norm + 1, norm) * size)
    return ExpertLowRank(delta[..., None, :], right[..., None, :], transposed, index, experts)


def spread(x: Array, index: Array) -> Array:
    """(..., 1 or k, in) -> (..., k, in): every chosen expert reads the same token."""
    k = index.shape[-1]
    return x if x.shape[-2] == k else arithmetic(x).repeated(x, k)


def _experts_effect(params: Params, x: Array, change: ExpertLowRank) -> Array:
    """A change of its own for each token's experts, or one set of experts that serves all tokens."""
    return change.effect(x) if change.left.ndim > 3 else change.routed(x, params[CHOSEN])


def _size(x: Array, delta: Array) -> Array:
    xp = arithmetic(x)
    return dot(x, x) if xp.exact else xp.largest(x)


def _smallest_needed_entry(x: Array, delta: Array) -> Array:
    xp = arithmetic(x, delta)
    # where nothing has to change a zero does no harm: such entries count as far from zero
    far = xp.zeros_like(x) + (1 if xp.exact else INFINITE)
    return xp.smallest(xp.where(xp.is_zero(delta), far, x))


def _smallest_needed_row(x: Array, delta: Array) -> Array:
    xp = arithmetic(x, delta)
    size = dot(x, x) if xp.exact else xp.largest(x)
    needed = dot(delta, delta) if xp.exact else xp.largest(delta)
    far = xp.zeros_like(needed) + (1 if xp.exact else INFINITE)
    return xp.smallest(xp.where(xp.is_zero(needed), far, size + xp.zeros_like(needed))[..., 0])
