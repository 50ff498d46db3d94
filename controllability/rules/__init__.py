"""The rule table, once: what each rule concludes, from which premises, and how it constructs.

The leaves' own rules (I-linear, O-scale, …) state their formulas beside the component.
"""

from controllability.rules.base import Attempt as Attempt
from controllability.rules.base import Failure as Failure
from controllability.rules.base import Rule as Rule
from controllability.rules.base import Side as Side
from controllability.rules.base import Step as Step
from controllability.rules.base import construct as construct
from controllability.rules.input_side import InputAfter, InputBefore, InputCombine, InputConstant
from controllability.rules.leaves import LEAF_RULES
from controllability.rules.mixture import InputMixture, JointMixture, JointThroughMixture, OutputMixture, ThroughMixture
from controllability.rules.normalised import OutputNormalised
from controllability.rules.normalised_jointly import JointNormalised
from controllability.rules.output_side import (
    OutputAfterFixed,
    OutputFactor,
    OutputSum,
    OutputThroughBijection,
    OutputTimes,
)
from controllability.rules.theorems import InputByOutput, Theorem1, Theorem1b
from controllability.rules.through import ThroughBefore, ThroughSplit, ThroughSum

RULES: tuple[Rule, ...] = (
    *LEAF_RULES, InputConstant(), InputBefore(), InputAfter(), InputCombine(), InputMixture(), Theorem1(), Theorem1b(),
    InputByOutput(),
    OutputAfterFixed(), OutputThroughBijection(), OutputTimes(), OutputNormalised(), OutputSum(), OutputFactor(),
    OutputMixture(), ThroughSplit(), ThroughBefore(), ThroughSum(), ThroughMixture(),
    OutputThroughBijection("through"), OutputTimes("through"), OutputNormalised("through"),
    JointNormalised(), JointMixture(), JointThroughMixture(), JointNormalised("through"),
)  # fmt: skip
