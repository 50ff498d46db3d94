"""A component that was written with the words of version 0.1 fails with one line that names the new word."""

from __future__ import annotations

import pytest

from controllability.interfaces import Component, OutputControllable, Steerable


@pytest.mark.parametrize(
    ("old", "new"), [("Steering", "Update"), ("Together", "JointOptions"), ("Solved", "JointSolution"), ("Jointly", "JointUpdate")]
)  # fmt: skip
def test_an_old_name_says_what_it_is_called_now(old, new):
    with pytest.raises(ImportError, match=f"^controllability.interfaces.{old} is called {new} now$"):
        exec(f"from controllability.interfaces import {old}")
    with pytest.raises(ImportError, match="cannot import name 'Steerings'"):
        exec("from controllability.interfaces import Steerings")


@pytest.mark.parametrize(("base", "old"), [(Steerable, "steerings"), (OutputControllable, "output_steerings")])
def test_an_old_method_says_what_it_is_called_now(base, old):
    with pytest.raises(TypeError, match=f"^Gain.{old} is called {old.replace('steerings', 'updates')} now$"):
        type("Gain", (Component, base), {old: lambda self, *_: ()})
