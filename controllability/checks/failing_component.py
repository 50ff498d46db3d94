"""A check that ended in an exception: is a component broken, or does it only not take the numbers of that level?"""

from controllability.checks.rebuilt_blocks import small_sizes
from controllability.errors import in_a_line
from controllability.execution.sampling import sample
from controllability.execution.trace import Trace
from controllability.interfaces import Component, leaves

NOT_TAKEN = (TypeError, AttributeError, NotImplementedError, AssertionError)  # how code says: not with such values


def told(block: Component, reason: Exception) -> tuple[str, str]:
    """(status, method) of a check that ``reason`` ended: skipped where all components run on plain float64 numbers."""
    who, plain = "a component", True
    try:
        params, state, _ = sample(block, **small_sizes(block))
        trace = Trace(block, params, state)
        for path, leaf in leaves(block):
            who = leaf.describe()
            trace.output(path)
        who = "a component"
        trace.output(())
    except ModuleNotFoundError as missing:
        return "skipped", f"its numbers cannot be tried here: {missing} ({type(reason).__name__}: {in_a_line(reason)})"
    except Exception as error:  # whatever somebody's own code raises
        plain, reason = False, error
    said = f"{type(reason).__name__}: {in_a_line(reason)}"
    if plain and isinstance(reason, NOT_TAKEN):
        return "skipped", f"a component runs on float64 numbers and does not take those of this level ({said})"
    return "failed", f"{who} fails ({said})"
