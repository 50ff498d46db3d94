"""The gallery: ten families, each with the page that ``controllability prove NAME --format html`` writes."""

from __future__ import annotations

from collections.abc import Iterator

import architectures
import controllability as ct
from controllability.rendering.html import proof_html

FAMILIES = {
    "gemma3": "Google. Norms before *and* behind each half: the last map sits inside a norm, whose scale takes part in the patch.",
    "llama": "Meta. The plain gated block, a norm in front: what most families are.",
    "mixtral": "Mistral. Eight experts, two of them chosen: the router is steered to the target's choice, then the chosen experts.",
    "deepseek_v3": "DeepSeek. Many small experts beside a shared one.",
    "gpt_oss": "OpenAI. Experts with biases and a clamped gate.",
    "gptj": "EleutherAI. Attention and feed-forward half side by side: both read the same state.",
    "olmo2": "Ai2. Norms behind each half only.",
    "bert": "Google. The norm stands around the sum: it is reproduced, not patched.",
    "gpt2": "OpenAI. LayerNorm with biases, and a bias that moves alone is a patch.",
    "mamba": "Gu and Dao. No feed-forward half at all: the patch goes behind the state-space scan.",
}


def pages() -> Iterator[tuple[str, str]]:
    """Name and page of each family, with a way back.

    >>> name, page = next(pages())
    >>> name, "../gallery.html" in page, "theorem-1" in page
    ('gemma3', True, True)
    """
    back = '<p><a href="../gallery.html">← all ten</a></p>'
    for name in FAMILIES:
        page = proof_html(ct.prove(architectures.block(name)), name)
        head, found, rest = page.partition("<header>")
        assert found, "the page has a header, where the way back goes"
        yield name, f"{head}{found}{back}{rest}"


def table() -> str:
    """The list on the gallery page, with what each proof says first."""
    rows = ["| family | what is special | theorem, rules, parameters that move |", "|---|---|---|"]
    for name, why in FAMILIES.items():
        proof = ct.prove(architectures.block(name))
        rules = list(dict.fromkeys(proof.rules))
        moved = len(proof.root.moved)
        said = f"{rules[0]}; {', '.join(rules[1:])}; {moved} parameter{'s' * (moved != 1)}"
        rows.append(f"| [{name}](gallery/{name}.html) | {why} | {said} |")
    return "\n".join(rows)
