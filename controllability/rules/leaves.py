"""The leaves' own rules: the table entries for what the component files state."""

from dataclasses import replace

from controllability.execution.patched_run import Goal, PatchedRun
from controllability.interfaces import Place, Update, updates_of
from controllability.rules.base import Attempt, Failure, Rule, Schema, Search, Side, Step, Target, per_expert_rows

OTHER_ROUTES = "take route='auto' or 'balanced': they do not divide by the activations of the norm"


class LeafRule(Rule):
    """A component's own rule: the table entry for what the component file states."""

    def __init__(
        self, name: str, side: Side, statement: str, when: str, patch: str, source: str, cost: int, jointly: bool = False
    ) -> None:  # fmt: skip
        self.name, self.side, self.statement, self.when = name, side, statement, when
        self.patch, self.source, self.cost, self.jointly = patch, source, cost, jointly
        self.kind = name.removesuffix(" jointly")[2:]  # of the updates that it is about

    def derive(self, place: Place, prover: Search) -> Attempt:
        found = Attempt()
        scales = self.kind == "scale" and self.side == "output"
        for update in self._ways(place):
            if scales and place.path in prover.normalised and prover.route not in ("auto", "scale"):
                reason = f"the scale of a normalised output may move alone on route scale only, not on {prover.route}"
                found.failures.append(Failure(place, self.name, reason, "ask for route='auto' or 'scale'", weight=1))
                continue
            if place.path in prover.per_expert_rows:
                found.failures.append(per_expert_rows(place, self.name))
                continue
            if prover.is_frozen(update.param):
                reason, hint = f"{update.param} may not move (frozen)", f"allow {update.param} to move"
                found.failures.append(Failure(place, self.name, reason, hint, weight=1))
                continue
            if scales and not self.jointly and place.path in prover.normalised and prover.route == "scale":
                conditions = tuple(replace(c, hint=OTHER_ROUTES) for c in update.conditions)
                update = replace(update, conditions=conditions)
            way = update.jointly if self.jointly else None
            conditions, most = (way.conditions, way.max_tokens) if way else (update.conditions, None)
            own = frozenset({update.param})
            found.steps.append(Step(self, place, (), own, conditions, self.cost, "", update, most))
        return found

    def _ways(self, place: Place) -> list[Update]:
        """The ways that the component states under this rule's name."""
        ways = updates_of(place.component, self.side)
        return [way for way in ways if way.kind == self.kind and (way.jointly is not None or not self.jointly)]

    def construct(self, step: Step, run: PatchedRun, wanted: Target) -> None:
        assert step.update is not None
        run.steer(step.place.path, Goal(step.update, wanted))

    def schema(self, step: Step) -> Schema:
        assert step.update is not None
        ways = [way for way in self._ways(step.place) if way.param == step.update.param]
        assert len(ways) == 1, f"{len(ways)} ways called {self.name} move {step.update.param}"
        return Schema(step.place.component, update=ways[0])


LEAF_RULES = (
    LeafRule("I-linear", "input", "z ↦ W z (+ b)", "z ≠ 0", "ΔW = W(z'−z) zᵀ/‖z‖²", "[D] Thm 2.2", 0),
    LeafRule("I-bias", "input", "z ↦ f(z) + b", "always", "Δb = f(z') − f(z)", "theory 2", 1),
    LeafRule("I-scale", "input", "z ↦ m∘z", "z'_i = 0 or m_i = 0 wherever z_i = 0", "Δm = m∘(z'−z)/z", "[G] norm lemma", 2),
    LeafRule("I-experts", "input", "z_j ↦ W_e z_j, e the j-th chosen expert", "z_j ≠ 0 where needed", "ΔW_e = W_e(z'_j−z_j) z_jᵀ/‖z_j‖²", "[D] Thm 2.2", 0),
    LeafRule("O-linear", "output", "y ↦ W y (+ b)", "y ≠ 0", "ΔW = δ yᵀ/‖y‖²", "[G] lem:output_weight", 0),
    LeafRule("O-bias", "output", "y ↦ … + b", "always", "Δb = δ", "[G] lem:output_bias", 1),
    LeafRule("O-scale", "output", "y ↦ m∘y", "no y_i is 0 where δ_i ≠ 0", "Δm = δ/y", "[G] lem:output_elem_multiply", 2),
    LeafRule("O-taps", "output", "z ↦ Σ_k c_k∘z_k", "no channel reads only zeros where δ_i ≠ 0", "Δc_k = δ∘z_k/Σ_j z_j²", "theory 8 (new)", 0),
    LeafRule("I-linear jointly", "input", "z_t ↦ W z_t (+ b)", "dependent z_t have dependent W(z'_t−z_t): T ≤ d", "ΔW = W(Z'−Z)Z⁺", "theory 5 (new)", 0, True),
    LeafRule("I-bias jointly", "input", "z_t ↦ f(z_t) + b", "all f(z'_t) − f(z_t) are equal", "Δb = f(z'_t) − f(z_t)", "theory 5 (new)", 1, True),
    LeafRule("I-scale jointly", "input", "z_t ↦ m∘z_t", "all m∘(z'_t−z_t)/z_t are equal", "Δm = m∘(z'_t−z_t)/z_t", "theory 5 (new)", 2, True),
    LeafRule("I-experts jointly", "input", "z_t,j ↦ W_e z_t,j, e the j-th chosen expert", "I-linear jointly for each expert's own tokens", "ΔW_e = W_e(Z'_e−Z_e)Z_e⁺", "theory 5 (new)", 0, True),
    LeafRule("O-linear jointly", "output", "y_t ↦ W y_t (+ b)", "dependent y_t have dependent δ_t: T ≤ h", "ΔW = D Y⁺", "theory 5 (new)", 0, True),
    LeafRule("O-bias jointly", "output", "y_t ↦ … + b", "all δ_t are equal", "Δb = δ_t", "theory 5 (new)", 1, True),
    LeafRule("O-scale jointly", "output", "y_t ↦ m∘y_t", "all δ_t/y_t are equal", "Δm = δ_t/y_t", "theory 5 (new)", 2, True),
)  # fmt: skip
