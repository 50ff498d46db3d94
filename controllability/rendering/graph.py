"""A block as a graph: data flows from top to bottom, parallel parts are lanes, every leaf is a box (inline SVG)."""

import re
import textwrap
from collections import Counter
from dataclasses import replace

from controllability.interfaces import Component, Path, leaves
from controllability.rendering import svg
from controllability.rendering.leaf_states import WORDS, Group, Roles

ROOM = 36  # letters of a parameter's name that are shown, in lines of NAME
NAME = 20
KIND = 22  # letters in a line of a leaf's description
PAD, GAP, LANE = 10.0, 26.0, 16.0
LEAST = 0.8  # of its size, to which a screen may shrink it; it scrolls where that is too wide
SIGNS = {"sum": ("+", "sum"), "product": ("∘", "elementwise product")}


def graph_svg(block: Component, roles: Roles) -> str:
    """The graph of ``block`` as one SVG element; every leaf and junction links to ``#node_id(path)``.

    >>> from controllability.components import Times
    >>> from controllability.rendering.leaf_states import refused_roles
    >>> block = Times(2) >> Times(3)
    >>> graph_svg(block, refused_roles(block, "times 3")).count("<a ")
    2
    """
    whole = draw(block, roles)
    size = f'width="{whole.width:g}" height="{whole.height:g}" viewBox="0 0 {whole.width:g} {whole.height:g}"'
    arrow = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="8" markerHeight="8" '
        'markerUnits="userSpaceOnUse" orient="auto"><path class="head" d="M0 0L8 4L0 8z"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="group" aria-label="the block as a graph">'
        f"<style>@media screen{{.canvas svg{{max-width:max(100%,{LEAST * whole.width:g}px)}}}}</style>{arrow}{svg.markup(whole.shapes)}</svg>"
    )


def draw(block: Component, roles: Roles) -> svg.Fragment:
    """The whole block with its input above and its output below, in a margin."""
    names = [leaf.input_name for _, leaf in leaves(block) if leaf.input_name]
    inside = Drawing(block, roles).part(block, ())
    heads = ("inputs: " + ", ".join(dict.fromkeys(names)) if names else "input v", "output")
    left = max(inside.axis, *(len(h) * svg.BOLD / 2 for h in heads))
    right = max(inside.width - inside.axis, *(len(h) * svg.BOLD / 2 for h in heads))
    top, axis = 30.0, left + PAD
    bottom = top + GAP + inside.height
    shapes = (
        svg.Label(axis, 20, heads[0]), svg.Wire(((axis, top), (axis, top + GAP)), inside.boxed),
        *inside.at(axis - inside.axis, top + GAP),
        svg.Wire(((axis, bottom), (axis, bottom + GAP))), svg.Label(axis, bottom + GAP + 12, heads[1]),
    )  # fmt: skip
    return svg.Fragment(left + right + 2 * PAD, bottom + GAP + 26, axis, shapes)


class Drawing:
    """The layout of one block, from its leaves outwards."""

    def __init__(self, block: Component, roles: Roles) -> None:
        self.roles = roles
        self.names = short_names(block)
        self.spans = {(s.path, s.start, s.stop): s for s in roles.spans}

    def part(self, part: Component, path: Path) -> svg.Fragment:
        """Any component, with its frame if it has one."""
        if part.in_line:
            return self.sequence(part.children(), path)
        framed = self.spans.get((path, 0, 0))
        if part.chosen:
            framed = framed or Group(path, "", "group")
            framed = replace(framed, label="mixture of experts" + (f": {framed.label}" if framed.label else ""))
        inside = self.lanes(part, path) if part.children() else self.leaf(part, path)
        return _framed(inside, framed) if framed else inside

    def box(self, leaf: Component, path: Path) -> svg.Box:
        """What a leaf is, its parameter, and the badge of its state."""
        state = self.roles.states[path]
        badge, words = WORDS[state]
        kind, name = leaf_text(leaf, self.names)
        if leaf.is_skip and path and not badge:
            kind = ("skip",)
        text = max([*(len(line) * svg.BOLD for line in kind), *(len(line) * svg.MONO for line in name)])
        width = max(text + 2 * PAD, 2 * svg.badge_width(badge) + 24 if badge else 0)  # the badge clears the arrow
        height = len(kind) * svg.LINE + len(name) * (svg.LINE - 2) + 18 + (3 if badge else 0)
        title, stacked = f"{leaf.describe()}: {words}", leaf.per_expert and bool(leaf.own_parameters())
        return svg.Box(0, 0, width, height, path, state, title, kind, name, badge, stacked)

    def leaf(self, leaf: Component, path: Path, at_least: float = 0) -> svg.Fragment:
        """A box as a part; the maps of experts are drawn as a stack."""
        box = self.box(leaf, path)
        room = 6.0 * box.stacked
        box = replace(box, y=room, width=max(box.width, at_least))
        return svg.Fragment(box.width + room, box.height + room, box.width / 2, (box,), True)

    def sequence(self, parts: tuple[Component, ...], path: Path) -> svg.Fragment:
        """Parts in line; a run of them may stand in a frame, a cut is a dashed line across."""
        single = {i: part for i, part in enumerate(parts) if not part.children()}
        wide = max((self.box(part, (*path, i)).width for i, part in single.items()), default=0)
        drawn = [
            self.leaf(part, (*path, i), wide) if i in single else self.part(part, (*path, i))
            for i, part in enumerate(parts)
        ]
        spans = [s for (where, _, stop), s in self.spans.items() if where == path and stop]
        if not spans:
            return self._column(drawn, 0, path)
        span = max(spans, key=lambda s: s.stop - s.start)
        run = self._column(drawn[span.start : span.stop], span.start, path)
        drawn = [*drawn[: span.start], _framed(run, span), *drawn[span.stop :]]
        return self._column(drawn, 0, path, skipped=(span.start, span.stop))

    def _column(
        self, drawn: list[svg.Fragment], first: int, path: Path, skipped: tuple[int, int] | None = None
    ) -> svg.Fragment:
        axis = max(f.axis for f in drawn)
        width = axis + max(f.width - f.axis for f in drawn)
        shapes: list[svg.Shape] = []
        y, index = 0.0, first
        for i, fragment in enumerate(drawn):
            if i:
                cut = (path, index) in self.roles.cuts
                room = 52.0 if cut else GAP
                shapes.append(svg.Wire(((axis, y), (axis, y + room)), fragment.boxed))
                shapes += _cut_line(axis, width, y + room / 2) if cut else []
                y += room
            shapes += fragment.at(axis - fragment.axis, y)
            y += fragment.height
            index = skipped[1] if skipped and index == skipped[0] else index + 1
        return svg.Fragment(width, y, axis, tuple(shapes), drawn[0].boxed)

    def lanes(self, part: Component, path: Path) -> svg.Fragment:
        """Parts that read the same beside each other, each above those that read it; the router's lane ends in the choice."""
        children, lanes = part.children(), list[list[int]]()
        for i in range(len(children)):
            lane = next((lane for lane in lanes if lane[-1] == part.source_of(i)), None)
            if lane is None:
                lanes.append(lane := [])
            lane.append(i)
        beside, drawn = list[bool](), list[svg.Fragment]()
        for lane in lanes:
            column = [self.part(children[i], (*path, i)) for i in lane]
            decides = bool(part.chosen) and lane[0] not in part.binds
            drawn.append(self._column([*column, _choice(part, path)] if decides else column, 0, (*path, -1)))
            beside.append(decides or children[lane[0]].is_skip or children[lane[0]].input_name is not None)
        weighted = part.joined_by == "weighted sum"
        if part.chosen:
            word = "sum of the chosen experts" + (", each times its share" if weighted else "")
            return _parallel(drawn, beside, svg.Junction(0, 0, "Σ", path, word), "shares" if weighted else "choice")
        sign, word = SIGNS.get(part.joined_by, ("•", ""))
        title = f"{word} of {len(children)} terms" if word else part.describe()
        return _parallel(drawn, beside, svg.Junction(0, 0, sign, path, title))


def _choice(part: Component, path: Path) -> svg.Fragment:
    """The dashed box that says how a mixture chooses its experts."""
    lines = tuple(textwrap.wrap("choice: " + part.choice_words, KIND, break_on_hyphens=False))
    width, height = max(len(line) for line in lines) * svg.BOLD + 2 * PAD, len(lines) * svg.LINE + 18
    box = svg.Box(0, 0, width, height, path, "choice", f"choice of the experts: {part.choice_words}", lines)
    return svg.Fragment(width, height, width / 2, (box,), True)


def _parallel(lanes: list[svg.Fragment], skips: list[bool], join: svg.Junction, label: str = "") -> svg.Fragment:
    """Lanes side by side from one fork to one junction; a lane that is a skip does not stand on the axis."""
    order = sorted(range(len(lanes)), key=lambda i: not skips[i])
    lefts, x = {}, 0.0
    for i in order:
        lefts[i], x = x, x + lanes[i].width + LANE
    ways = {i: lefts[i] + lanes[i].axis for i in order}
    main = [ways[i] for i in order if not skips[i]] or [*ways.values()]
    axis = (main[(len(main) - 1) // 2] + main[len(main) // 2]) / 2
    top, deepest = 2 * GAP - 6, max(lane.height for lane in lanes)
    y = top + deepest + GAP + svg.RADIUS
    shapes: list[svg.Shape] = []
    for i in order:
        way, lane = ways[i], lanes[i]
        aside = ((axis, GAP - 8), (way, GAP - 8)) if way != axis else ()
        enter = ((axis, 0.0), *aside, (way, top))
        shapes += [svg.Wire(enter, lane.boxed), *lane.at(lefts[i], top)]
        end = top + lane.height
        side = axis - svg.RADIUS if way < axis else axis + svg.RADIUS
        leave = ((way, end), (way, y), (side, y)) if way != axis else ((axis, end), (axis, y - svg.RADIUS))
        shapes.append(svg.Wire(leave, True, "wire choice" if label and skips[i] else "wire"))
        if label and skips[i]:
            shapes.append(svg.Label((way + side) / 2, y - 9, label))
    shapes.append(replace(join, x=axis, y=y))
    return svg.Fragment(x - LANE, y + svg.RADIUS, axis, tuple(shapes))


def _framed(inside: svg.Fragment, span: Group) -> svg.Fragment:
    """A border around a part, with room for the heading beside the wire that enters."""
    head, pad = 24.0, 10.0
    needed = len(span.label) * 6.6 + 24 - (inside.axis + pad)  # the heading ends before the wire
    left = pad + max(0.0, needed)
    width, height = inside.width + left + pad, inside.height + head + pad
    axis = inside.axis + left
    enter, leave = ((axis, 0.0), (axis, head)), ((axis, height - pad), (axis, height))
    wires = svg.Wire(enter, inside.boxed), svg.Wire(leave, False)
    frame = svg.Frame(0, 0, width, height, span.label, span.css)
    return svg.Fragment(width, height, axis, (frame, *wires, *inside.at(left, head)))


def _cut_line(axis: float, width: float, y: float) -> list[svg.Shape]:
    """Where the proof's inner function ends and the outer one begins."""
    line = svg.Wire(((0.0, y), (width, y)), False, "cut")
    return [line, svg.Label(axis + 36, y - 9, "f above"), svg.Label(axis + 36, y + 10, "g below")]


def short_names(block: Component) -> dict[str, str]:
    """Every parameter's and module's name -> a shorter one; those that would be the same stay as they are.

    >>> from controllability.components import Linear
    >>> from controllability.interfaces import Param
    >>> name = "model.layers.0.mlp.shared_experts.down_proj.weight"
    >>> short_names(Linear(Param(name)))[name]
    '0.mlp.shared_experts.down_proj'
    """
    parameters = {str(p) for p in block.parameters()}
    modules = {leaf.module for _, leaf in leaves(block) if leaf.module}
    uses = Counter(map(_shorter, parameters))
    short = {name: _shorter(name) for name in modules | parameters}
    return {name: name if name in parameters and uses[text] > 1 else text for name, text in short.items()}


def _shorter(name: str) -> str:
    parts = re.sub(r"\.weight(?=$|\[)", "", name).split(".")
    text = parts.pop()
    while parts and len(parts[-1]) + 1 + len(text) <= ROOM:
        text = f"{parts.pop()}.{text}"
    return text if len(text) <= ROOM else f"{text[: ROOM // 2 - 1]}…{text[-ROOM // 2 :]}"


def leaf_text(leaf: Component, names: dict[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a leaf is, and the short name of what it reads, both in lines."""
    own = [str(p) for p in leaf.own_parameters()]
    kind = leaf.describe()
    read: list[str] = own or ([leaf.module] if leaf.module else [])
    for name in sorted({*read, leaf.module} - {""}, key=lambda name: -len(name)):  # the longest first
        if uses := [*re.finditer(rf"(?<![\w.]){re.escape(name)}(?![\w.])", kind)]:
            kind = f"{kind[: uses[-1].start()]} {kind[uses[-1].end() :]}"
    kind = " ".join(kind.split()) or type(leaf).__name__
    name = _broken(names[read[0]]) if read else ()
    if len(read) > 1:
        name = (*name, "+ " + ", ".join(n.rpartition(".")[2] for n in read[1:]))
        name = name if len(name[-1]) <= NAME + 4 else (*name[:-1], f"+ {len(read) - 1} more")
    return tuple(textwrap.wrap(kind, KIND, max_lines=3, placeholder=" …")), name


def _broken(name: str) -> tuple[str, ...]:
    """A name in one line, or in two that part after a dot or an underscore."""
    if len(name) <= NAME:
        return (name,)
    ends = [i + 1 for i, letter in enumerate(name[:-1]) if letter in "._…"]
    dots = [i for i in ends if name[i - 1] == "." and max(i, len(name) - i) <= NAME + 1]
    best = min(dots or ends, key=lambda i: max(i, len(name) - i), default=len(name) // 2)
    return name[:best], name[best:]
