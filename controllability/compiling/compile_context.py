"""``compile_context``: from a context and queries to one set of weights that answers them without it."""

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache as cache_of, partial
from typing import Any

from torch import nn

from controllability.compiling.answers import ASKED, Examination, Speaker, end_tokens
from controllability.compiling.controls import control_arms
from controllability.compiling.exact_or_ridge import EXACTLY, ExactAttempt, Solution, Wish, solve, tolerance
from controllability.compiling.metric_sweep import drifts, fitted, hard_ones
from controllability.compiling.queries import Query, as_queries, refuse_overlap, without_repeats
from controllability.compiling.result import Compiled
from controllability.compiling.strengths import STRENGTHS, Strength, strength_of
from controllability.compiling.token_sets import (
    Context,
    Sample,
    beginnings,
    refuse_contradictions,
    refuse_foreign,
    refuse_known,
)
from controllability.compiling.unrelated_texts import near_samples, ordinary_moments, unrelated_samples
from controllability.compiling.yardstick import Yardstick
from controllability.errors import BadInput, ControllabilityWarning
from controllability.models.hooks.own_modes import own_modes
from controllability.models.moments import Moments, refuse_other_than_moments
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.model_facts import cache_bytes, position_limit, text_config
from controllability.models.sweep.shared_past import SharedPast
from controllability.models.sweep.target_run import Progress, silent


def compile_context(
    model: nn.Module, tokenizer: Any, context: str, queries: Sequence[str | Query],
    heldout: Sequence[str | Query] = (), unrelated: Sequence[str] = (), answer_tokens: int = 0, rank: int | None = None,
    ridge: float | None = None, keep_rms: bool = False, via: str | None = None, progress: Progress = silent,
    strength: str | Strength = "balanced", moments: Moments | None = None, near: Sequence[str] = (), controls: bool = False,
    place: str | None = None,
) -> Compiled:  # fmt: skip
    """One set of weights with which ``model`` answers the queries as if the context stood before them.

    ``strength`` says what counts beside the queries: "gentle", "balanced" or "strong" (or a ``Strength`` by hand) carries over to other
    wordings and disturbs other text little, as ``moments`` measure it (``second_moments``; by default those of what the model writes by
    itself and of some English prose, made anew at each call).  "exact", which ``ridge``, ``keep_rms`` and ``via`` belong to and bring about, reproduces
    every token of the queries where one patch can be (theory 5); where it cannot, or not of rank ``rank``, it is "strong".
    ``ridge`` 0 refuses what is not exact, a positive number is the λ of plain least squares.  ``keep_rms`` refuses to move the RMS before a norm.  ``via`` None tries
    Theorem 1b, then 1.
    ``answer_tokens`` of the contextual model's own continuation of each query belong to the set, or the answer that a ``Query`` gives; a
    warning names an answer that the contextual model does not give.  ``controls`` compiles control arms too, ``place`` is as in ``patch_model``.  The model is left as it was.

    Raises ``BadInput``; and ``SideConditionFailed`` (with a certificate), ``NotControllable`` or ``NotVerified`` where no patch
    of the wanted kind exists.  Source: new (theory, section 5).

    >>> import controllability as ct
    >>> from controllability.models.loading import load_model
    >>> model, tokenizer = load_model("embedded")
    >>> compiled = ct.compile_context(model, tokenizer, "Mia lives in Oslo . Leo lives in Rome .",
    ...     ["Where does Mia live ?", "Where does Leo live ?"])
    >>> compiled.exact, [row["patched"] for row in compiled.answers()]
    (False, ['Oslo', 'Rome'])
    """
    started = time.perf_counter()
    _refuse_strange(model, tokenizer, moments, controls)
    asked, left_out = _queries(queries, "queries"), _queries(heldout, "held-out queries")
    elsewhere, alike = _texts(unrelated, "unrelated texts"), _texts(near, "near texts")
    if not asked:
        raise BadInput("there are no queries")
    refuse_overlap(asked, left_out)
    wish = Wish(via, rank, ridge, keep_rms, place=place)
    plan = planned(strength, wish)
    refuse_wish(wish, answer_tokens, getattr(text_config(model), "hidden_size", None))
    limit = position_limit(text_config(model))
    before = Context.of(tokenizer, context, limit, [one.text for query in (*asked, *left_out) for one in query.each()])
    with own_modes(model):
        checked_reading(model, place=place)  # refuses what cannot be patched before anything is run
        speaker = Speaker(tokenizer, end_tokens(model, tokenizer), answer_tokens, limit)
        samples = [before.of_query(query, answer_tokens) for query in asked]
        strangers = unrelated_samples(tokenizer, elsewhere, context, [q.text for q in (*asked, *left_out)], limit)
        apart = {"near": near_samples(tokenizer, alike, asked, limit), "unrelated": strangers}
        others = [before.of_query(query) for query in left_out]
        refuse_foreign([*samples, *others, *apart["near"], *apart["unrelated"]], model)
        refuse_contradictions(samples)
        past = SharedPast.of(model, before.tokens, samples[0].target[len(before.tokens) :])
        speaker = replace(speaker, past=past)
        sets, known = _sets(model, speaker, samples, others, apart, progress)
        examination = Examination.of(model, sets, speaker)
        ordinary = partial(ordinary_moments, model, tokenizer, limit, progress, without=context, place=place)
        made = cache_of(lambda: moments or ordinary())
        solved = partial(_solved, model, plan, wish, made, progress)
        solution = solved(sets["queries"], past)
        found = examination.findings(model, solution.patch)
        if plan is not None and rank is None and all(hard_ones(samples, plan)):
            solution = replace(solution, exact=found.results["queries"].relative_error <= tolerance(model))
        arms = control_arms(model, context, solution.patch, solved, examination, progress) if controls else []
        _warn(line for answers in found.answers.values() for line in answers.unsaid())
    seconds, drift = time.perf_counter() - started, drifts(model, solution.patch)
    return Compiled(
        solution, before, answer_tokens, known, sets, found.results, found.logits, seconds, drift, found.answers, arms, cache_bytes(model)
    )  # fmt: skip


NEXT = "strong"  # what "exact" becomes where nothing is


def _solved(
    model: nn.Module, plan: Strength | None, wish: Wish, moments: Callable[[], Moments], progress: Progress,
    queries: Yardstick, past: SharedPast | None = None,
) -> Solution:  # fmt: skip
    attempts: tuple[ExactAttempt, ...] = ()
    if plan is None:
        found = solve(model, queries, wish, progress)
        if isinstance(found, Solution):
            return found
        attempts, plan = found, STRENGTHS[NEXT]
    patch = fitted(model, queries, plan, wish.rank, moments(), progress, past, wish.place)
    return Solution(patch, replace(wish, via=patch.report.via), False, plan.ridge, attempts, plan)


def _sets(
    model: nn.Module, speaker: Speaker, samples: list[Sample], others: list[Sample], apart: dict[str, list[Sample]], progress: Progress
) -> tuple[dict[str, Yardstick], int]:  # fmt: skip
    """The sets of texts as far as there are any, the queries and held-out ones with their answers, and how many tokens the queries have."""
    samples = speaker.answered(model, samples, progress)
    known = beginnings(samples)
    refuse_known(others, known)
    others = [sample if sample.answer else sample.bare for sample in speaker.answered(model, others, progress)]
    texts = {"queries": samples, "heldout": others} | apart
    past: dict[str, SharedPast | None] = dict.fromkeys(ASKED, speaker.past)
    seen = {"heldout": known}
    return {k: Yardstick.of(model, v, seen.get(k, ()), past.get(k)) for k, v in texts.items() if v}, len(known)


def _refuse_strange(model: Any, tokenizer: Any, moments: Any, controls: Any) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "config") or not callable(tokenizer):
        given = f"{type(model).__name__} and {type(tokenizer).__name__}"
        raise BadInput(f"give a model of transformers and its tokenizer, got {given}")
    refuse_other_than_moments(moments)
    if not isinstance(controls, bool):
        raise BadInput(f"controls must be True or False, got {controls!r:.80}")


def planned(strength: str | Strength, wish: Wish) -> Strength | None:
    """The strength; None where every token is to be exact, as options that belong to that say.  Raises ``BadInput``."""
    plan = strength_of(strength)
    held = {"ridge": wish.ridge is not None, "keep_rms": wish.keep_rms is not False, "via": wish.via is not None}
    named = [name for name, given in held.items() if given]
    if plan is not None and named and strength != "balanced":
        raise BadInput(f"{named[0]} belongs to the strength 'exact', not to {strength!r}: leave one of the two out")
    return None if named else plan


def refuse_wish(wish: Wish, answer_tokens: int, width: int | None = None) -> None:
    """Raise ``BadInput`` for numbers that make no sense; ``width`` is the model's."""
    if wish.via not in (None, *EXACTLY):
        raise BadInput(f"unknown via {wish.via!r}: choose {' or '.join(EXACTLY)}")
    if isinstance(answer_tokens, bool) or not isinstance(answer_tokens, int) or answer_tokens < 0:
        raise BadInput(f"answer tokens must be 0 or more, got {answer_tokens!r}")
    if not isinstance(wish.keep_rms, bool):
        raise BadInput(f"keep_rms must be True or False, got {wish.keep_rms!r}")
    number = isinstance(wish.ridge, int | float) and not isinstance(wish.ridge, bool)
    if wish.ridge is not None and not (number and 0 <= wish.ridge <= sys.float_info.max):
        raise BadInput(f"the ridge λ must be a number from 0 on, got {wish.ridge!r:.80}")
    if wish.keep_rms and wish.ridge:
        raise BadInput("keep_rms asks for an exact patch and ridge for a fit: leave one of them out")
    if wish.rank is None:
        return
    if isinstance(wish.rank, bool) or not isinstance(wish.rank, int):
        raise BadInput(f"the rank must be a Python int, got {wish.rank!r:.80}")
    if wish.rank < 1:
        raise BadInput(f"the rank must be at least 1, got {wish.rank}")
    if width is not None and wish.rank > width:
        raise BadInput(
            f"the rank {wish.rank} is above the model's width: no patch of its matrices has more than {width}"
        )


def _queries(items: Iterable[str | Query], what: str) -> list[Query]:
    found, notes = without_repeats(as_queries(items, what), what)
    _warn(notes, 4)
    return found


def _texts(items: Iterable[str | Query], what: str) -> list[str]:
    return [one.text for query in as_queries(items, what) for one in query.each()]


def _warn(notes: Iterable[str], level: int = 3) -> None:
    for note in notes:
        warnings.warn(note, ControllabilityWarning, stacklevel=level)
