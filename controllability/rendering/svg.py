"""What a graph is drawn with: boxes, circles, wires, frames and words, each with its markup."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from html import escape

from controllability.interfaces import Path

BOLD, MONO, LINE = 7.6, 7.0, 16.0  # widths of a letter, height of a line
RADIUS = 13.0


@dataclass(frozen=True)
class Box:
    """A link with a frame and lines of text: a leaf, or (dashed) the choice of experts."""

    x: float
    y: float
    width: float
    height: float
    path: Path
    css: str
    title: str
    kind: tuple[str, ...]
    name: tuple[str, ...] = ()
    badge: str = ""
    stacked: bool = False

    def svg(self) -> str:
        """The box as markup, its full description in a tooltip."""
        x, y, middle = self.x, self.y, self.x + self.width / 2
        size = f'width="{self.width:g}" height="{self.height:g}" rx="6"'
        behind = "".join(f'<rect class="behind" x="{x + d:g}" y="{y - d:g}" {size}/>' for d in (6, 3) if self.stacked)
        top = y + 9 + LINE / 2 + (3 if self.badge else 0)
        lines = "".join(_text(middle, top + i * LINE, line, "kind") for i, line in enumerate(self.kind))
        below = top + len(self.kind) * LINE
        names = "".join(_text(middle, below + i * (LINE - 2), line, "name") for i, line in enumerate(self.name))
        return _link(
            self.path, f"node {self.css}", self.title,
            f'{behind}<rect class="body" x="{x:g}" y="{y:g}" {size}/>{self._badge()}{lines}{names}',
        )  # fmt: skip

    def _badge(self) -> str:
        if not self.badge:
            return ""
        width = badge_width(self.badge)
        x = self.x + self.width - width - 8
        pill = f'<rect class="pill" x="{x:g}" y="{self.y - 8:g}" width="{width:g}" height="16" rx="8"/>'
        return pill + _text(x + width / 2, self.y, self.badge, "badge")


@dataclass(frozen=True)
class Junction:
    """Where lanes meet: a circle with the sign of what is done."""

    x: float
    y: float
    sign: str
    path: Path
    title: str

    def svg(self) -> str:
        circle = f'<circle class="body" cx="{self.x:g}" cy="{self.y:g}" r="{RADIUS:g}"/>'
        return _link(self.path, "node junction", self.title, circle + _text(self.x, self.y, self.sign, "sign"))


@dataclass(frozen=True)
class Wire:
    """A line through points, its corners round; with an arrow at the end unless something follows."""

    points: tuple[tuple[float, float], ...]
    arrow: bool = True
    css: str = "wire"

    def svg(self) -> str:
        (x, y), *rest = self.points
        path = f"M{x:g} {y:g}"
        for (ax, ay), (bx, by), (cx, cy) in zip(self.points, rest, rest[1:], strict=False):
            before, after = abs(bx - ax) + abs(by - ay), abs(cx - bx) + abs(cy - by)
            r = min(14.0, before / 2, after / 2)
            path += f"L{bx - r * _sign(bx - ax):g} {by - r * _sign(by - ay):g}"
            path += f"Q{bx:g} {by:g} {bx + r * _sign(cx - bx):g} {by + r * _sign(cy - by):g}"
        x, y = self.points[-1]
        head = ' marker-end="url(#arrow)"' if self.arrow else ""
        return f'<path class="{self.css}" d="{path}L{x:g} {y:g}"{head}/>'


@dataclass(frozen=True)
class Frame:
    """A border around a part, with a heading."""

    x: float
    y: float
    width: float
    height: float
    label: str
    css: str

    def svg(self) -> str:
        size = f'width="{self.width:g}" height="{self.height:g}" rx="10"'
        rect = f'<rect class="frame {self.css}" x="{self.x:g}" y="{self.y:g}" {size}/>'
        return rect + _text(self.x + 10, self.y + 13, self.label, f"heading {self.css}")


@dataclass(frozen=True)
class Label:
    """A few words beside a wire."""

    x: float
    y: float
    text: str

    def svg(self) -> str:
        return _text(self.x, self.y, self.text, "label")


Shape = Box | Junction | Wire | Frame | Label


@dataclass(frozen=True)
class Fragment:
    """A drawn part: data enters at (axis, 0) and leaves at (axis, height); ``boxed``: with a box at the top."""

    width: float
    height: float
    axis: float
    shapes: tuple[Shape, ...]
    boxed: bool = False

    def at(self, x: float, y: float) -> tuple[Shape, ...]:
        return tuple(_moved(shape, x, y) for shape in self.shapes)


def markup(shapes: Iterable[Shape]) -> str:
    """All of them: frames lie at the back, then wires, then what can be clicked; words on top."""
    order = [Frame, Wire, Box, Junction, Label]
    return "".join(shape.svg() for shape in sorted(shapes, key=lambda shape: order.index(type(shape))))


def badge_width(badge: str) -> float:
    """The width of a label on a border."""
    return len(badge) * 6.5 + 14


def node_id(path: Path) -> str:
    """The id of a node's panel.

    >>> node_id((1, 0)), node_id(())
    ('node-1-0', 'node')
    """
    return "-".join(["node", *map(str, path)])


def _moved(shape: Shape, x: float, y: float) -> Shape:
    if isinstance(shape, Wire):
        return replace(shape, points=tuple((a + x, b + y) for a, b in shape.points))
    return replace(shape, x=shape.x + x, y=shape.y + y)


def _link(path: Path, css: str, title: str, inside: str) -> str:
    return f'<a class="{css}" href="#{node_id(path)}"><title>{escape(title)}</title>{inside}</a>'


def _text(x: float, y: float, text: str, css: str) -> str:
    return f'<text class="{css}" x="{x:g}" y="{y:g}">{escape(text)}</text>'


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)
