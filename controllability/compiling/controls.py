"""Control arms: patches that should *not* do what the compiled one does, made with the same settings and measured on the same texts."""

import random
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from controllability.compiling.answers import Examination, Findings
from controllability.compiling.exact_or_ridge import Solution
from controllability.compiling.queries import Query
from controllability.compiling.token_sets import Context
from controllability.compiling.unrelated_texts import known_to, other_names
from controllability.compiling.yardstick import Yardstick
from controllability.deltas import Delta
from controllability.errors import ControllabilityError
from controllability.models.model_patch import ModelPatch
from controllability.models.sweep.target_run import Progress


@dataclass(frozen=True)
class ControlArm:
    """A control and what it does; without ``found`` there was no such patch, and ``why`` says so."""

    name: str
    found: Findings | None
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        if self.found is None:
            return {"name": self.name, "why": self.why}
        rows = {name: result.to_dict() for name, result in self.found.results.items()}
        for name, answers in self.found.answers.items():
            rows[name] |= {"exact_match": answers.same(), "right": answers.right()}
        return {"name": self.name, **rows}


def control_arms(
    model: Any, context: str, patch: ModelPatch, solve: Callable[[Yardstick], Solution], examination: Examination, progress: Progress
) -> list[ControlArm]:  # fmt: skip
    """The context with its sentences shuffled and another context, compiled as ``solve`` does, and a random change of equal norm of each map.

    What other orders say as well (facts), the first keeps: it tells what hangs on the order alone.
    """
    speaker = examination.speaker
    asked, apart = (examination.sets[name].samples for name in ("queries", "unrelated"))

    def compiled(text: str) -> ModelPatch:  # its own answers have as many tokens
        lead, count = asked[0].source[: asked[0].first], max(sample.answered for sample in asked)
        other = replace(Context.of(speaker.tokenizer, text, speaker.limit), lead=lead)
        own = [other.of_query(Query(sample.text, sample.weight, hard=sample.hard), count) for sample in asked]
        other_speaker = replace(speaker, answer_tokens=count, past=None)  # the past is of the context
        return solve(Yardstick.of(model, other_speaker.answered(model, own, progress))).patch

    ways: dict[str, Callable[[], ModelPatch]] = {
        "shuffled context": lambda: compiled(shuffled(context)),
        "another context": lambda: compiled(another(speaker.tokenizer, context, [sample.text for sample in apart])),
        "random change": lambda: random_change(patch),
    }
    arms = []
    for name, way in ways.items():
        try:
            arms.append(ControlArm(name, examination.findings(model, way())))
        except ControllabilityError as error:
            arms.append(ControlArm(name, None, str(error).splitlines()[0]))
    return arms


def shuffled(context: str, seed: int = 0) -> str:
    """The context's sentences in another order; the words of one that is a single sentence.

    >>> shuffled("Mia lives in Oslo. Leo lives in Rome.")
    'Leo lives in Rome. Mia lives in Oslo.'
    """
    parts = [part for part in re.split(r"(?<=[.!?])\s+|\n+", context.strip()) if part]
    parts = parts if len(set(parts)) > 1 else context.split()
    order = list(parts)
    random.Random(seed).shuffle(order)
    return " ".join(order if order != parts else [*parts[1:], parts[0]])


def another(tokenizer: Any, context: str, elsewhere: Sequence[str]) -> str:
    """The context with other names; where the vocabulary does not know ours, with its own exchanged; where it has none, other texts."""
    exchanged = other_names(context, exchange=True)
    candidates = [text for text in (other_names(context), exchanged) if text != context]
    return next((text for text in candidates if known_to(tokenizer, [text])), " ".join(elsewhere))


def random_change(patch: ModelPatch, seed: int = 0) -> ModelPatch:
    """The patch with every change replaced by a random one of the same form and norm."""
    generator = torch.Generator().manual_seed(seed)
    entries = tuple(replace(entry, delta=_random(entry.delta, generator)) for entry in patch.entries)
    return replace(patch, entries=entries, id=uuid.uuid4().hex)


def _random(delta: Delta, generator: torch.Generator) -> Delta:
    def drawn(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x) if x.is_floating_point() else x

    noise = delta.mapped(drawn)  # type: ignore[arg-type]
    name = "left" if hasattr(noise, "left") else "value"
    factor, share = getattr(noise, name), delta.norms() / noise.norms()
    share = share.reshape(share.shape + (1,) * (factor.ndim - share.ndim))
    return replace(noise, **{name: factor * share})
