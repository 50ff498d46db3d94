"""The contract a component fulfils: what it computes, what it reads, and how its input and output are moved.

Axis names used in every docstring: ``...`` tokens (any number of leading axes), ``d`` model width,
``h`` hidden width, ``in``/``out`` the sides of one linear map.
"""

import controllability.symbolic  # noqa: F401  makes symbols known to controllability.arrays
from controllability.deltas import added as added
from controllability.interfaces.component import Component as Component
from controllability.interfaces.component import Product as Product
from controllability.interfaces.component import Sequence as Sequence
from controllability.interfaces.component import Sum as Sum
from controllability.interfaces.condition import Condition as Condition
from controllability.interfaces.condition import measure as measure
from controllability.interfaces.joint import Jointly as Jointly
from controllability.interfaces.joint import Solved as Solved
from controllability.interfaces.joint import Together as Together
from controllability.interfaces.param import Param as Param
from controllability.interfaces.param import Params as Params
from controllability.interfaces.param import overlap as overlap
from controllability.interfaces.paths import Path as Path
from controllability.interfaces.paths import Place as Place
from controllability.interfaces.paths import leaves as leaves
from controllability.interfaces.paths import node as node
from controllability.interfaces.update import Bijection as Bijection
from controllability.interfaces.update import InputControllable as InputControllable
from controllability.interfaces.update import OutputControllable as OutputControllable
from controllability.interfaces.update import Steerable as Steerable
from controllability.interfaces.update import Steering as Steering
from controllability.interfaces.update import first_open as first_open
