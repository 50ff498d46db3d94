"""The levels of proof (theory, section 6): what is run at each, and what it showed.

derived    the tree follows the rules; nothing is computed
symbolic   every rule on its own statement, and the whole block, reduced to 0 with every size a symbol
exact      the whole block on random rational numbers, roots as algebraic numbers: residual exactly 0
numeric    bfloat16, float32, float64 and 50 digits against 50 digits: the residual falls, or is 0
"""

from __future__ import annotations

import time
from typing import Any

from controllability.errors import BadInput, NotExact, SideConditionFailed, within_depth
from controllability.prover.derivation import Derivation

LEVELS = ("derived", "symbolic", "exact", "numeric")


@within_depth
def check(proof: Derivation, level: str, seed: int = 0) -> list[dict[str, Any]]:
    """Run a level's checks: [{rule, status: passed | failed | skipped, method}], the whole block last.

    Raises ``BadInput`` for an unknown level.

    >>> from controllability.components import Linear, residual
    >>> from controllability.interfaces import Param
    >>> from controllability.proof import prove
    >>> for row in check(prove(residual(Linear(Param("W", ("d", "d")))), via="output"), "symbolic"):
    ...     print(row["rule"], row["status"])
    theorem-1b passed
    O-linear passed
    whole block passed
    """
    if level not in LEVELS:
        raise BadInput(f"unknown level {level!r}: choose one of {', '.join(LEVELS)}")
    if level == "derived":
        method = "applied with all its premises by the prover"
        return [{"rule": rule, "status": "passed", "method": method} for rule in proof.rules]
    from controllability.checks.exact_block import exact
    from controllability.checks.numeric_block import numeric
    from controllability.checks.symbolic_block import whole_block
    from controllability.checks.symbolic_joint_block import whole_block as joint_block
    from controllability.checks.symbolic_rules import rule_checks
    from controllability.execution.sampling import sample

    sample(proof.block, "indexed")  # a shape that is not known is told in the user's own names
    results = rule_checks(proof) if level == "symbolic" else []
    started = time.perf_counter()
    try:
        if level == "symbolic":
            status, method = (joint_block if proof.jointly else whole_block)(proof)
        else:
            status, method = (exact if level == "exact" else numeric)(proof, seed)
    except (NotExact, SideConditionFailed) as reason:
        status, method = "skipped", str(reason).splitlines()[0]
    except (BadInput, RecursionError):
        raise
    except Exception as reason:  # a component of somebody's own may fail in any way
        status, method = "skipped", f"a component does not run on such numbers ({type(reason).__name__}: {reason})"
    seconds = f"({time.perf_counter() - started:.1f} s)"
    return [*results, {"rule": "whole block", "status": status, "method": f"{method} {seconds}"}]
