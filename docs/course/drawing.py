"""A small SVG canvas: shapes by name, colours for light and dark, text that a screen reader can have."""

from __future__ import annotations

from html import escape

WIDTH = 480
LIGHT = {"paper": "#fbfbfd", "ink": "#1f2430", "soft": "#5a6172", "line": "#8a92a3", "pale": "#e9ebf0"}
LIGHT |= {"source": "#a8480f", "target": "#1d5ea8", "patch": "#14683a", "other": "#7a3fa0"}
DARK = {"paper": "#171a21", "ink": "#e8eaf0", "soft": "#a9b0c0", "line": "#7b8294", "pale": "#2a2f3b"}
DARK |= {"source": "#f2a56d", "target": "#86baf5", "patch": "#70d49c", "other": "#d0a2ee"}


def _rules(colours: dict[str, str]) -> str:
    return " ".join(
        f".{name} {{ fill: {colour} }} .{name}-line {{ stroke: {colour} }}" for name, colour in colours.items()
    )


STYLE = (
    "text { font: 13px system-ui, 'Segoe UI', Helvetica, Arial, sans-serif } .small { font-size: 11px } "
    ".strong { font-weight: 600 } .path { fill: none; stroke-width: 1.5 } .thick { stroke-width: 2.4 } "
    f".dash {{ stroke-dasharray: 4 3 }} {_rules(LIGHT)} @media (prefers-color-scheme: dark) {{ {_rules(DARK)} }}"
)


class Picture:
    """Shapes on a card ``WIDTH`` units wide.

    >>> picture = Picture("Two words", 40)
    >>> picture.text(10, 20, "z < z'", "target")
    >>> "z &lt; z&#x27;" in picture.svg()
    True
    """

    def __init__(self, title: str, height: float) -> None:
        self.title, self.height = title, height
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, name: str = "ink", anchor: str = "start") -> None:
        """Words with their baseline at (x, y)."""
        self.parts.append(f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    def box(
        self, x: float, y: float, w: float, h: float, name: str = "pale", opacity: float = 1, corner: float = 4
    ) -> None:
        """A filled rectangle."""
        self.parts.append(
            f'<rect class="{name}" x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{corner}" fill-opacity="{opacity:.2f}"/>'
        )

    def dot(self, x: float, y: float, name: str = "ink", radius: float = 4) -> None:
        """A filled circle."""
        self.parts.append(f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>')

    def path(self, points: list[tuple[float, float]], name: str = "line", more: str = "") -> None:
        """A line through the points."""
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline class="path {name}-line {more}" points="{joined}"/>')

    def area(self, points: list[tuple[float, float]], name: str = "pale", opacity: float = 0.16) -> None:
        """A filled polygon."""
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polygon class="{name}" fill-opacity="{opacity:.2f}" points="{joined}"/>')

    def arrow(self, points: list[tuple[float, float]], name: str = "line", more: str = "") -> None:
        """A line through the points with a head at its end."""
        self.path(points, name, more)
        (x0, y0), (x, y) = points[-2:]
        length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        u, v = 6 * (x - x0) / length, 6 * (y - y0) / length
        head = f"{x:.1f},{y:.1f} {x - u - v / 2:.1f},{y - v + u / 2:.1f} {x - u + v / 2:.1f},{y - v - u / 2:.1f}"
        self.parts.append(f'<polygon class="{name}" points="{head}"/>')

    def strip(self, x: float, y: float, values: list[float], name: str, cell: float = 11) -> None:
        """A vector: a cell for each entry, the darker the larger."""
        largest = max(map(abs, values))
        for i, value in enumerate(values):
            self.box(x + i * cell, y, cell - 1, cell - 1, name, 0.12 + 0.88 * abs(value) / largest, 1)

    def svg(self) -> str:
        """The whole file."""
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height:g}" width="640" role="img">\n'
            f"<title>{escape(self.title)}</title>\n<style>{STYLE}</style>\n"
            f'<rect class="paper" width="{WIDTH}" height="{self.height:g}" rx="8"/>\n{body}\n</svg>\n'
        )
