"""How every layer is solved, and what it may fall back to where it cannot be solved that way.  Decided here and nowhere else.

In this order: another derivation, which moves other parameters; where one patch serves many tokens, one scale that is only
near, or targets that are not all reached, which the layers behind make good; in the last layer, sizes that nothing behind
it reads.  The last layer is held to its targets, or refuses.  (new)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from architectures.reading import Layer
from controllability.errors import SideConditionFailed
from controllability.execution.patched_run import Metric
from controllability.interfaces import JointOptions, Path
from controllability.models.reading.checked_reading import Checked
from controllability.models.reading.positions import Positions
from controllability.models.reading.probes import sizes_are_free
from controllability.models.sweep.layer_sweep import LayerSweep
from controllability.models.sweep.target_run import LayerTarget
from controllability.prover.derivation import Derivation
from controllability.solvers.resorts import Resort
from controllability.solvers.served_tokens import Known

COARSE = 1e-12  # epsilon from which on a free size is worth looking for: above it rounding can be magnified much
Served = Mapping[tuple[int, int], Mapping[Path, Known]]  # (layer, call) -> what each leaf knows of the tokens it serves


class Plan:
    """By which derivation and with which options every layer is solved, for patches of one scope.

    ``derivations`` fixes the former: a patch that serves tokens already (``served``) keeps what it gives them.
    """

    def __init__(
        self, proofs: list[Derivation], scope: str, joint: JointOptions | None = None,
        derivations: Sequence[int] | None = None, served: Served | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:  # fmt: skip
        self.proofs, self.scope, self.served, self.metrics = proofs, scope, served, metrics
        self.joint = joint if scope == "all" else None
        self.fixed = derivations is not None
        self.choices = list(derivations or [0] * len(proofs))
        self.first: dict[int, SideConditionFailed] = {}
        self.held: set[int] = {len(proofs) - 1}  # layers behind which nothing makes good what they miss
        self.short = self.fixed  # whether layers before the last one need not reach all their targets

    def solver(self, layer: Layer, call: int, target: LayerTarget, rows: Positions) -> LayerSweep:
        """What solves one call of a layer."""
        known = None if self.served is None else self.served[layer.index, call]
        self.held |= {layer.index} if layer.final else set()
        proof, choice = self.proofs[layer.index], self.choices[layer.index]
        options = self._options(layer.index, self.short)
        return LayerSweep(layer, call, proof, choice, target, rows, self.scope, options, known, self.metrics)

    def moves(self, layer: int) -> bool:
        """Whether a layer is solved at all: a fit may name those that are."""
        return self.joint is None or self.joint.at(layer) is not None

    def _options(self, layer: int, short: bool) -> JointOptions | None:
        return options_at(self.joint and self.joint.at(layer), layer in self.held, short)

    def after(self, failed: SideConditionFailed) -> None:
        """Go on to the layer's next derivation, then to falling short; raises the first failure when neither is left."""
        layer = failed.layer
        assert layer is not None
        first = self.first.setdefault(layer, failed)
        if failed.final:
            raise failed
        if not self.fixed and self.choices[layer] < len(self.proofs[layer].alternatives):
            self.choices[layer] += 1
            return
        changed = self._options(layer, True)
        if self.short or changed is None or not changed.may_fall_short:
            if not self.fixed:
                first.tried = f"{self.choices[layer] + 1} derivations that move different parameters"
            raise first from None
        self.short = True
        self.choices[layer] = 0


def options_at(joint: JointOptions | None, last: bool, short: bool) -> JointOptions | None:
    """How a layer is solved: all but the last one leave something to those behind them, if need be.

    What stands behind the last one is said in ``joint``.  ``short``: the layer need not reach all its targets.
    """
    if joint is None or last or not joint.exact or joint.keep_rms:
        return joint
    return replace(joint, read_by="block", may_fall_short=short)


def with_reader_of_last_layer(
    joint: JointOptions, model: nn.Module, checked: Checked, example: Mapping[str, Any]
) -> JointOptions:
    """``joint`` with what stands behind the last layer, where it matters."""
    coarse = any(torch.finfo(d).eps > COARSE for layer in checked.reading.layers[-1:] for d in layer.params.dtypes)
    if not coarse or not joint.exact or joint.keep_rms:
        return joint
    return replace(joint, read_by="norm" if sizes_are_free(model, checked, example) else "anyone")


def made_good_later(solver: LayerSweep) -> bool:
    """Whether a layer leaves something to those behind it, and is not held to its target itself."""
    return any(taken.route in (Resort.NEAREST, Resort.SHORT) for taken in solver.run.journal.routes)


def only_near(solvers: Iterable[LayerSweep]) -> bool:
    """Whether a layer gives its tokens what another scale would not give them: then no token can be added to them."""
    return any(taken.route in (Resort.NEAREST, Resort.SIZED) for s in solvers for taken in s.run.journal.routes)
