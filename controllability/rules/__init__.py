"""The rule table, once: what each rule concludes, from which premises, and how it constructs."""

from controllability.errors import BadInput
from controllability.interfaces import Component
from controllability.rules.base import (
    Attempt as Attempt,
    Failure as Failure,
    Rule as Rule,
    Side as Side,
    Step as Step,
    construct as construct,
)
from controllability.rules.centred import OutputCentred
from controllability.rules.collapse import InputSelfWeighted
from controllability.rules.input_side import InputAfter, InputBefore, InputCombine, InputConstant
from controllability.rules.leaves import LEAF_RULES
from controllability.rules.mixture import InputMixture, JointMixture, JointThroughMixture, OutputMixture, ThroughMixture
from controllability.rules.normalised import OutputNormalised
from controllability.rules.normalised_jointly import JointNormalised
from controllability.rules.output_side import (
    InputFactor,
    OutputAfterFixed,
    OutputFactor,
    OutputSum,
    OutputThroughBijection,
    OutputTimes,
)
from controllability.rules.theorems import InputByOutput, Theorem1, Theorem1b
from controllability.rules.through import ThroughBefore, ThroughSplit, ThroughSum

RULES: list[Rule] = [
    *LEAF_RULES, InputConstant(), InputBefore(), InputAfter(), InputCombine(), InputMixture(), Theorem1(), Theorem1b(),
    InputByOutput(), InputFactor(), InputSelfWeighted(),
    OutputAfterFixed(), OutputThroughBijection(), OutputTimes(), OutputNormalised(), OutputCentred(), OutputSum(),
    OutputFactor(),
    OutputMixture(), ThroughSplit(), ThroughBefore(), ThroughSum(), ThroughMixture(),
    OutputThroughBijection("through"), OutputTimes("through"), OutputNormalised("through"),
    JointNormalised(), JointMixture(), JointThroughMixture(), JointNormalised("through"),
]  # fmt: skip


def register(rule: Rule) -> Rule:
    """Add a rule of one's own to the table: the prover, the checks and ``recheck`` know it from then on.

    Raises ``BadInput`` for a rule whose name and side are taken, or that lacks one of its texts.  (new)

    >>> from controllability.rules.through import ThroughBefore
    >>> register(ThroughBefore())
    Traceback (most recent call last):
    controllability.errors.BadInput: the rule T-before (through side) is registered already
    """
    if not isinstance(rule, Rule):
        raise BadInput(f"register takes a rule, an instance of a class of controllability.rules.Rule, got {rule!r}")
    for text in ("name", "side", "statement", "when", "patch", "source"):
        if not getattr(rule, text, ""):
            raise BadInput(f"the rule {getattr(rule, 'name', type(rule).__name__)} has no {text}")
    if any((known.name, known.side) == (rule.name, rule.side) for known in RULES):
        raise BadInput(f"the rule {rule.name} ({rule.side} side) is registered already")
    RULES.append(rule)
    return rule


def is_about(name: str, component: Component) -> bool:
    """Whether the statement of the rule called ``name`` is about such a component."""
    stated = [rule.about for rule in RULES if rule.name == name and rule.about is not Component]
    return any(isinstance(component, kind) for kind in stated)


def unregister(rule: Rule) -> None:
    """Take a rule out of the table again.  Raises ``BadInput`` for one that is not in it."""
    if rule not in RULES:
        raise BadInput(f"the rule {rule.name} is not registered")
    RULES.remove(rule)
