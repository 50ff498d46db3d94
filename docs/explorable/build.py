"""The explorable page: one HTML file with the embedded model, its tokenizer and the graph of its block.

python docs/explorable/build.py SITE     writes SITE/explorable.html
"""

import base64
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import architectures
import controllability as ct
from controllability.embedded.world import NAMES, RELATIONS
from controllability.interfaces import Component
from controllability.models.loading import embedded_directory
from controllability.rendering import graph, leaf_states, svg

HERE = Path(__file__).parent
CORE = ("model.js", "patch.js", "joint.js", "words.js")  # without a page: these also run in node
PAGE = ("pictures.js", "merging.js", "tour.js", "page.js")
CURVES, WIDTH = 34, 112  # room for two curves in a box of the graph


class Roomy(graph.Drawing):
    """The package's layout, with room for curves at the bottom of every box."""

    def box(self, leaf: Component, path: tuple[int, ...]) -> svg.Box:
        """The box of a leaf."""
        box = super().box(leaf, path)
        return replace(box, width=max(box.width, WIDTH), height=box.height + CURVES)


def graph_markup() -> str:
    """The feed-forward half of the model's layers as one SVG element, laid out from its proof."""
    block = architectures.block("gemma3")
    inside = Roomy(block, leaf_states.roles(ct.prove(block))).part(block, ())
    width, height = inside.width + 2 * graph.PAD, inside.height + 2 * graph.GAP + 44
    axis = graph.PAD + inside.axis
    ends = ((20, "v: what comes in"), (height - 8, "what goes on to the next layer"))
    shapes = (
        *(svg.Label(axis, y, text) for y, text in ends),
        svg.Wire(((axis, 30), (axis, 30 + graph.GAP)), inside.boxed), *inside.at(graph.PAD, 30 + graph.GAP),
        svg.Wire(((axis, 30 + graph.GAP + inside.height), (axis, height - 20))),
    )  # fmt: skip
    arrow = '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" markerHeight="8" markerUnits="userSpaceOnUse" orient="auto"><path class="head" d="M0 0L8 4L0 8z"/></marker></defs>'
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    # a box is called by the words in it, which stay apart for those who hear them
    boxes = re.sub(r' aria-label="[^"]*"><title>[^<]*</title>(?=<rect)', ">", svg.markup(shapes)).replace(
        "</text><text", "</text> <text"
    )
    return f'<svg {size} role="group" aria-label="one layer of the model as a graph">{arrow}{boxes}</svg>'


def page_data() -> dict[str, Any]:
    """What the scripts read: weights, config, vocabulary, rotary frequencies, the micro-world."""
    folder = embedded_directory()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    words = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in words["added_tokens"]}
    return {
        "config": config,
        "frequencies": {kind: _frequencies(config, kind) for kind in sorted(set(config["layer_types"]))},
        "vocabulary": {word: i for word, i in words["model"]["vocab"].items() if word not in special},
        "first": config["bos_token_id"],
        "names": NAMES,
        "relations": {name: asdict(relation) for name, relation in RELATIONS.items()},
        "weights": base64.b64encode((folder / "model.safetensors").read_bytes()).decode(),
    }


def _frequencies(config: dict[str, Any], kind: str) -> list[float]:
    """The rotary frequencies as transformers computes them, in float32 (NumPy's powers differ in the last bit)."""
    import torch  # imported where it is needed

    size = config["head_dim"]
    base = config["rope_parameters"][kind]["rope_theta"]
    return (1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float) / size))).tolist()


def page() -> str:
    """The whole page."""
    parts = {
        "STYLE": read("page.css"),
        "GRAPH": graph_markup(),
        "DATA": json.dumps(page_data(), ensure_ascii=False).replace("<", "\\u003c"),
        "CORE": "\n".join(map(read, CORE)),
        "PAGE": "\n".join(map(read, PAGE)),
    }
    text = read("page.html")
    for name, part in parts.items():
        before, after = text.split(f"<!--{name}-->")
        text = f"{before}{part}{after}"
    return text


def read(name: str) -> str:
    """One of the sources beside this file."""
    return (HERE / name).read_text(encoding="utf-8")


def build(site: Path) -> list[Path]:
    """Write ``explorable.html`` under the built site; return what was written."""
    site.mkdir(parents=True, exist_ok=True)
    file = site / "explorable.html"
    file.write_text(page(), encoding="utf-8")
    return [file]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/explorable/build.py SITE")
    print(*build(Path(sys.argv[1])))
