"""A proof, or a refusal, as a self-contained page: the block as a graph, every node links to a panel that CSS opens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from controllability.checks import LEVELS, summary
from controllability.errors import BadInput, NotControllable, within_depth
from controllability.interfaces import Component, Param, Path, updates_of
from controllability.prover.derivation import Derivation
from controllability.rendering.css import STYLE
from controllability.rendering.graph import graph_svg
from controllability.rendering.leaf_states import WORDS, Roles, State, chain, refused_roles, roles
from controllability.rendering.svg import node_id
from controllability.rendering.text import cited
from controllability.rendering.tokens_served import reach
from controllability.rules import RULES, Step

Checks = Sequence[Mapping[str, Any]]

THEOREM = {
    "input-output": "Theorem 1: an inner function is moved on the input side, then an outer one on the output side",
    "output": "Theorem 1b: an outer function is moved on the output side, at what the source run gives it",
}


@within_depth
def proof_html(proof: Derivation, name: str, level: str = "derived", checks: Checks = ()) -> str:
    """The page of a proof as one string, without scripts or outside files.

    ``level`` is the one that was run, ``checks`` what ``proof.check(level)`` returned; where they did not
    all pass the page says so, and no stronger word than "derived".  Raises ``BadInput`` for an unknown level.

    >>> from controllability import prove
    >>> from controllability.components import Linear, residual
    >>> page = proof_html(prove(residual(Linear(Param("W"))), via="output"), "<mine>")
    >>> "<h1>&lt;mine&gt;: a perfect patch exists</h1>" in page, "<script" in page
    (True, False)
    """
    if level not in LEVELS:
        raise BadInput(f"unknown level {level!r}: choose one of {', '.join(LEVELS)}")
    failed = any(c["status"] == "failed" for c in checks)
    title = f"{name}: a check of its proof failed" if failed else f"{name}: a perfect patch exists"
    found = roles(proof)
    numbered = {id(step): i for i, step in enumerate(proof.root.walk(), 1)}
    said = {c["rule"]: f"{c['status']}: {c['method']}" for c in checks}
    writer = _Writer(found, proof.root, numbered, said, frozenset(map(str, proof.root.moved)))
    return _page(title, [
        _head(title, proof, level, checks),
        _workspace(proof.block, found, writer),
        _moves(proof, found),
        _reach(proof),
        _conditions(proof),
        _checks(checks),
        '<section id="derivation"><h2>Derivation</h2><p>Every step rests on those inside it. Click a line to fold it.</p>'
        + writer.tree(proof.root) + "</section>",
        f"<section><h2>References</h2>{_list((key, escape(text)) for key, text in cited(proof).items())}</section>",
    ], proof.block)  # fmt: skip


@within_depth
def refusal_html(name: str, block: Component | None, refused: NotControllable) -> str:
    """The page of a refusal: the same graph, the smallest culprit marked; ``block`` None: there is no expression.

    >>> from controllability import prove
    >>> from controllability.components import Activation, Linear, residual
    >>> block = residual(Linear(Param("W")) >> Activation("tanh"))
    >>> try:
    ...     prove(block)
    ... except NotControllable as refused:
    ...     page = refusal_html("mine", block, refused)
    >>> "<h1>mine: refused</h1>" in page
    True
    """
    title = f"{name}: refused"
    marked = refused_roles(block, refused.culprit) if block is not None else Roles({})
    count = sum(state == "culprit" for state in marked.states.values()) + len(marked.spans)
    several = "<p>Several parts have this description; each of them is marked.</p>" if count > 1 else ""
    asked = f" ({refused.asked})" if refused.asked else ""
    found = f"No derivation was found{asked}. That is not a proof that none exists."
    if block is None:
        found = "The family is refused by its declaration: there is no expression to search or to draw."
    head = (
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="lead">{escape(found)}</p>'
        f'<dl class="refusal"><dt>smallest culprit</dt><dd><code>{escape(refused.culprit)}</code>{several}</dd>'
        f"<dt>reason</dt><dd>{escape(refused.reason)}</dd><dt>what would help</dt><dd>{escape(refused.hint)}</dd></dl>"
        "</header>"
    )
    if block is None:
        return _page(title, [head])
    return _page(title, [head, _workspace(block, marked, _Writer(marked, refused=refused))], block)


@dataclass(frozen=True)
class _Writer:
    """What panels and tree have in common: steps with their numbers, and what was checked of their rules."""

    found: Roles
    root: Step | None = None
    numbered: Mapping[int, int] = field(default_factory=dict)
    said: Mapping[str, str] = field(default_factory=dict)
    moved: frozenset[str] = frozenset()
    refused: NotControllable | None = None

    def tree(self, step: Step) -> str:
        """The derivation as nested folds."""
        number = self.numbered[id(step)]
        below = "".join(self.tree(premise) for premise in step.premises)
        title = f"<b>{number}. {escape(step.rule.name)}</b> <code>{escape(step.place.describe())}</code>"
        return (
            f'<details class="{step.rule.side}" id="step-{number}" open><summary>{title}</summary>'
            f"{self.rule(step)}{below}</details>"
        )

    def rule(self, step: Step) -> str:
        """Statement, premise, patch, source, conditions, and what was checked."""
        conditions = "".join(f"<li>{escape(c.statement)}</li>" for c in step.conditions)
        fixed = step.rule.name.endswith(("-before", "-after", "-after-fixed"))
        here = f"fixed: {step.note}" if fixed else step.printed_note  # what the step says of this very place
        rows = [
            ("rule", escape(step.rule.statement)),
            ("when", escape(step.rule.when)),
            ("patch", f'<span class="formula">{escape(step.rule.patch)}</span>'),
            ("here", escape(here)),
            ("conditions", f"<ul>{conditions}</ul>" if conditions else ""),
            ("source", escape(step.rule.source)),
            ("check", escape(self.said.get(step.rule.name, ""))),
        ]
        return _list(rows)

    def panel(self, part: Component, path: Path) -> str:
        """What is said of one node."""
        state = self.found.states.get(path)
        meet = "the router chooses experts; their outputs are added" if part.chosen else "parallel parts meet here"
        words = WORDS[state][1] if state else meet
        own = "".join(self._parameter(p) for p in part.own_parameters())
        body = f"<ul>{own}</ul>" if own else "<p>It reads no parameter.</p>" if state else ""
        return (
            f'<article class="panel" id="{node_id(path)}" tabindex="-1">'
            f'<a class="close" href="#graph" aria-label="close this panel">close ×</a>'
            f"<h3>{escape(_name(part))}</h3>"
            f'<p class="state {state or "junction"}">{escape(words[0].upper() + words[1:])}.</p>'
            f"{body}{self._blame(path)}{self._proof(part, path)}</article>"
        )

    def _parameter(self, param: Param) -> str:
        shape = f" ({' × '.join(map(str, param.shape))})" if param.shape else ""
        moves = "<b>moves</b>" if str(param) in self.moved else "stays"
        return f"<li><code>{escape(str(param))}</code>{escape(shape)}{': ' + moves if self.root else ''}</li>"

    def _blame(self, path: Path) -> str:
        whole = [span.path for span in self.found.spans if span.css == "culprit" and not span.stop]
        if self.refused is None or not (self.found.states.get(path) == "culprit" or path in whole):
            return ""
        return _list([("reason", escape(self.refused.reason)), ("what would help", escape(self.refused.hint))])

    def _proof(self, part: Component, path: Path) -> str:
        around = chain(self.root, path) if self.root else []
        deciding = self.found.steps.get(path) or (around[-1] if around else None)
        out = ""
        if deciding is not None:
            here = path in self.found.steps or deciding.place.path == path
            out += f"<h4>{'The rule here' if here else 'The rule that it stands in'}: {escape(deciding.rule.name)}</h4>"
            out += self.rule(deciding)
        named = [way.rule(side) for side in ("input", "output") for way in updates_of(part, side)]
        rules = [rule for rule in RULES if rule.name in named]
        if rules and self.found.states.get(path) in ("own", "shared"):
            out += "<h4>Rules of its own, not used</h4>" + _list([(r.name, escape(r.patch)) for r in rules])
        if around:
            links = " › ".join(f'<a href="#step-{self.numbered[id(s)]}">{escape(s.rule.name)}</a>' for s in around)
            out += f"<h4>In the derivation</h4><p>{links}</p>"
        return out


def _head(title: str, proof: Derivation, level: str, checks: Checks) -> str:
    count = len(proof.root.moved)
    failed = any(c["status"] == "failed" for c in checks)
    warning = '<p class="warning">A check failed: do not trust this proof, and please report it.</p>' if failed else ""
    spare = len(proof.alternatives)
    tried = f" If a condition fails on the numbers, {_counted(spare, 'other derivation')} can be tried."
    others = tried if spare else ""
    frozen = f" Asked to stay: {', '.join(sorted(proof.frozen))}." if proof.frozen else ""
    if proof.jointly:
        lead = (
            "Let <var>v</var><sub>1</sub> … <var>v</var><sub>T</sub> be what enters this block without the context, for many tokens, and "
            "<var>v'</var><sub>1</sub> … <var>v'</var><sub>T</sub> what enters it with the context. Wherever the side conditions hold, "
            f"one change of {_counted(count, 'parameter')}, the same for all of them, makes the block give at each <var>v</var><sub>t</sub> "
            "what it gave at <var>v'</var><sub>t</sub>, exactly."
        )
    else:
        lead = (
            "Let <var>v</var> be what enters this block without the context and <var>v'</var> what enters it "
            f"with the context. Wherever the side conditions hold, a change of {_counted(count, 'parameter')} makes the block give at "
            "<var>v</var> what it gave at <var>v'</var>, exactly."
        )
    return (
        f"<header><h1>{escape(title)}</h1>{warning}"
        f'<p class="lead">{lead}</p>'
        f"<p>{escape(THEOREM[proof.via])}. Route of a normalised output: {escape(proof.route)}.{others}{escape(frozen)}</p>"
        f'<p class="level">{escape(summary(level, checks))}</p></header>'
    )


def _workspace(block: Component, found: Roles, writer: _Writer) -> str:
    """The graph beside the panel that is open."""
    panels = "".join(writer.panel(part, path) for part, path in _nodes(block))
    return (
        f'<section id="graph"><h2>The block</h2>{_legend(found)}'
        f'<div class="canvas" tabindex="0" role="region" aria-label="graph of the block, scrolls">{graph_svg(block, found)}</div>'
        f'<aside>{panels}<p class="hint">Choose a box: its rule, conditions and formula open here. '
        "With the keyboard: Tab, then Enter.</p></aside></section>"
    )


def _legend(found: Roles) -> str:
    states: dict[State, None] = dict.fromkeys(found.states.values())
    if any(span.css == "culprit" for span in found.spans):
        states["culprit"] = None
    items = "".join(
        f'<li><span class="swatch {s}">{escape(WORDS[s][0] or "no label")}</span> {escape(WORDS[s][1])}</li>'
        for s in WORDS if s in states
    )  # fmt: skip
    if any(span.css == "through" for span in found.spans):
        items += (
            '<li><span class="swatch through">through</span> its inner functions give what they gave at v\', '
            "its output whatever is wanted</li>"
        )
    if found.cuts:
        items += '<li><span class="swatch cut">f / g</span> inner function f above the dashed line, outer function g below</li>'
    return f'<ul class="legend" aria-label="legend">{items}</ul>'


def _moves(proof: Derivation, found: Roles) -> str:
    """A row for every parameter that moves: where, by which rule, how."""
    rows = []
    for path, step in found.steps.items():
        if found.states[path] not in ("input", "output"):
            continue
        below = frozenset[Param]().union(*(p.moved for p in step.premises))
        for param in sorted(step.moved - below, key=str):
            rows.append(
                f'<tr><td><a href="#{node_id(path)}"><code>{escape(str(param))}</code></a></td>'
                f'<td>{found.states[path]}</td><td class="rule">{escape(step.rule.name)}</td>'
                f'<td class="formula">{escape(step.rule.patch)}</td></tr>'
            )
    return _table("What moves", ("parameter", "side", "rule", "change"), rows)


def _conditions(proof: Derivation) -> str:
    rows = "".join(
        f'<li>{escape(statement)} <span class="where">(at <code>{escape(where)}</code>)</span></li>'
        for statement, where in dict.fromkeys((c.statement, c.where) for c in proof.conditions)
    )
    listed = f"<p>Tested on the numbers whenever a patch is made:</p><ul>{rows}</ul>" if rows else "<p>None.</p>"
    return f"<section><h2>Side conditions</h2>{listed}</section>"


def _reach(proof: Derivation) -> str:
    """How many tokens one patch serves, for a joint proof."""
    rows = "".join(f"<li>{escape(one)}</li>" for one in reach(proof))
    head = "<h2>One patch for T tokens</h2><p>Tokens in general position that it serves:</p>"
    return f"<section>{head}<ul>{rows}</ul></section>" if rows else ""


def _checks(checks: Checks) -> str:
    if not checks:
        return ""
    rows = [
        f'<tr><td>{escape(c["rule"])}</td><td class="{escape(c["status"])}">{escape(c["status"])}</td><td>{escape(c["method"])}</td></tr>'
        for c in checks
    ]
    return _table("What was checked, and how", ("rule", "result", "how"), rows)


def _table(title: str, columns: Iterable[str], rows: Iterable[str]) -> str:
    head = "<tr>" + "".join(f"<th>{column}</th>" for column in columns) + "</tr>"
    return f'<section><h2>{title}</h2><div class="wide"><table>{head}{"".join(rows)}</table></div></section>'


def _nodes(part: Component, path: Path = ()) -> Iterable[tuple[Component, Path]]:
    """Everything that the graph draws: leaves, and what joins parallel parts."""
    if not part.in_line:
        yield part, path
    for i, child in enumerate(part.children()):
        yield from _nodes(child, (*path, i))


def _name(part: Component) -> str:
    """The heading of a panel: its own description; a sum's or a product's terms are counted, not described."""
    if part.joined_by and not part.chosen:
        return f"{part.joined_by} of {len(part.children())} terms"
    return part.describe()


def _counted(count: int, what: str) -> str:
    return f"one {what}" if count == 1 else f"{count} {what}s"


def _list(rows: Iterable[tuple[str, str]]) -> str:
    """A definition list of what is there; the texts are markup already."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{v}</dd>" for k, v in rows if v) + "</dl>"


def _page(title: str, sections: list[str], block: Component | None = None) -> str:
    """The whole document; the node whose panel is open gets a thick border."""
    ids = [node_id(path) for _, path in _nodes(block)] if block is not None else []
    chosen = ",".join(f'body:has(#{i}:target) a.node[href="#{i}"] .body' for i in ids)
    style = STYLE + (chosen + "{stroke-width:4}" if chosen else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )
