"""A proof as a self-contained page: every node opens its rule, conditions and formula."""

from __future__ import annotations

from html import escape

from controllability.proof import Proof
from controllability.rules import Step

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
details{border-left:3px solid #bbb;margin:.3rem 0 .3rem .6rem;padding-left:.7rem}
details.input{border-color:#2a6fbb}details.output{border-color:#bb5a2a}summary{cursor:pointer}
code{background:#f3f3f3;padding:0 .2rem}dt{font-weight:600}dd{margin:0 0 .2rem 1rem}
.key span{padding:.1rem .5rem;border-left:3px solid}.i{border-color:#2a6fbb}.o{border-color:#bb5a2a}"""


def proof_html(proof: Proof, name: str, level: str = "derived") -> str:
    """The page as one string, without scripts or outside files."""
    moved = ", ".join(f"<code>{escape(str(p))}</code>" for p in sorted(proof.root.moved, key=str))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(name)}: proof</title><style>{STYLE}</style>'
        f"<h1>{escape(name)}: a perfect patch exists</h1><p>Level: {level}. Via {proof.via}, route {proof.route}. Moves {moved}.</p>"
        '<p class="key"><span class="i">input side</span> <span class="o">output side</span></p>'
        f"{_node(proof.root)}</html>"
    )


def _node(step: Step) -> str:
    conditions = "".join(f"<dd>{escape(c.statement)} <code>{escape(c.where)}</code></dd>" for c in step.conditions)
    facts = (
        f"<dl><dt>rule</dt><dd>{escape(step.rule.statement)}: {escape(step.rule.when)} ({escape(step.rule.source)})</dd>"
        f"<dt>patch</dt><dd>{escape(step.rule.patch)}</dd>"
        + (f"<dt>conditions</dt>{conditions}" if conditions else "")
        + "</dl>"
    )
    below = "".join(_node(premise) for premise in step.premises)
    title = f"<summary><b>{escape(step.rule.name)}</b> <code>{escape(step.place.describe())}</code></summary>"
    return f'<details class="{step.rule.side}" open>{title}{facts}{below}</details>'
