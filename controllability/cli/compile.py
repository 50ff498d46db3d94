"""``controllability compile``: a context into one set of weights, measured, written and loaded again."""

import argparse
import contextlib
import time
from pathlib import Path
from typing import Any

from controllability.cli.files import new_path
from controllability.cli.output import Output, number
from controllability.cli.streams import say
from controllability.compiling import Compiled, compile_context
from controllability.compiling.compile_context import planned, refuse_wish
from controllability.compiling.exact_or_ridge import Wish
from controllability.compiling.queries import Query, read_queries, refuse_no_text, refuse_overlap
from controllability.compiling.result import TITLES
from controllability.compiling.strengths import EXACT, STRENGTHS
from controllability.compiling.unrelated_texts import further_questions, ordinary_moments
from controllability.compiling.write import Written, measure_by_rank, write
from controllability.errors import BadInput
from controllability.models import exact_mode, load_moments, second_moments
from controllability.models.loading import load_model
from controllability.models.moments import Moments
from controllability.models.reading.model_facts import position_limit, text_config
from controllability.rendering.text import printable
from controllability.texts import read_text

LISTED = 12  # answers that are shown
STEPS = (*STRENGTHS, EXACT)  # each nearer to the queries than the one before, and felt more elsewhere


def compile(args: argparse.Namespace, output: Output) -> int:  # noqa: A001 (named after the command)
    """See ``controllability compile --help``."""
    started = time.perf_counter()
    out, texts = _checked(args)
    with output.busy(f"loading {args.model}"):
        model, tokenizer = load_model(args.model, args.dtype, args.trust_remote_code, args.device)
    with output.progress() as progress, exact_mode() if args.dtype == "float64" else contextlib.nullcontext():
        texts["queries"] += _further(args, model, tokenizer, [query.text for kind in texts.values() for query in kind])
        compiled = compile_context(
            model, tokenizer, args.context, texts["queries"], texts["heldout"], [q.text for q in texts["unrelated"]],
            args.answer_tokens, args.rank, args.ridge, args.keep_rms, args.via, progress, args.strength, _moments(args, model, tokenizer, progress),
            [q.text for q in texts["near"]], args.controls, args.place,
        )  # fmt: skip
        by_rank = measure_by_rank(compiled, model, progress) if args.picture else None
        with output.busy("writing it, and loading it again"):
            kind = "peft" if args.peft else "merged" if args.merge else "patch"
            done = write(compiled, model, tokenizer, out, kind, by_rank)
    output.result(done.report | {"model": args.model, "dtype": args.dtype, "seconds": time.perf_counter() - started})
    if not output.as_json:
        _show(output, compiled, done, time.perf_counter() - started)
        if compiled.solution.plan is not None and args.moments is None:
            output.text(
                f"Moments were made for this call alone: controllability moments {args.model} --out FILE makes them once."
            )
    return 0


def _checked(args: argparse.Namespace) -> tuple[Path, dict[str, list[Query]]]:
    """The directory and the texts.  Raises ``BadInput`` before anything is loaded or computed."""
    refuse_no_text(args.context, "the context")
    out = new_path(args.out)
    assert out is not None
    wish = Wish(args.via, args.rank, args.ridge, args.keep_rms)
    refuse_wish(wish, args.answer_tokens)
    if planned(args.strength, wish) is None and args.moments:
        raise BadInput(
            "--moments: an exact patch is made without second moments; leave it out, or choose another --strength"
        )
    texts: dict[str, list[Query]] = {}
    named = {"queries": "queries", "heldout": "held-out queries", "near": "near texts", "unrelated": "unrelated texts"}
    for name, what in named.items():
        path = getattr(args, name)
        texts[name], notes = read_queries(path, what) if path is not None else ([], [])
        for note in notes:
            say(f"controllability: {note}")
    refuse_overlap(texts["queries"], texts["heldout"])
    return out, texts


def _further(args: argparse.Namespace, model: Any, tokenizer: Any, known: list[str]) -> list[Query]:
    """The queries that the model writes itself, as far as they were asked for, and a line that says how many."""
    if args.further_questions is None:
        return []
    found = further_questions(model, tokenizer, args.context, args.further_questions, known)
    say(f"controllability: the model wrote {len(found)} further questions: they are among the queries")
    return [Query(text) for text in found]


def _moments(args: argparse.Namespace, model: Any, tokenizer: Any, progress: Any) -> Moments | None:
    """Those in the file that was named; where there is none yet they are made and written there.  None: none was named."""
    if args.moments is None:
        return None
    if Path(args.moments).exists():
        return load_moments(args.moments, model)
    limit = position_limit(text_config(model))
    return ordinary_moments(
        model, tokenizer, limit, progress, save=args.moments, without=args.context, place=args.place
    )


def _show(output: Output, compiled: Compiled, done: Written, seconds: float) -> None:
    heading, *rows = compiled.rows()
    output.table("how far it carries", heading, rows)
    runs = ("query", "with_context", "patched", "without_context")
    rows = [[printable(str(row[k])) for k in runs] for row in compiled.answers()]
    more = f" (the first {LISTED} of {len(rows)})" if len(rows) > LISTED else ""
    output.table(f"answers{more}", ["query", "with context", "compiled", "without"], rows[:LISTED])
    output.text(_how(compiled))
    if compiled.context.anchored:
        first = " ".join(map(repr, compiled.first_tokens))
        output.text(f"this tokenizer puts no token before a text: give the compiled model {first} before each query")
    output.text("\n".join([*_sizes(compiled), *_advice(compiled)]))
    output.text(_checked_line(compiled.exact, done, seconds))


def _how(compiled: Compiled) -> str:
    data = compiled.to_dict()
    size = f"{data['tokens']} tokens in one set of weights, rank {data['rank']}, via {data['via']}"
    if not compiled.solution.wish.pinned:
        size += ", the first token's own state let go"
    plan = compiled.solution.plan
    if plan is not None:
        moved = ", ".join(str(layer.index) for layer in compiled)
        return f"fitted, strength {data['strength']}: {size}; layers {moved} move."
    if compiled.exact:
        return f"exact: {size}.\nExactness holds on the set of queries; the held-out queries tell what generalises."
    rounded = compiled.solution.rounded
    fit = "solved exactly, but rounding shows" if rounded else f"least squares with λ {data['ridge']:g}"
    lines = [f"not exact ({fit}): {size}."]
    lines += [f"no exact patch via {attempt.wish.via}: {attempt.reason}" for attempt in compiled.solution.attempts]
    return "\n".join([*lines, "The held-out queries tell what generalises; nothing else does."])


def _sizes(compiled: Compiled) -> list[str]:
    """What other text loses, what was right, and how large the patch is, each in a line."""
    lines = []
    if found := compiled.apart["unrelated"].perplexity:
        told = "Perplexity of unrelated text: {base:.3g}, compiled {compiled:.3g} (× {ratio:.3g})."
        lines.append(told.format(**found))
    for name, spoken in compiled.spoken.items():
        if (right := spoken.right()) is not None:
            which = TITLES[name].partition(",")[0]
            lines.append(f"Of what the contextual model has right, {right:.0%} of the {which} are right.")
    if compiled.kv_tokens is not None:
        tokens = f"{compiled.kv_tokens:,.0f} tokens; the context has {len(compiled.context.tokens):,}"
        lines.append(f"The patch is as large as the KV cache of {tokens}.")
    return lines + [f"no control with {arm.name}: {arm.why}" for arm in compiled.arms if arm.found is None]


def _advice(compiled: Compiled) -> list[str]:
    """What the measurements say that a user should do next."""
    now = {name: (compiled.results[name].kl, compiled.sets[name].unpatched.kl) for name in compiled.sets}
    strength, lines = compiled.solution.strength, []
    at = STEPS.index(strength) if strength in STEPS else 0
    if compiled.drifts:
        gentler = f"--strength {STEPS[at - 1]}, or " if at else ""
        moments = "--moments of texts like those that are to stay" if strength != "exact" else "a smaller --rank"
        lines.append(f"It {compiled.drifts}: try {gentler}{moments}.")
    if now["queries"][0] > 0.05 * now["queries"][1]:
        more = "a higher --rank, or fewer queries"
        stronger = f"--strength {STEPS[at + 1]}" if strength in STEPS[:-1] else more
        lines.append(f"The queries are not all reached: try {stronger}.")
    if "heldout" not in now:
        lines.append("Held-out queries (--heldout) would tell what generalises.")
    elif now["heldout"][0] > 0.3 * now["heldout"][1]:
        lines.append("Other wordings carry over in part: more wordings among the queries help most.")
    return lines or ["Queries, other wordings and other text are as they should be."]


def _checked_line(exact: bool, done: Written, seconds: float) -> str:
    found: dict[str, Any] = done.verified
    lines = [f"{done.directory}: {', '.join(done.files)}"]
    drifts = f"; {found['drifts']}" if found["drifts"] else ""
    if found["passed"] and not exact:
        error = f"{number(found['from_compiled'])}, {found['tolerance']:g} is allowed"
        lines.append(
            f"verified to be the compiled model, no more: {found['how']}, gives its logits on the queries (relative error {error}){drifts}"
        )
    elif found["passed"]:
        error = number(found["max_logit_error"])
        lines.append(f"verified: {found['how']}, has a largest logit error of {error} on the queries{drifts}")
    else:
        lines.append(found["how"])
    return "\n".join([*lines, f"{seconds:.1f} s"])


def moments(args: argparse.Namespace, output: Output) -> int:
    """See ``controllability moments --help``."""
    started = time.perf_counter()
    if not (args.out.strip() and Path(args.out).exists()):
        new_path(args.out, file=True)
    lines = None if args.texts is None else read_text(args.texts, "the texts").splitlines()
    texts, without = [line for line in lines or [] if line.strip()], args.context or ""
    if lines is not None and not texts:
        raise BadInput(f"the texts {args.texts} are empty: write one text a line")
    with output.busy(f"loading {args.model}"):
        model, tokenizer = load_model(args.model, args.dtype, args.trust_remote_code, args.device)
    with output.progress() as progress, exact_mode() if args.dtype == "float64" else contextlib.nullcontext():
        try:
            if texts:
                found = second_moments(model, texts, tokenizer, progress, args.out, without, args.place)
            else:
                limit = position_limit(text_config(model))
                found = ordinary_moments(
                    model, tokenizer, limit, progress, save=args.out, without=without, place=args.place
                )
        except KeyboardInterrupt:
            if Path(args.out).exists():
                say(f"controllability: {args.out} holds what was read so far: the same command goes on from there")
            raise
    with output.busy("measuring conditions"):
        conditions = found.condition.values()
    data = {"tokens": found.tokens, "matrices": len(conditions), "condition": [min(conditions), max(conditions)]}
    output.result(data | {"out": args.out, "model": args.model, "seconds": time.perf_counter() - started})
    low, high = data["condition"]
    output.text(
        f"{args.out}: second moments of {len(conditions)} matrices over {found.tokens:,} tokens, condition numbers {low:.0f} to "
        f"{high:.0f}\nuse them: controllability compile {args.model} … --moments {args.out}"
    )
    return 0
