"""The explorable page, built, and its own scripts run in node or in a browser; the same questions put to the package."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shutil
import subprocess
from contextlib import contextmanager
from functools import cache
from html import unescape
from pathlib import Path

import torch
from test_html_browser import browse

import architectures
import controllability as ct
from controllability.compiling.token_sets import Context, padded, positions
from controllability.embedded.world import draw_world
from controllability.execution.trace import Trace
from controllability.interfaces import leaves
from controllability.models.exact_mode import exact_mode

HERE = Path(__file__).parent
DRIVER = (HERE / "explorable_answers.js").read_text(encoding="utf-8")
NODE = shutil.which("node")
ROUTES = ("auto", "balanced", "uniform", "secular", "scale", "ball")
MAPS = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj", "scale": "post_feedforward_layernorm"}


@cache
def built():
    """The script that builds the page."""
    file = HERE.parent / "docs" / "explorable" / "build.py"
    spec = importlib.util.spec_from_file_location("explorable_build", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def page() -> str:
    """The built page."""
    return built().page()


def part(name: str) -> str:
    """One of the scripts of the page."""
    return re.search(rf'<script id="{name}"[^>]*>(.*?)</script>', page(), re.S)[1]


def cases(count: int = 20, seed: int = 19) -> list[dict]:
    """Facts, a question, a route, a theorem and a part of the patch, at random; with some, questions for one patch."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        world = draw_world(rng, rng.randint(2, 8))
        asked = rng.sample([q.text for q in world.questions], min(len(world.questions), 2 + i % 3))
        found.append({
            "context": world.context, "question": asked[0], "others": asked if i % 3 == 0 else [],
            "route": ROUTES[i % len(ROUTES)], "via": ("input-output", "output")[i // 6 % 2],
            "layers": [rng.random() < 0.6 for _ in range(3)], "share": rng.random(),
        })  # fmt: skip
    return found


def in_node(tmp_path, cases: list[dict], data: str | None = None) -> list[dict]:
    """What the page's scripts answer in node."""
    file, out = tmp_path / "run.js", tmp_path / "out.json"
    text = f"{part('core')}\n{DRIVER}\nconst data = {data or part('data')};\nconst cases = {json.dumps(cases)};\n"
    text += f"require('fs').writeFileSync({json.dumps(str(out))}, JSON.stringify(answers(data, cases)));"
    file.write_text(text, encoding="utf-8")
    subprocess.run([NODE, str(file)], check=True, timeout=300)
    return json.loads(out.read_text(encoding="utf-8"))


def in_browser(tmp_path, cases: list[dict]) -> list[dict]:
    """The same in a browser, in the page itself."""
    script = f"{DRIVER}\ndocument.body.dataset.out = JSON.stringify(answers(data, {json.dumps(cases)}));"
    return left(browse(tmp_path, page().replace("</body>", f"<script>{script}</script></body>"), "--dump-dom"))


def left(dom: str):
    """What a script left in data-out."""
    return json.loads(unescape(re.search(r'data-out="([^"]*)"', dom)[1]))


@torch.no_grad()
def in_python(model, tokenizer, case: dict) -> dict:
    """The same from the package, in exact float64."""
    with exact_mode():
        target, source = ct.encode(tokenizer, case["context"], case["question"])
        at = source["input_ids"].shape[1]
        runs = {"target": target, "source": source}
        out = {
            "ids": target["input_ids"][0].tolist(), "nodes": {name: nodes(model, run) for name, run in runs.items()},
            "logits": {name: model(**run, use_cache=False).logits[0] for name, run in runs.items()},
        }  # fmt: skip
        assert at < len(out["ids"])
        try:
            mp = ct.patch_model(model, target, source, scope="last", route=case["route"], via=case["via"])
        except ct.SideConditionFailed as refused:
            out["refused"] = refused
        else:
            out |= {"report": mp.report.layers, "sizes": mp.frame(), "spread": spread(model, mp)}
            with mp.applied(model, as_weights=True):
                out["nodes"]["patched"] = nodes(model, source)
                out["logits"]["patched"] = model(**source, use_cache=False).logits[0]
            with partly(model, mp, case["layers"], case["share"]):
                out["logits"]["part"] = model(**source, use_cache=False).logits[0]
        if case["others"]:
            out["joint"] = jointly(model, tokenizer, case)
    return out


def spread(model, mp) -> list[float]:
    """mean(m'²) of each layer's scale after the norm."""
    names = [f"model.layers.{i}.{MAPS['scale']}.weight" for i in range(3)]
    moved = {row["parameter"] for row in mp.frame()}
    weights = (model.get_parameter(n) + (mp.delta(n).matrix if n in moved else 0) for n in names)
    return [float(((1 + weight) ** 2).mean()) for weight in weights]


def jointly(model, tokenizer, case: dict) -> dict:
    """One patch for several questions, each then asked alone."""
    context = Context.of(tokenizer, case["context"])
    samples = [context.sample(text) for text in case["others"]]
    target, source = (padded(samples, side) for side in ("target", "source"))
    mp = ct.patch_model(model, target, source, scope="all", via=case["via"], positions=positions(samples))
    with mp.applied(model):
        logits = [model(torch.tensor([s.source]), use_cache=False).logits[0, -1] for s in samples]
    scales = [mp.delta(f"model.layers.{i}.{MAPS['scale']}.weight").matrix for i in range(3)]
    wanted = [model(torch.tensor([s.target]), use_cache=False).logits[0, -1] for s in samples]
    return {
        "logits": logits,
        "target": wanted,
        "sizes": mp.frame(),
        "scales": scales,
        "routes": [x.route for x in mp.report.layers],
    }


@contextmanager
def partly(model, mp, layers, share):
    """The weights with a share of the patch, of some layers, written into them as dense matrices."""
    state, kept = dict(model.named_parameters()), {}
    for row in mp.frame():
        if layers[row["layer"]]:
            kept[row["parameter"]] = state[row["parameter"]].clone()
            state[row["parameter"]].add_(share * mp.delta(row["parameter"]).matrix)
    yield
    for name, value in kept.items():
        state[name].copy_(value)


def nodes(model, inputs) -> list[dict]:
    """The value at every node of every layer's block, at the last token, by the package's own trace."""
    states: list[torch.Tensor] = []
    hooks = [
        layer.pre_feedforward_layernorm.register_forward_pre_hook(lambda _, given: states.append(given[0][0, -1:]))
        for layer in model.model.layers
    ]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    found = []
    for layer, state in zip(architectures.read(model).layers, states, strict=True):
        trace = Trace(layer.block, layer.params, state)
        paths = [(), (1, 2), *(path for path, _ in leaves(layer.block))]
        found.append({"-".join(map(str, path)): trace.output(path)[0] for path in paths})
    return found
