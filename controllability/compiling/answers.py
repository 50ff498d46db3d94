"""What the contextual, the compiled and the base model say behind each query, each on its own tokens; and what any patch does on every set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from controllability.arrays.one_line import OneLine
from controllability.compiling.token_sets import Prefix, Sample, Side, batches
from controllability.compiling.yardstick import Agreement, Yardstick, agreement, run
from controllability.models.model_patch import ModelPatch
from controllability.models.reading.token_text import text_after, word
from controllability.models.sweep.shared_past import SharedPast
from controllability.models.sweep.target_run import Progress, silent


@torch.no_grad()
def continuations(
    model: Any, samples: Sequence[Sample], counts: Sequence[int], side: Side, ends: frozenset[int], limit: int | None = None,
    progress: Progress = silent, past: SharedPast | None = None,
) -> list[Prefix]:  # fmt: skip
    """Up to ``counts[i]`` tokens behind sample i in one of its runs, in batches; each stops before a token of ``ends``, and at the limit.

    With a ``past``, the target's context run already, no token is run twice.
    """
    if past is not None:
        return _cached(model, samples, counts, side, ends, limit, progress, past)
    found: list[Prefix] = []
    for batch in batches(samples, side):
        open_, start = [*range(len(batch))], len(found)
        while True:
            full = [len(getattr(sample, side)) > (limit or torch.inf) for sample in batch]
            said = [sample.answered - given.answered for sample, given in zip(batch, samples[start:], strict=False)]
            open_ = [i for i in open_ if said[i] < counts[start + i] and not full[i]]
            if not open_:
                break
            logits = run(model, [batch[i] for i in open_], side)
            tokens = {i: int(x[len(getattr(batch[i], side)) - 1].argmax()) for i, x in zip(open_, logits, strict=True)}
            open_ = [i for i in open_ if tokens[i] not in ends]
            for i in open_:
                batch[i] = batch[i].longer(tokens[i])
        found += [sample.source[len(sample.source) - n :] for sample, n in zip(batch, said, strict=True)]
        progress("answers", len(found), len(samples))
    return found


def _cached(
    model: Any, samples: Sequence[Sample], counts: Sequence[int], side: Side, ends: frozenset[int], limit: int | None,
    progress: Progress, past: SharedPast,
) -> list[Prefix]:  # fmt: skip
    behind = past if side == "target" else replace(past, cache=None, length=0)
    rows = [getattr(sample, side)[behind.length :] for sample in samples]
    room = [limit + 1 - len(getattr(sample, side)) if limit else n for n, sample in zip(counts, samples, strict=True)]
    most = [max(0, min(pair)) for pair in zip(counts, room, strict=True)]
    order = sorted((i for i, n in enumerate(most) if n), key=lambda i: len(rows[i]))
    found: dict[int, Prefix] = {}
    alike_ones = [order] if past.ragged else [list(group) for _, group in groupby(order, key=lambda i: len(rows[i]))]
    for alike in alike_ones:
        for own in behind.batches([len(rows[i]) + most[i] for i in alike]):
            kept = [alike[k] for k in own]
            said = behind.greedy(model, [rows[i] for i in kept], max(most[i] for i in kept), ends)
            found |= {i: tokens[: most[i]] for i, tokens in zip(kept, said, strict=True)}
            progress("answers", len(found), len(order))
    return [found.get(i, ()) for i in range(len(samples))]


def with_answers(
    model: Any, samples: Sequence[Sample], count: int, ends: frozenset[int], progress: Progress, tokenizer: Any = None,
    limit: int | None = None, past: SharedPast | None = None,
) -> list[Sample]:  # fmt: skip
    """Every sample with its answer behind it: up to ``count`` tokens of its target's greedy continuation, before a token of ``ends``.

    An answer that was given stands there in the tokens with which the contextual model says it, or else in its own; one token more is
    heard then, which tells "4" from "42".
    """
    counts = [len(sample.spelt) + 1 if sample.answer else count for sample in samples]
    if not any(counts):
        return list(samples)
    found = []
    all_said = continuations(model, samples, counts, "target", ends, limit, progress, past)
    for sample, said in zip(samples, all_said, strict=True):
        answer = said
        if sample.answer is not None:
            parts = [said[: k + 1] for k in range(len(said)) if gives(tokenizer, sample, said)]
            answer = next((part for part in parts if gives(tokenizer, sample, part)), sample.spelt)
        found.append(replace(sample, said=said).longer(*answer))
    return found


def gives(tokenizer: Any, sample: Sample, tokens: Prefix) -> bool:
    """Whether tokens behind a query begin with the answer that was given for it."""
    return sample.answer is not None and given_in(heard(tokenizer, sample, tokens), sample.answer)


def heard(tokenizer: Any, sample: Sample, tokens: Prefix) -> str:
    """These tokens behind a query as text, with a space where one stands between words and none around it."""
    return text_after(tokenizer, sample.bare.source, tokens).strip() if tokens else ""


def given_in(said: str, answer: str) -> bool:
    """Whether what is said begins with the answer, and not in the middle of a word or a number.

    >>> given_in("Oslo .", "Oslo"), given_in("42", "4"), given_in("in Oslo", "Oslo")
    (True, False, False)
    """
    said, answer = (" ".join(text.split()) for text in (said, answer))
    more = said.removeprefix(answer)[:1]
    goes_on = all(sign.isdigit() or sign.lower() != sign.upper() for sign in (answer[-1:], more)) and more != ""
    return said.startswith(answer) and not goes_on


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text, from the tokenizer and the model's generation config."""
    config = getattr(model, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    held = [tokenizer.eos_token_id, *(more if isinstance(more, list | tuple) else [more])]
    return frozenset(token for token in held if token is not None)


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
