"""Attribution against a known truth and against interventions, and what it costs; surveys in batches and in processes: the numbers of the docs.

``python tests/benchmarks/instrument.py [QUESTIONS] [MODEL]``; scikit-learn is needed for ContextCite's estimator, MODEL for the timing.
``python tests/benchmarks/instrument.py survey [PAIRS]``; pyarrow is needed.
"""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import markdown, median, random_model, timed

sys.path.append(str(Path(__file__).parent.parent))
from survey_runs import draw_pairs, write_lines

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


def batched_ratio(count: int) -> float:
    """A survey in batches of 16 ÷ the same one by one, in processor time of one thread (the machine may be shared)."""
    torch.set_num_threads(1)
    model, tokenizer = ct.load_model("embedded")
    pairs, seconds = draw_pairs(count), []
    ct.survey(model, tokenizer, pairs[:16])  # what is tried once on a model
    for batch in (16, 1):
        began = time.process_time()
        ct.survey(model, tokenizer, pairs, batch=batch)
        seconds.append(time.process_time() - began)
    return seconds[0] / seconds[1]


WORKER = """
import sys, time, torch
torch.set_num_threads(1)
import controllability as ct
given = ct.load_model("embedded")
ct.survey(*given, [{"context": "Mia lives in Oslo .", "query": "Where does Mia live ?"}])
print("ready", flush=True)
sys.stdin.readline()
began = time.process_time()
ct.survey(*given, sys.argv[1], sys.argv[2])
print(time.process_time() - began, flush=True)
"""


def seconds_of(data: Path, processes: int) -> tuple[float, float]:
    """(seconds, processor time of the busiest process) of a survey by so many processes of one thread, without their start."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [{"RANK": str(rank), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"} for rank in range(processes)]
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(data), f"{folder}/out"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=os.environ | rank,
            )
            for rank in ranks
        ]  # fmt: skip
        for worker in workers:
            assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        began = time.perf_counter()
        for worker in workers:
            print(file=worker.stdin, flush=True)
        busy = max(float(worker.stdout.readline()) for worker in workers if worker.stdout is not None)
        took = time.perf_counter() - began
        for worker in workers:
            worker.communicate()
        return took, busy


def processes_ratios(count: int, times: int = 3) -> tuple[float, float]:
    """Two processes ÷ one, each with one thread, in seconds and in processor time (where others use the machine too): the best of several of either."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_lines(Path(folder) / "data.jsonl", draw_pairs(count))
        found = [[seconds_of(data, n) for n in (2, 1)] for _ in range(times)]
    two, one = (torch.tensor(each).amin(0) for each in zip(*found, strict=True))
    return tuple((two / one).tolist())


if __name__ == "__main__" and sys.argv[1:2] == ["survey"]:
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    print(f"{count} pairs, batches of 16 ÷ one by one: {batched_ratio(count):.2f}", flush=True)
    print(
        "{} pairs, two processes ÷ one, in seconds and in processor time: {:.2f}, {:.2f}".format(
            count, *processes_ratios(count)
        )
    )
elif __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    own, tokenizer = ct.load_model("embedded")
    control = random_model("small", vocab_size=len(tokenizer))
    columns = ["score", "the fact that answers is first", "rank correlation (LDS)"]
    for name, model, questions in (("embedded", own, count), ("random weights, 8 layers", control, count // 20)):
        print(f"{name}: {questions} questions, {FACTS} facts, {ORDERS} orders, {ABLATIONS} ablations, seed {SEED}")
        print(markdown(columns, against_the_truth(model, tokenizer, questions)), flush=True)
    if len(sys.argv) > 2:
        print("attribution ÷ plain run, and in tokens: {:.2f}, {:.2f}".format(*ratio(*ct.load_model(sys.argv[2]))))
