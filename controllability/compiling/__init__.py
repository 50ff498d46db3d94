"""A context turned into one ordinary set of weights: token sets, exact or least squares, measured, written, checked."""

from controllability.compiling.compiled import Compiled as Compiled
from controllability.compiling.compiling import compile_context as compile_context
from controllability.compiling.texts import Query as Query
