"""``controllability demo``: the embedded model answers from its weights what it was told in a context."""

import argparse
import math
import time
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from controllability.arrays import relative_error
from controllability.cli.files import new_path
from controllability.cli.output import Output, number
from controllability.embedded.world import draw_worlds
from controllability.errors import BadInput
from controllability.models import ModelPatch, patch_model
from controllability.models.files.folders import written
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.loading import embedded_directory, encode, load_model, on_device
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.logits import compare_logits
from controllability.models.reading.positions import pair_positions
from controllability.models.sweep.target_run import observe_target, silent
from controllability.rendering.figure import drawn, legend_below, two_plots


def demo(args: argparse.Namespace, output: Output) -> int:
    """See ``controllability demo --help``."""
    if not 1 <= args.worlds <= 1000:
        raise BadInput(f"--worlds must be at least 1 and at most 1000, got {args.worlds}")
    out = new_path(args.out)
    started = time.perf_counter()
    model, tokenizer = load_model(str(embedded_directory()), device=args.device)
    queries, errors, unpatched_errors = [], [], []
    worlds = draw_worlds(seed=20_000 + args.seed, count=args.worlds)
    first: tuple[ModelPatch, dict[str, Any], dict[str, Any]] | None = None
    with output.progress() as progress:
        total, done = sum(len(w.questions) for w in worlds), 0
        for world in worlds:
            for question in world.questions:
                target, source = (on_device(x, args.device) for x in encode(tokenizer, world.context, question.text))
                answer, mp = _ask(model, target, source, args.scope, args.route)
                first, wanted = first or (mp, target, source), answer["with_context"]
                words = {k: tokenizer.decode(v.argmax()) for k, v in answer.items()}
                queries.append({"context": world.context, "query": question.text, "expected": question.answer, **words})
                errors.append(compare_logits(answer["patched"], wanted).max_logit_error)
                unpatched_errors.append(compare_logits(answer["without_context"], wanted).max_logit_error)
                done += 1
                progress("questions", done, total)
    assert first is not None
    keys = ("with_context", "without_context", "patched")
    accuracy = {k: sum(q[k] == q["expected"] for q in queries) / len(queries) for k in keys}
    same = all(q["patched"] == q["with_context"] for q in queries)
    data = {
        "model": "embedded Gemma 3", "parameters": sum(p.numel() for p in model.parameters()),
        "layers": model.config.num_hidden_layers, "queries": queries, "accuracy": accuracy,
        "max_logit_error": max(errors), "max_logit_error_unpatched": max(unpatched_errors),
        "patch_numbers": first[0].numbers, "dense_numbers": first[0].dense_numbers, "scope": args.scope,
    }  # fmt: skip
    if out is not None:
        with written(out) as folder:
            layer_picture(model, *first, folder / "demo.png")
        data["picture"] = str(out / "demo.png")
    data["seconds"] = time.perf_counter() - started
    output.result(data)
    _show(output, data, first[0])
    return 0 if same and data["max_logit_error"] <= 1e-3 else 1


@torch.no_grad()
def _ask(
    model: Any, target: dict[str, Any], source: dict[str, Any], scope: str, route: str
) -> tuple[dict[str, torch.Tensor], ModelPatch]:
    """Last logits (vocabulary,) of the three runs.  The patched ones come from the model with the patch applied."""
    mp = patch_model(model, target, source, scope, route=route)

    def last(inputs: dict[str, Any]) -> torch.Tensor:
        return model(**inputs, use_cache=False).logits[0, -1]

    with mp.applied(model):
        patched = last(source)
    return {"with_context": last(target), "without_context": last(source), "patched": patched}, mp


def _show(output: Output, data: dict[str, Any], patch: ModelPatch) -> None:
    output.text(
        f"A Gemma 3 with {data['parameters']:,} parameters and {data['layers']} layers, trained on facts and questions.\n"
        "Each question is asked with the facts in its context, without them, and without them but with patched weights.\n"
    )
    seen: list[str] = []
    rows = []
    for query in data["queries"]:
        if query["context"] in seen or len(rows) >= 6:
            continue
        seen.append(query["context"])
        rows.append([query[k] for k in ("context", "query", "with_context", "without_context", "patched")])
    output.table("one question from each context", ["context", "question", "with context", "without", "patched"], rows)
    share = data["accuracy"]
    output.text(
        f"right answers to {len(data['queries'])} questions   with context {share['with_context']:.1%}   without {share['without_context']:.1%}   patched {share['patched']:.1%}\n"
        f"largest logit error   patched {number(data['max_logit_error'])}   unpatched {number(data['max_logit_error_unpatched'])}\n"
        f"the first patch holds {data['patch_numbers']:,} numbers for {len(patch.rows.sample)} words; "
        f"as dense ΔW it would be {data['dense_numbers']:,}\n"
        f"{data['seconds']:.1f} s" + (f"   picture: {data['picture']}" if "picture" in data else "")
    )


def layer_picture(model: Any, patch: Any, target: Mapping[str, Any], source: Mapping[str, Any], path: Path) -> Path:
    """Draw one patched pair of runs to ``path`` (PNG, written atomically); returns the path."""
    before = unpatched_errors(model, target, source, patch.scope)
    layers = patch.report.layers
    index = range(len(layers))
    scales = {"yscale": "log", "xlabel": "layer", "xticks": [*index]}
    figure, (errors, sizes) = two_plots()
    errors.plot(index, before, "s", label="without the context", color="#bb5a2a")
    errors.plot(index, [max(x.residual, 1e-17) for x in layers], "o", label="patched", color="#2a6fbb")
    errors.set(ylabel="relative error of the layer's output", title="error against the contextual run", **scales)
    names = [*dict.fromkeys(_short(name) for x in layers for name in x.relative_changes)]
    for k, (name, marker) in enumerate(zip(names, cycle("osD^v<>P"), strict=False)):
        changes = [{_short(n): v for n, v in reversed(x.relative_changes.items()) if v} for x in layers]
        heights = [change.get(name, math.nan) for change in changes]
        sizes.plot([i + 0.1 * (k - (len(names) - 1) / 2) for i in index], heights, marker, label=name)
    sizes.set(ylabel="largest relative change", title="size of the patches", **scales)
    for axes in (errors, sizes):  # no bars: they would have no foot on a scale of powers
        axes.margins(0.12)
        axes.grid(axis="y", alpha=0.3)
        legend_below(axes)
    figure.supxlabel(str(patch.sensitivity), fontsize="medium")
    return drawn(figure, path)


@torch.no_grad()
def unpatched_errors(model: Any, target: Mapping[str, Any], source: Mapping[str, Any], scope: str) -> list[float]:
    """The negative control: relative error of each layer's output in the plain source run."""
    source_rows, target_rows = pair_positions(target, source, scope)
    checked = checked_reading(model)
    with LayerHooks(model, checked.reading) as hooks:
        both = ((source, source_rows), (target, target_rows))
        runs = [observe_target(hooks, without_cache(model, inputs), rows, silent)[0] for inputs, rows in both]
    calls = [[call for layer in run for call in layer] for run in runs]
    return [relative_error(s.outputs[()], t.outputs[()]) for s, t in zip(*calls, strict=True)]


def _short(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]
