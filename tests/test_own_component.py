"""A component of somebody's own at every level of proof: what fails, what is skipped, what is explained."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import architectures
import controllability as ct
from controllability.arrays import arithmetic
from controllability.components import Linear, residual
from controllability.interfaces import Component, Param

ROOT = Path(__file__).parent.parent


up, down = Linear(Param("up", ("h", "d"))), Linear(Param("down", ("d", "h")))


@dataclass(frozen=True)
class Own(Component):
    """A function of somebody's own."""

    function: object
    name: str = "my part"

    def __call__(self, params, x):
        return self.function(x)

    def describe(self):
        return self.name

    def output_width(self, width):
        return width


def whole(function, level, **options):
    return ct.prove(residual(up >> Own(function) >> down), **options).check(level)[-1]


def broken(x):
    raise ValueError("no such\nthing")


@pytest.mark.parametrize("level", ["symbolic", "exact", "numeric"])
def test_an_exception_inside_a_component_is_a_failure_with_its_text(level):
    row = whole(broken, level)
    assert row["status"] == "failed"
    assert row["method"].startswith("my part fails (ValueError: no such thing)")
    assert whole(lambda x: x.no_such_method(), level)["status"] == "failed"
    assert whole(lambda x: x * x, level)["status"] == "passed"


def test_what_takes_no_such_numbers_is_skipped():
    row = whole(np.exp, "symbolic")
    assert row["status"] == "skipped"
    assert "runs on float64 numbers and does not take those of this level (TypeError" in row["method"]


def test_a_float_in_exact_arithmetic_gets_a_hint():
    block = residual(up >> Own(lambda x: 0.1 * x) >> down)
    with pytest.raises(ct.BadInput, match=r"number\(Fraction\(1, 10\)\)"):
        ct.prove(block).construct(*ct.sample(block, "rational"))
    row = whole(lambda x: 0.1 * x, "exact", via="output", jointly=True)
    assert (row["status"], "Fraction(1, 10)" in row["method"]) == ("failed", True)

    def as_told(x):
        return arithmetic(x).number(Fraction(1, 10)) * x

    block = residual(up >> Own(as_told) >> down)
    ct.prove(block).construct(*ct.sample(block, "rational"))
    assert whole(as_told, "exact", via="output", jointly=True)["status"] == "passed"


def turned(x):
    middle = x.shape[-1] // 2
    return np.concatenate([-x[..., middle:], x[..., :middle]], -1)


def test_parts_are_put_together_in_index_notation():
    assert whole(turned, "symbolic")["status"] == "passed"
    assert whole(lambda x: np.concatenate([x, x], -1)[..., : x.shape[-1]], "symbolic")["status"] == "passed"
    assert whole(lambda x: np.stack([x, x])[0], "symbolic")["status"] == "skipped"  # no other function of NumPy


def test_a_view_and_a_state_point_are_explained():
    reference = (ROOT / "docs" / "reference.md").read_text()
    for word in ("view.param(name, *sizes)", "`architectures.StatePoint`", "`Seen`"):
        assert word in reference
    for documented in (architectures.View.param, architectures.StatePoint):
        assert ">>>" in documented.__doc__
