"""Every set of texts, and what any patch does on it: logits, and the answers that a model generates by itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from controllability.arrays.one_line import OneLine
from controllability.compiling.answers import RUNS, Answers, Speaker
from controllability.compiling.token_sets import Prefix
from controllability.compiling.yardstick import Agreement, Yardstick, agreement
from controllability.models.model_patch import ModelPatch

ASKED = ("queries", "heldout")  # compared with the contextual model, and answered; the others with the base model


@dataclass(frozen=True, repr=False)
class Findings(OneLine):
    """What a patched model gives: its agreement and logits on each set (the queries one by one), and its answers."""

    results: dict[str, Agreement]
    logits: dict[str, list[Tensor]]
    answers: dict[str, Answers]


@dataclass(frozen=True, repr=False)
class Examination(OneLine):
    """The sets, and what is ``said`` about them with the context and without: the same for every patch."""

    sets: Mapping[str, Yardstick]
    speaker: Speaker
    said: dict[str, dict[str, list[Prefix]]]

    @staticmethod
    def of(model: Any, sets: Mapping[str, Yardstick], speaker: Speaker) -> "Examination":
        """Runs the model as it is, behind the context and without it."""
        said = {}
        for name in [name for name in ASKED if name in sets]:
            yardstick = sets[name]
            runs = (yardstick.wanted, "target"), (yardstick.without, "source")
            said[name] = {who: speaker.says(model, yardstick, *run) for who, run in zip(RUNS[::2], runs, strict=True)}
        return Examination(sets, speaker, said)

    def findings(self, model: Any, patch: ModelPatch) -> Findings:
        """What a patch does on every set.  Raises ``NotVerified`` where a logit is not finite."""
        answers = {}
        with patch.applied(model):
            logits = {name: yardstick.found(model, alone=name == "queries") for name, yardstick in self.sets.items()}
            for name, said in self.said.items():
                samples = self.sets[name].samples
                patched = {RUNS[1]: self.speaker.says(model, self.sets[name], logits[name])}
                answers[name] = Answers(samples, self.speaker.counts(samples), said | patched, self.speaker.tokenizer)
        results = {name: agreement(logits[name], yardstick.wanted) for name, yardstick in self.sets.items()}
        return Findings(results, logits, answers)
