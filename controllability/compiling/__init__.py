"""A context turned into one ordinary set of weights: token sets, exact or least squares, measured, written, checked."""

from controllability.compiling.compile_context import compile_context as compile_context
from controllability.compiling.queries import Query as Query
from controllability.compiling.result import Compiled as Compiled
from controllability.compiling.servable import export_servable as export_servable
from controllability.compiling.unrelated_texts import further_questions as further_questions
