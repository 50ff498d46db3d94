"""The contract a component fulfils: what it computes, what it reads, and how its input and output are moved.

Axis names used in every docstring: ``...`` tokens (any number of leading axes), ``d`` model width,
``h`` hidden width, ``in``/``out`` the sides of one linear map.
"""

import controllability.symbolic  # noqa: F401  makes symbols known to controllability.arrays
from controllability.deltas import added as added
from controllability.interfaces.component import Combinator as Combinator
from controllability.interfaces.component import Component as Component
from controllability.interfaces.component import Product as Product
from controllability.interfaces.component import Sequence as Sequence
from controllability.interfaces.component import Size as Size
from controllability.interfaces.component import Sum as Sum
from controllability.interfaces.condition import Condition as Condition
from controllability.interfaces.condition import measure as measure
from controllability.interfaces.joint import JointOptions as JointOptions
from controllability.interfaces.joint import JointSolution as JointSolution
from controllability.interfaces.joint import JointUpdate as JointUpdate
from controllability.interfaces.param import Param as Param
from controllability.interfaces.param import Params as Params
from controllability.interfaces.param import overlap as overlap
from controllability.interfaces.paths import Layout as Layout
from controllability.interfaces.paths import Path as Path
from controllability.interfaces.paths import Place as Place
from controllability.interfaces.paths import leaves as leaves
from controllability.interfaces.paths import node as node
from controllability.interfaces.update import Bijection as Bijection
from controllability.interfaces.update import InputControllable as InputControllable
from controllability.interfaces.update import OutputControllable as OutputControllable
from controllability.interfaces.update import Steerable as Steerable
from controllability.interfaces.update import Update as Update
from controllability.interfaces.update import first_open as first_open

_RENAMED = {"Jointly": "JointUpdate", "Solved": "JointSolution", "Steering": "Update", "Together": "JointOptions"}


def __getattr__(name: str) -> object:
    if name in _RENAMED:
        raise ImportError(f"controllability.interfaces.{name} is called {_RENAMED[name]} now")
    raise AttributeError(f"module 'controllability.interfaces' has no attribute {name!r}")
