"""Attribution against a known truth and against interventions, and what it costs: the numbers of docs/reading-a-patch.md.

``python tests/benchmarks/instrument.py [QUESTIONS] [MODEL]``; scikit-learn is needed for ContextCite's estimator, MODEL for the timing.
"""

from __future__ import annotations

import math
import random
import sys
from collections import defaultdict
from typing import Any

import torch
from common import markdown, median, random_model, timed

import controllability as ct
from controllability.embedded.world import draw_world
from controllability.instrument.interventions import LEFT_OUT, rank_correlation
from controllability.instrument.states import context_logprobs

FACTS, ORDERS, ABLATIONS, SEED = 8, 4, 64, 20


def contextcite(found: Any, model: Any, calls: int, rng: random.Random) -> list[float]:
    """A sparse linear model of the answer's log-odds over random ablations, half of the chunks in each [arXiv 2409.00729]."""
    from sklearn.linear_model import Lasso  # type: ignore[import-not-found]

    count = len(found.chunks)
    kept = [tuple(i for i in range(count) if rng.random() < 0.5) for _ in range(calls)]
    probabilities = [
        math.exp(min(v, -1e-7)) for v in context_logprobs(model, found.solved.reading, kept, None, lambda *_: None)
    ]
    odds = [math.log(max(p, 1e-12) / (1 - p)) for p in probabilities]
    rows = [[float(i in each) for i in range(count)] for each in kept]
    return Lasso(alpha=0.01).fit(rows, odds).coef_.tolist()


def against_the_truth(model: Any, tokenizer: Any, questions: int) -> list[list[Any]]:
    """How often the largest score is that of the fact that answers, and the rank correlation with random ablations, by score."""
    rng, hits, lds = random.Random(SEED), defaultdict(list), defaultdict(list)
    for _ in range(questions):
        world = draw_world(rng, FACTS)
        question = rng.choice(world.questions)
        given = model, tokenizer, world.context, question.text
        found = ct.attribute(*given, order="all", permutations=ORDERS, ablations=ABLATIONS, seed=rng.randrange(10**6))
        truth = next(i for i, chunk in enumerate(found.chunks) if question.name in chunk.text.split())
        calls = len(found.solved.states) + 1
        beside = found.interventions
        with torch.no_grad():
            cited = contextcite(found, model, calls, rng)
        for who, score in (found.by_layer() | {LEFT_OUT: beside.leave_one_out, "ContextCite": cited}).items():
            hits[who].append(max(range(FACTS), key=score.__getitem__) == truth)
            predicted = [sum(score[i] for i in kept) for kept in beside.kept]
            lds[who].append(rank_correlation(predicted, beside.logprobs) or 0.0)
    return [[who, f"{sum(hit) / len(hit):.1%}", sum(lds[who]) / len(hit)] for who, hit in hits.items()]


def ratio(model: Any, tokenizer: Any, tokens: int = 1000, chunks: int = 16) -> tuple[float, float]:
    """(attribution ÷ one plain run over context and query, the median of three; the token counts' ratio)."""
    rng = random.Random(0)
    words = [
        rng.choice(
            ["the", "report", "on", "cats", "and", "dogs", "that", "live", "in", "a", "town", "by", "the", "river"]
        )
        for _ in range(tokens)
    ]
    size = -(-tokens // chunks)
    parts = [" ".join(words[i : i + size]) for i in range(0, tokens, size)]
    context, query = " ".join(parts), " How many cats live there?"
    ids = torch.tensor([tokenizer(context + query)["input_ids"]])
    with torch.no_grad():
        plain = lambda: model(ids, logits_to_keep=1, use_cache=False)  # noqa: E731
        study = lambda: ct.attribute(model, tokenizer, context, query, chunks=parts, ablations=0)  # noqa: E731
        found = study()
        plain()
        return median(timed(study) / timed(plain) for _ in range(3)), found.tokens / found.plain


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    own, tokenizer = ct.load_model("embedded")
    control = random_model("small", vocab_size=len(tokenizer))
    columns = ["score", "the fact that answers is first", "rank correlation (LDS)"]
    for name, model, questions in (("embedded", own, count), ("random weights, 8 layers", control, count // 20)):
        print(f"{name}: {questions} questions, {FACTS} facts, {ORDERS} orders, {ABLATIONS} ablations, seed {SEED}")
        print(markdown(columns, against_the_truth(model, tokenizer, questions)), flush=True)
    if len(sys.argv) > 2:
        print("attribution ÷ plain run, and in tokens: {:.2f}, {:.2f}".format(*ratio(*ct.load_model(sys.argv[2]))))
