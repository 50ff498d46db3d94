"""What the contextual, the compiled and the base model answer to each query, each on its own tokens, beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from controllability.compiling.continuations import continuations, gives, heard, with_answers
from controllability.compiling.token_sets import Prefix, Sample, Side
from controllability.compiling.yardstick import Yardstick
from controllability.models.reading.token_text import word
from controllability.models.sweep.shared_past import SharedPast
from controllability.models.sweep.target_run import Progress

RUNS = ("with_context", "patched", "without_context")


@dataclass(frozen=True)
class Answers:
    """The answers to the queries of a set: ``said`` by each of the three runs, in tokens, one more than ``counts`` where an answer was given."""

    samples: Sequence[Sample]
    counts: Sequence[int]
    said: dict[str, list[Prefix]]
    tokenizer: Any

    def texts(self, who: str) -> list[str]:
        """The answers of one run as text."""
        rows = zip(self.samples, self.counts, self.said[who], strict=True)
        return [
            word(self.tokenizer, said[0]) if n == 1 and said else heard(self.tokenizer, sample, said[:n])
            for sample, n, said in rows
        ]

    def same(self, who: str = "patched") -> float:
        """The share of queries to which a run gives the contextual model's answer, token for token."""
        pairs = zip(self.counts, self.said["with_context"], self.said[who], strict=True)
        return sum(wanted[:n] == found[:n] for n, wanted, found in pairs) / len(self.samples)

    def right(self, who: str = "patched") -> float | None:
        """The share of right answers among those that the contextual model has right; None where it has none, or none was given."""
        known = [i for i, right in enumerate(self._right("with_context")) if right]
        found = self._right(who)
        return sum(found[i] for i in known) / len(known) if known else None

    def _right(self, who: str) -> list[bool]:
        return [gives(self.tokenizer, *pair) for pair in zip(self.samples, self.said[who], strict=True)]

    def unsaid(self) -> list[str]:
        """A line for every answer that was given and that the contextual model does not give."""
        rows = zip(self.samples, self._right("with_context"), self.said["with_context"], strict=True)
        return [
            f"the context does not say so to this model: {sample.text!r} is to be answered {sample.answer!r}, and with the context it "
            f"says {heard(self.tokenizer, sample, said)!r}"
            for sample, right, said in rows
            if sample.answer is not None and not right
        ]

    def rows(self) -> list[dict[str, str]]:
        """For each query its text, and the answer of each run."""
        columns = zip(self.samples, *map(self.texts, RUNS), strict=True)
        return [{"query": sample.text} | dict(zip(RUNS, texts, strict=True)) for sample, *texts in columns]


@dataclass(frozen=True)
class Speaker:
    """How answers are generated: the tokens that end one, how many there are at most, and what the positions allow."""

    tokenizer: Any
    ends: frozenset[int]
    answer_tokens: int
    limit: int | None
    past: SharedPast | None = None

    def counts(self, samples: Sequence[Sample]) -> list[int]:
        """How many tokens of an answer are shown and compared: those of the answer that was given, or one at least."""
        return [sample.answered if sample.answer else max(1, self.answer_tokens) for sample in samples]

    def answered(self, model: Any, samples: Sequence[Sample], progress: Progress) -> list[Sample]:
        """The samples with their answers behind them (``with_answers``)."""
        return with_answers(
            model, samples, self.answer_tokens, self.ends, progress, self.tokenizer, self.limit, self.past
        )

    def says(self, model: Any, yardstick: Yardstick, logits: Sequence[Tensor], side: Side = "source") -> list[Prefix]:
        """What a model says behind each query.  A single token stands in its logits already, and what was said once is known."""
        samples = yardstick.samples
        known = {i: sample.said for i, sample in enumerate(samples) if side == "target" and sample.said}
        known |= {i: said for i, x in enumerate(logits) if i not in known and (said := follows(samples[i], x))}
        counts = {i: n + bool(samples[i].answer) for i, n in enumerate(self.counts(samples)) if i not in known}
        longer = [i for i, n in counts.items() if n > 1]
        bare, most = [samples[i].bare for i in longer], [counts[i] for i in longer]
        more = zip(longer, continuations(model, bare, most, side, self.ends, self.limit, past=self.past), strict=True)
        single = {i: (int(logits[i][-1 - samples[i].answered].argmax()),) for i, n in counts.items() if n == 1}
        found = known | single | dict(more)
        return [found[i] for i in range(len(samples))]


def follows(sample: Sample, logits: Tensor) -> Prefix | None:
    """What the contextual model says, where these logits along its answer say the same token by token, and so would a run by itself."""
    n = sample.answered
    same = (
        n and sample.said[:n] == sample.source[-n:] and logits[-n - 1 : -1].argmax(-1).tolist() == list(sample.said[:n])
    )
    return sample.said[:n] if same and len(sample.said) == n else None
