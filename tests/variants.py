"""Config options that change a layer: is every variant of every family read?

    PYTHONPATH=. python tests/variants.py [FAMILY ...] > RESULTS
    PYTHONPATH=. python tests/variants.py --table RESULTS    # writes the table into docs/architectures.md

For each causal-LM family the tiny model of ``family_models`` is built with each boolean option flipped, with each value
of its enum-like options (what the family's own code compares an option with; activations; every kind of layer), and with each pair of options that change the layer.  A combination changes the layer if its modules,
the shapes of its parameters or the expression that is read differ from the usual ones.  Each ends in one of four ways:

- exact: read, and the expression agrees with the modules on random input, in float64;
- refused: ``NotControllable``, with the reason;
- undeclared: any other error of ours; these are to be none;
- impossible: transformers itself cannot build the model or run it.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from family_models import RECIPES, build, config_of, default_dtype, inputs, logits_of
from torch import nn
from transformers.activations import ACT2CLS

import architectures
from controllability.errors import ControllabilityError, NotControllable
from controllability.models.exact_mode import exact_mode
from controllability.models.reading.compare_with_module import compare

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
HEADING = "\n## Options of the configs\n"
EVERY = ("llama", "gpt2", "phi3", "qwen2_moe")  # a half of each kind: here all activations are tried
ACTIVATIONS = ("relu", "prelu", "xielu")  # in the other families: without parameters, with one, with several
OTHER_KINDS = re.compile(
    r"^(_|output_|return_|use_cache$|tie_|is_encoder_decoder$|problem_type|dtype$|model_type$|transformers_version)"
)
IN_PAIRS = 2  # of the values of one option, so many are paired with those of others


def changed_config(name: str, changes: dict[str, Any]) -> Any:
    """The tiny config of a family with other values of some options, wherever in it they are."""
    recipe = copy.deepcopy(RECIPES[name]["overrides"])
    usual = config_of(name)
    text = usual.get_text_config() if hasattr(usual, "get_text_config") else usual
    parts = [k for k, v in recipe.items() if isinstance(v, dict) and type(getattr(usual, k, None)) is type(text)]
    inside = recipe[parts[0]] if text is not usual and parts else recipe
    for key, value in changes.items():
        inside[key] = value
    config = config_of(name, recipe)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key, value in changes.items():
        if getattr(text, key, None) != value:
            setattr(text, key, value)
    return config


def options(name: str) -> dict[str, list[Any]]:
    """Option -> the values it may take instead of its usual one."""
    config = config_of(name)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    source = _source(type(text), RECIPES[name]["model_class"])
    found: dict[str, list[Any]] = {}
    for key, value in vars(text).items():
        if OTHER_KINDS.match(key) or not re.search(rf"\b{key}\b", source):
            continue
        if isinstance(value, bool):
            found[key] = [not value]
        elif value is None and "bool" in str(type(text).__annotations__.get(key, "")):
            found[key] = [True, False]
        elif isinstance(value, str):
            activations = ACT2CLS if name in EVERY else ACTIVATIONS
            others = activations if value in ACT2CLS else _compared(source, key)
            found[key] = [v for v in others if v != value]
        elif key.endswith(("types", "pattern")) and isinstance(value, list) and value and isinstance(value[0], str):
            kinds = {*value, *_compared(source, key.removesuffix("s")), *_compared(source, key)}
            found[key] = [[kind] * len(value) for kind in sorted(kinds) if [kind] * len(value) != value]
    return {key: values for key, values in found.items() if values}


def _source(config: type, model: str) -> str:
    """The code of a family: where its config and its model are written."""
    from family_models import _class

    files = {inspect.getsourcefile(cls) for cls in (config, _class(model))}
    return "\n".join(open(f).read() for f in files if f)


def _compared(source: str, key: str) -> list[str]:
    """What the code compares an option with."""
    found = re.findall(rf"\b{key}(?:\[\w+\])?\s*(?:==|!=|(?:not )?in)\s*([^\n]*)", source)
    found += re.findall(rf"\b{key}: Literal\[([^\]]*)\]", source)
    return list(dict.fromkeys(v for line in found for v in re.findall(r"[\"'](\w+)[\"']", line)))


def layers_of(model: nn.Module, name: str) -> list[Any]:
    """What a layer is made of: classes, and shapes of parameters."""
    try:
        layers = [m for m in model.modules() if architectures.reading.architecture_of(model).is_layer(m)]
    except ControllabilityError:
        layers = [model]
    return [
        ([(n, type(m).__name__) for n, m in layer.named_modules()], [(n, tuple(p.shape)) for n, p in layer.named_parameters()])
        for layer in layers
    ]  # fmt: skip


def outcome(name: str, changes: dict[str, Any]) -> tuple[str, str, str]:
    """(exact, refused, undeclared or impossible; the reason; what the layers are, as text)."""
    with warnings.catch_warnings(), torch.no_grad(), default_dtype(name), exact_mode():
        warnings.simplefilter("ignore")
        try:
            model = build(name, config=changed_config(name, changes))
            target, _ = inputs(name, model)
            logits_of(model, target)
        except Exception as error:  # whatever transformers raises
            return "impossible", f"{type(error).__name__}: {error}"[:160], ""
        made = repr(layers_of(model, name))
        try:
            reading = architectures.read(model)
            made += repr([layer.block for layer in reading.layers])
            compare(model, reading, target)
        except NotControllable as refused:
            return "refused", f"{refused.culprit}: {refused.reason}", made
        except Exception as error:
            return "undeclared", f"{type(error).__name__}: {error}"[:300], made
    return "exact", "", made


def sweep(name: str) -> Iterator[tuple[dict[str, Any], str, str]]:
    """(changes, outcome, reason) of each combination that changes the layer of a family."""
    usual = outcome(name, {})
    changing: dict[str, list[Any]] = {}
    for key, values in options(name).items():
        for value in values:
            end, why, made = outcome(name, {key: value})
            if end == "impossible" or (made == usual[2] and end == usual[0]):
                if end == "impossible":
                    yield {key: value}, end, why
                continue
            changing.setdefault(key, []).append(value)
            yield {key: value}, end, why
    for a, b in itertools.combinations(changing, 2):
        for x, y in itertools.product(changing[a][:IN_PAIRS], changing[b][:IN_PAIRS]):
            end, why, _ = outcome(name, {a: x, b: y})
            yield {a: x, b: y}, end, why


def row(name: str, found: list[tuple[dict[str, Any], str, str]]) -> str:
    """A family's row of the table: which options change its layers, and how their combinations end."""
    built = [one for one in found if one[1] != "impossible"]
    alone = Counter(key for changes, _, _ in built for key in changes if len(changes) == 1)
    options = ", ".join(f"`{key}`" + f" ({count})" * (count > 1) for key, count in sorted(alone.items()))
    ends = Counter(end for _, end, _ in found)
    reasons = "; ".join(sorted({why.split(": ")[1] for _, end, why in found if end == "refused"}))
    refused = f"{ends['refused']}: {reasons}" if reasons else "0"
    return f"| {name} | {options} | {ends['exact']} | {refused} | {ends['undeclared']} | {ends['impossible']} |"


def section(found: dict[str, list[tuple[dict[str, Any], str, str]]]) -> str:
    """The part of docs/architectures.md about options, from all that was found."""
    rows = [row(name, outcomes) for name, outcomes in sorted(found.items()) if outcomes]
    every = [(name, *one) for name, outcomes in found.items() for one in outcomes]
    ends = Counter(end for _, _, end, _ in every)
    alone = {
        (name, key) for name, changes, end, _ in every if end != "impossible" for key in changes if len(changes) == 1
    }
    whole = sum(
        sum(end == "refused" for _, end, _ in one)
        for one in found.values()
        if one and all(end in ("refused", "impossible") for _, end, _ in one)
    )
    built = ends["exact"] + ends["refused"] + ends["undeclared"]
    return f"""{HEADING}
Written by `python tests/variants.py`, which says what it tries. An option counts if it changes the modules of a layer, the
shapes of its parameters or the expression that is read; a number behind it says how many values do. Each combination,
one option or two together, is read and compared with the modules in exact float64, or refused by name with the reason.
"impossible" are those that transformers itself cannot build or run.

{len(alone)} options of {len(rows)} families; {built} combinations: {ends["exact"]} exact ({100 * ends["exact"] / built:.1f} %),
{ends["refused"]} refused by name (all but {ends["refused"] - whole} in families that are refused with any options), {ends["undeclared"]} undeclared;
{ends["impossible"]} are impossible.

| family | options that change a layer | exact | refused, why | undeclared | impossible |
|---|---|---|---|---|---|
""" + "\n".join(rows) + "\n"  # fmt: skip


def main(arguments: list[str]) -> None:
    """Sweep the families named (all by default), a line of JSON for each combination; or write the table of such lines."""
    if arguments[:1] == ["--table"]:
        found: dict[str, list[tuple[dict[str, Any], str, str]]] = {name: [] for name in RECIPES}
        for line in Path(arguments[1]).read_text(encoding="utf-8").splitlines():
            name, *one = json.loads(line)
            found[name].append(tuple(one))  # type: ignore[arg-type]
        page = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
        PAGE.write_text(page + section(found), encoding="utf-8")
        return
    for name in arguments or RECIPES:
        for changes, end, why in sweep(name):
            print(json.dumps([name, changes, end, why]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
