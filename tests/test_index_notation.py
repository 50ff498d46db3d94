"""Index notation against numbers: what is reduced, named, put in or summed keeps its value, at explicit sizes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import sympy

import controllability as ct
from controllability.arrays import ARITHMETICS
from controllability.components import Activation, Linear
from controllability.errors import NotExact
from controllability.interfaces import Param
from controllability.rules.schema import undefined
from controllability.symbolic.array_names import unfold_newest, unfolded_to_zero
from controllability.symbolic.definitions import Definitions, definitions
from controllability.symbolic.indexed import IndexedArray
from controllability.symbolic.normal_form import normal_form
from controllability.symbolic.sums import summed

N, M, H, E = (sympy.Symbol(s, integer=True, positive=True) for s in "nmhe")
INDEXED = ARITHMETICS["indexed"]
square, silu = Linear(Param("W", ("d", "d"))), Activation("silu")


def test_rows_one_after_the_other_are_numbered_as_numpy_does():
    """(n·m,) as (n, m), back, and what is put between them; at n = 3 rows of m = 2."""
    x = IndexedArray.named("x", (3 * M,))
    rows = x.reshape(3, -1)
    assert rows.shape == (3, M)
    assert rows.reshape(-1).entry == x.entry
    y = IndexedArray.named("y", (3, M))
    assert y.reshape(-1).reshape(3, -1).entry == y.entry
    plain = np.arange(6)
    i, j = (sympy.Symbol(f"i_{p}", integer=True, nonnegative=True) for p in (1, 0))
    for a, b in product(range(3), range(2)):
        (place,) = rows.entry.subs({M: 2}).xreplace({i: sympy.Integer(a), j: sympy.Integer(b)}).args
        assert plain[int(place)] == plain.reshape(3, -1)[a, b]
    for k in range(6):
        one, two = y.reshape(-1).entry.subs({M: 2}).xreplace({j: sympy.Integer(k)}).args
        assert (int(one), int(two)) == divmod(k, 2)


def test_index_notation_agrees_with_matrices():
    """Sums over symbolic ranges against the same sums written out, at n = 3, m = 2."""
    W, x = IndexedArray.named("W", (M, N)), IndexedArray.named("x", (N,))
    values = {"W": sympy.Matrix(2, 3, [1, 2, 3, 4, 5, 7]), "x": sympy.Matrix([2, -1, 5])}

    def number(e):
        e = e.subs({N: 3, M: 2}).doit()
        return e.replace(lambda a: str(a.func) == "W", lambda a: values["W"][a.args[0], a.args[1]]).replace(
            lambda a: str(a.func) == "x", lambda a: values["x"][a.args[0]]
        )

    product = W @ x
    i = sympy.Symbol("i_0", integer=True, nonnegative=True)
    assert product.shape == (M,)
    assert [number(product.entry.subs(i, k)) for k in range(2)] == list(values["W"] * values["x"])
    assert number((x * x).sum(-1).entry) == 30
    assert number((product * product).sum(-1).entry) == sum(e**2 for e in values["W"] * values["x"])
    assert (x[..., None, :] - x).entry == 0
    assert number(x[..., :1].entry) == 2
    assert number((W.swapaxes(-1, -2) @ product).sum(-1).entry) == sum(values["W"].T * values["W"] * values["x"])
    with pytest.raises(ct.BadInput, match="do not broadcast"):
        W @ IndexedArray.named("y", (M,))


def test_a_sum_is_linear_and_knows_its_constants():
    i, a = sympy.Symbol("i", integer=True), sympy.Symbol("a")
    f, g = sympy.Function("f"), sympy.Function("g")
    assert summed(a * f(i) + 2 * g(i) / a, i, N) - a * summed(f(i), i, N) - 2 * summed(g(i), i, N) / a == 0
    assert summed(a, i, N) == a * N
    assert summed(f(i) / (1 + a), i, N) * (1 + a) - summed(f(i), i, N) == 0
    assert summed(f(i) * summed(g(i), i, M), i, N) == summed(f(i), i, N) * summed(g(i), i, M)
    assert summed(f(i), i, N) != summed(f(i), i, M)
    assert summed(f(i) ** 2, i, N) != summed(f(i), i, N) ** 2
    assert summed(f(i) / (g(i) - a), i, N) + summed(f(i) / (a - g(i)), i, N) == 0


# ------------------------------------------------------------------------------------- random expressions


def whole(a: np.ndarray) -> np.ndarray:
    """A function of whole arrays: every entry reads all of them, and how many they are."""
    return np.cos(a) + a * np.sin(a.sum()) / a.size + 2


class Numbers:
    """The value of an entry at explicit sizes, with numbers for the given arrays: sums are sums, nothing is reduced."""

    def __init__(self, table: Definitions, sizes: dict, given: dict[str, np.ndarray]) -> None:
        self.table, self.sizes, self.given = table, sizes, given

    def array(self, shape, entry, letter: str = "i") -> np.ndarray:
        shape = tuple(int(self.at(sympy.sympify(n), {})) for n in shape)
        values = np.empty(shape)
        for at in np.ndindex(*shape):
            where = {f"{letter}_{p}": k for p, k in enumerate(reversed(at))}
            values[at] = self.at(entry, where)
        return values

    def named(self, name: str) -> np.ndarray:
        if name not in self.given:
            x = self.table.arrays[name]
            self.given[name] = self.array(x.shape, x.entry)
        return self.given[name]

    def read(self, e) -> np.ndarray:
        """The array that stands as an argument of an undefined function."""
        if e.is_Symbol:
            return self.named(str(e))
        assert str(e.func) == "array", e
        return self.array(e.args[1:], e.args[0], "j")

    def at(self, e, where) -> float:
        if e.is_Number:
            return float(e)
        if e.is_Symbol:
            if str(e) in where:
                return where[str(e)]
            return self.sizes[e] if e in self.sizes else float(self.named(str(e)).reshape(()))
        if isinstance(e, sympy.Sum):
            ranges = [range(round(self.at(high, where)) + 1) for _, _, high in e.limits]
            names = [str(bound) for bound, *_ in e.limits]
            return sum(self.at(e.function, where | dict(zip(names, at, strict=True))) for at in product(*ranges))
        if isinstance(e, sympy.KroneckerDelta):
            return float(self.at(e.args[0], where) == self.at(e.args[1], where))
        if str(e.func) == "whole":
            values, places = whole(self.read(e.args[0])), e.args[1:]
            long = values.reshape([n for n in values.shape if n != 1])
        elif isinstance(e, sympy.core.function.AppliedUndef):
            values, places = self.named(str(e.func)), e.args
            if str(e.func) == "expert":  # it reads nothing that matters here
                places = places[1:]
            long = values.reshape([n for n in values.shape if n != 1])
        else:
            return float(e.func(*(sympy.Float(self.at(a, where), 30) for a in e.args)))
        return float(long[tuple(round(self.at(p, where)) for p in places)])


SIZES = [{N: 2, M: 3, H: 2, E: 4}, {N: 3, M: 2, H: 2, E: 5}]
SHAPES = {"x": (N,), "y": (N,), "z": (M,), "W": (M, N), "A": (N, N), "g": (2 * H,), "V": (E, M, N), "one": (1,)}


class Random:
    """A random expression, built at once from arrays of symbolic size and from numbers."""

    def __init__(self, seed: int, table: Definitions) -> None:
        self.rng, self.table = np.random.default_rng(seed), table
        sizes = SIZES[seed % len(SIZES)]
        made = {n: tuple(int(sympy.sympify(s).subs(sizes)) for s in shape) for n, shape in SHAPES.items()}
        given = {n: self.rng.uniform(0.5, 1.5, shape) for n, shape in made.items()}
        given["expert"] = self.rng.permutation(sizes[E])[: sizes[M]].astype(float)
        self.numbers = Numbers(table, sizes, dict(given))
        self.pool = [(IndexedArray.named(n, SHAPES[n]), given[n]) for n in SHAPES]
        self.index = (
            undefined("expert", (M,), IndexedArray.named("x", (N,)), distinct=True),
            given["expert"].astype(int),
        )

    def pick(self, *ndim: int):
        fitting = [pair for pair in self.pool if not ndim or pair[0].ndim in ndim]
        recent = fitting[-6:] if self.rng.random() < 0.7 else fitting
        return recent[self.rng.integers(len(recent))]

    def grown(self, steps: int):
        """The last of so many random operations."""
        while steps:
            kind = self.rng.choice(KINDS)
            try:
                made, value = getattr(self, kind)()
            except (ct.BadInput, ValueError):  # shapes that do not fit
                continue
            if value.ndim > 3 or abs(value).max() > 1e3 or made.entry.count_ops() > 60:
                continue
            if self.rng.random() < 0.4:
                made = INDEXED.name(made)
            self.pool.append((made, value))
            steps -= 1
        return self.pool[-1]

    def combined(self):
        (a, u), (b, v) = self.pick(), self.pick()
        kind = self.rng.choice(["+", "-", "*", "/"])
        made = {"+": a + b, "-": a - b, "*": a * b}.get(kind)
        if made is None:
            return a / (b * b + 1), u / (v * v + 1)
        return made, {"+": u + v, "-": u - v, "*": u * v}[kind]

    def total(self):
        a, u = self.pick(1, 2, 3)
        axis = -int(self.rng.integers(1, a.ndim + 1))
        keep = bool(self.rng.random() < 0.5)
        return a.sum(axis, keepdims=keep), u.sum(axis, keepdims=keep)

    def multiplied(self):
        (a, u), (b, v) = self.pick(1, 2), self.pick(1, 2)
        if a.shape[-1] != (b.shape[0] if b.ndim == 1 else b.shape[-2]):
            raise ValueError
        return a @ b, u @ v

    def turned(self):
        a, u = self.pick(2, 3)
        return a.swapaxes(-1, -2), u.swapaxes(-1, -2)

    def rooted(self):
        a, u = self.pick()
        return INDEXED.sqrt(a * a + 1), np.sqrt(u * u + 1)

    def squared_root(self):
        """√(c·a²): the absolute value, whatever the sign."""
        a, u = self.pick()
        return INDEXED.sqrt(a * a * 4), 2 * abs(u)

    def function(self):
        a, u = self.pick(1, 2)
        if all(n == 1 for n in a.shape):
            raise ValueError
        return undefined("whole", a.shape, a), whole(u)

    def half(self):
        a, u = self.pick(1, 2)
        if a.shape[-1] != 2 * H:
            raise ValueError
        h = self.numbers.sizes[H]
        part = [(np.s_[..., :H], np.s_[..., :h]), (np.s_[..., H:], np.s_[..., h:]), (np.s_[..., 1::2],) * 2]
        ours, plain = part[self.rng.integers(3)]
        return a[ours], u[plain]

    def first(self):
        a, u = self.pick(1, 2)
        return a[..., :1], u[..., :1]

    def row(self):
        a, u = self.pick(1, 2)
        return a[..., None, :], u[..., None, :]

    def gathered(self):
        (index, places), (made, value) = self.index, self.pool[list(SHAPES).index("V")]
        return made[index], value[places]

    def matched(self):
        """Σ_j [e_i = e_j] a_j with no expert chosen twice."""
        (index, places), (a, u) = self.index, self.pick(1)
        if a.shape != (M,):
            raise ValueError
        same = index[..., :, None] == index[..., None, :]
        there = places[:, None] == places[None, :]
        return INDEXED.where(same, a, INDEXED.zeros_like(a)).sum(-1), np.where(there, u, 0).sum(-1)


KINDS = ("combined", "combined", "total", "multiplied", "turned", "rooted", "squared_root", "function", "function",
         "half", "first", "row", "gathered", "matched")  # fmt: skip


def differs(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(abs(found - wanted).max() / (1 + abs(wanted).max()))


@pytest.mark.parametrize("seed", range(40))
def test_random_expressions_keep_their_value(seed):
    """As built, in normal form, and with names written out: the same numbers."""
    with definitions(Definitions()) as table:
        random = Random(seed, table)
        made, wanted = random.grown(8)
        entry = made.entry
        assert differs(random.numbers.array(made.shape, entry), wanted) < 1e-9
        for _ in range(6):
            entry = normal_form(entry)
            assert differs(random.numbers.array(made.shape, entry), wanted) < 1e-9, entry
            longer = unfold_newest(table, entry)
            if longer == entry or longer.count_ops() > 150:
                break
            entry = longer
            assert differs(random.numbers.array(made.shape, entry), wanted) < 1e-9, entry


@pytest.mark.parametrize("seed", range(20))
def test_what_is_different_is_not_reduced_to_0(seed):
    """Two random expressions of one shape: their difference is 0 only where the numbers agree."""
    with definitions(Definitions()) as table:
        random = Random(100 + seed, table)
        random.grown(10)
        pairs = [(a, b) for i, a in enumerate(random.pool) for b in random.pool[:i] if a[0].shape == b[0].shape][-12:]
        assert pairs
        for (a, u), (b, v) in pairs:
            if (a - b).entry.count_ops() < 60 and unfolded_to_zero(table, normal_form((a - b).entry)) == 0:
                assert differs(u, v) < 1e-9


# --------------------------------------------------------------------- different things that must look different


def reduced(difference: IndexedArray, table: Definitions):
    return unfolded_to_zero(table, normal_form(difference.entry))


def test_a_part_of_an_array_is_another_array_than_the_whole():
    with definitions(Definitions()) as table:
        x = IndexedArray.named("x", (2 * H,))
        parts = x, x[..., :H], INDEXED.name(x * 2)[..., :H], INDEXED.name(x * 2)
        of = [undefined("whole", (H,), part) for part in parts]
        assert len({f.entry for f in of}) == len(of)
        assert all(reduced(f - g, table) != 0 for i, f in enumerate(of) for g in of[:i])


def test_an_argument_keeps_its_own_indices():
    """F(A)ᵀ is not F(Aᵀ)ᵀ, and F(x∘y)₀ not F(x·y₀)₀, also where the arguments are written out."""
    with definitions(Definitions()) as table:
        A, x, y = (IndexedArray.named(n, s) for n, s in (("A", (N, N)), ("x", (N,)), ("y", (N,))))

        def f(of: IndexedArray) -> IndexedArray:
            made = undefined("whole", of.shape, of)
            return IndexedArray(made.shape, unfold_newest(table, made.entry))

        turned = undefined("whole", (N, N), A.swapaxes(-1, -2)).swapaxes(-1, -2)
        assert reduced(f(A * 1).swapaxes(-1, -2) - turned, table) != 0
        assert reduced(f(x * y)[..., :1] - f(x * y[..., :1])[..., :1], table) != 0
        assert reduced(f(x * y) - f(y * x), table) == 0


def test_a_root_says_what_its_equation_says_and_no_more():
    x = IndexedArray.named("x", (N,))
    size = IndexedArray.named("q", (1,))
    wrong = {
        "nothing of the unknown": lambda mu: INDEXED.mean(x * x),
        "more than one sum": lambda mu: INDEXED.mean(x * x * mu.entry) + 1,
        "the unknown outside": lambda mu: INDEXED.mean(x / (x - mu)) * mu,
    }
    with definitions(Definitions()) as table:
        for function in wrong.values():
            with pytest.raises(NotExact, match="is to be the root"):
                INDEXED.root("mu", function, size)
        assert not table.relations
        one, two = (INDEXED.root("mu", lambda mu: INDEXED.mean(x / (x - mu)), s) for s in (size, size * 2))
        assert one.entry != two.entry
        assert (INDEXED.mean(x / (x - one)) * 2 - INDEXED.mean(x / (x - two))).entry == 0


def test_planes_of_numbers_are_those_that_are_summed_in_index_notation():
    """Entry (e, i, j) of the stored change is Σ_k [expert k is e]·(matrix k)_ij, in numbers as in symbols."""
    numbers = np.random.default_rng(0)
    matrices, index = numbers.normal(size=(2, 3, 4, 5)), np.array([[1, 5, 3], [0, 2, 1]])
    wanted = np.zeros((2, 6, 4, 5))
    for token, k in product(range(2), range(3)):
        wanted[token, index[token, k]] += matrices[token, k]
    assert (ARITHMETICS["numpy"].planes(matrices, index, 6) == wanted).all()
    k, m, n, experts = sympy.symbols("k m n E", integer=True, positive=True)
    x = IndexedArray.named("x", (k, m, n))
    chosen = undefined("expert", (k,), IndexedArray.named("v", (n,)), distinct=True)
    planes = ARITHMETICS["indexed"].planes(x, chosen, experts)
    assert planes.shape == (experts, m, n)
    assert (planes[chosen] - x).entry == 0
    assert (planes[chosen] - 2 * x).entry != 0


def test_experts_in_one_matrix_are_the_same_in_three_axes_and_back():
    experts, m, n = sympy.symbols("E m n", integer=True, positive=True)
    stacked = IndexedArray.named("W", (experts * m, n))
    apart = stacked.reshape(experts, -1, n)
    assert apart.shape == (experts, m, n)
    assert apart.reshape(experts * m, n).reshape(experts, -1, n).entry == apart.entry
