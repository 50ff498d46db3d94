"""The contract a component fulfils: what it computes, what it reads, and how its input and output are moved.

Axis names used in every docstring: ``...`` tokens (any number of leading axes), ``d`` model width,
``h`` hidden width, ``in``/``out`` the sides of one linear map.
"""

import controllability.symbolic  # noqa: F401  makes symbols known to controllability.arrays
from controllability.deltas import added as added
from controllability.interfaces.component import (
    Combinator as Combinator,
    Component as Component,
    Product as Product,
    Sequence as Sequence,
    Size as Size,
    Sum as Sum,
)
from controllability.interfaces.condition import Condition as Condition, measure as measure
from controllability.interfaces.joint import (
    FitRows as FitRows,
    JointOptions as JointOptions,
    JointSolution as JointSolution,
    JointUpdate as JointUpdate,
)
from controllability.interfaces.param import Param as Param, Params as Params, overlap as overlap
from controllability.interfaces.paths import (
    Layout as Layout,
    Path as Path,
    Place as Place,
    leaves as leaves,
    node as node,
)
from controllability.interfaces.update import (
    Bijection as Bijection,
    InputControllable as InputControllable,
    OutputControllable as OutputControllable,
    Steerable as Steerable,
    Update as Update,
    first_open as first_open,
    updates_of as updates_of,
)

_RENAMED = {"Jointly": "JointUpdate", "Solved": "JointSolution", "Steering": "Update", "Together": "JointOptions"}


def __getattr__(name: str) -> object:
    if name in _RENAMED:
        raise ImportError(f"controllability.interfaces.{name} is called {_RENAMED[name]} now")
    raise AttributeError(f"module 'controllability.interfaces' has no attribute {name!r}")
