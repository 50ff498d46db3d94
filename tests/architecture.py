"""docs/architecture.svg, from the imports of the code and the table of floors in docs/architecture.md.

``python tests/architecture.py`` draws it anew, after a room was added or moved, or when its size or imports changed.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE, DRAWING = ROOT / "docs" / "architecture.md", ROOT / "docs" / "architecture.svg"
PACKAGES = ("controllability", "architectures")
DIVIDED = ("models",)  # rooms so large that every file and folder in them is a room of its own


# ------------------------------------------------------------------------------------------ the code, read


@dataclass(frozen=True)
class Import:
    """One import statement of one module: what it names, and whether it stands inside a function."""

    module: str
    target: str
    line: int
    inside: bool


class House:
    """Every module of the two packages and every import in them, wherever it stands in its file."""

    def __init__(self, root: Path) -> None:
        self.files = {module_name(path.relative_to(root)): path for name in PACKAGES for path in sources(root / name)}
        self.trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in self.files.items()}
        self.imports = [one for module in self.files for one in self._imports(module)]
        self.rooms = sorted({room_of(module) for module in self.files})

    def _imports(self, module: str) -> Iterator[Import]:
        functions = [n for n in ast.walk(self.trees[module]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(self.trees[module]):
            for name in named_by(node, self._package(module)):
                yield Import(module, self._file_of(name), getattr(node, "lineno", 0), id(node) in inside)

    def _package(self, module: str) -> str:
        return module if self.files[module].name == "__init__.py" else module.rpartition(".")[0]

    def _file_of(self, name: str) -> str:
        """The module of ours that ``name`` is or stands in (a name that a package passes on stands in its ``__init__``)."""
        if name.partition(".")[0] not in PACKAGES:
            return name
        while name not in self.files and "." in name:
            name = name.rpartition(".")[0]
        return name

    def lines(self, room: str) -> int:
        """How many lines the room's files have."""
        return sum(len(p.read_text(encoding="utf-8").splitlines()) for m, p in self.files.items() if room_of(m) == room)

    def arrows(self) -> dict[str, set[str]]:
        """For every room the other rooms that it imports."""
        found: dict[str, set[str]] = {room: set() for room in self.rooms}
        for one in self.imports:
            if one.target in self.files and room_of(one.target) != room_of(one.module):
                found[room_of(one.module)].add(room_of(one.target))
        return found


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The room of a module: its package below ``controllability`` (in a divided one the file or folder), or its file.

    >>> room_of("controllability.rules.base"), room_of("controllability.models.hooks.installation"), room_of("controllability")
    ('rules', 'models/hooks', '__init__')
    """
    package, *inside = module.split(".")
    if package != "controllability":
        return package
    if not inside:
        return "__init__"
    return "/".join(inside[:2]) if inside[0] in DIVIDED else inside[0]


def named_by(node: ast.AST, package: str) -> list[str]:
    """The full names that a node imports: ``import``, ``from … import``, ``import_module("…")``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package.rsplit(".", node.level - 1)[0] if node.level else ""
        origin = ".".join(filter(None, (above, node.module)))
        return [f"{origin}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        given = node.args[0] if node.args else None
        return [given.value] if isinstance(given, ast.Constant) and isinstance(given.value, str) else []
    return []


# ----------------------------------------------------------------------------------------- the table, read


@dataclass(frozen=True)
class Room:
    floor: int
    name: str
    holds: str


def table(page: str) -> dict[str, Room]:
    """The rows | floor | room | holds | of a page, by room."""
    rows = re.findall(r"^\| (\d+) \| `([^`]+)` \| (.+?) \|$", page, re.MULTILINE)
    return {name: Room(int(floor), name, holds.replace("`", "")) for floor, name, holds in rows}


# ----------------------------------------------------------------------------------------------- the drawing

WIDTH, LEFT, RIGHT = 800, 112, 706  # of the drawing; where boxes begin and end
HEIGHT, GAP, TOP, BESIDE = 38, 20, 64, 16  # of a box, between floors, of the heading, between boxes
LANE, ASIDE = 14, 36  # between lines that pass floors by; from a box's middle to a line that is not upright
GROUPS = {
    "ground": ("errors", "version", "texts", "arrays", "symbolic", "deltas", "solvers"),
    "language": ("interfaces", "components", "architectures", "execution"),
    "proof": ("rules", "prover", "checks", "verification", "rendering", "proof_files", "proof"),
    "face": ("compiling", "cli", "embedded", "__init__", "__main__"),
}  # all others: live models
LIGHT = {
    "paper": "#ffffff", "ink": "#1f2430", "soft": "#5d6475", "ground": "#e9ebf0", "language": "#dcebfb",
    "proof": "#e6e1fa", "models": "#ddf1e2", "face": "#fbe9d4",
}  # fmt: skip
DARK = {
    "paper": "#14171e", "ink": "#e8eaf0", "soft": "#9aa2b5", "ground": "#2a2f3b", "language": "#1c3a58",
    "proof": "#39316a", "models": "#1d4630", "face": "#5a3d1b",
}  # fmt: skip
LINES = {"ground": "#7b8294", "language": "#3f86cc", "proof": "#7d68d8", "models": "#3a9a5c", "face": "#c8842f"}


@dataclass(frozen=True)
class Box:
    room: Room
    lines: int
    x: float
    y: float
    width: float
    ends: tuple[bool, bool]  # whether it is the first and the last of its floor

    @property
    def group(self) -> str:
        return next((group for group, rooms in GROUPS.items() if self.room.name in rooms), "models")

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


@dataclass(frozen=True)
class Lane:
    """The line at one side of the tower that leads to one room, from all that pass floors by to reach it."""

    target: Box
    sources: tuple[Box, ...]
    right: bool
    x: float


def reduced(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without the arrows that follow from others: what is reached through another room as well is left out."""

    def reach(room: str) -> set[str]:
        return arrows[room].union(*map(reach, arrows[room]))

    return {room: below - set().union(*map(reach, below)) for room, below in arrows.items()}


def boxes(house: House, rooms: dict[str, Room]) -> dict[str, Box]:
    """Where every room stands: floors from the top down, the rooms of a floor side by side as in the table."""
    floors = sorted({room.floor for room in rooms.values()}, reverse=True)
    found = {}
    for row, floor in enumerate(floors):
        here = [room for room in rooms.values() if room.floor == floor]
        width = (RIGHT - LEFT - BESIDE * (len(here) - 1)) / len(here)
        for i, room in enumerate(here):
            place = LEFT + i * (width + BESIDE), TOP + row * (HEIGHT + GAP), width
            found[room.name] = Box(room, house.lines(room.name), *place, (i == 0, i == len(here) - 1))
    return found


def lanes(arrows: Iterable[tuple[Box, Box]]) -> list[Lane]:
    """One lane for each room that is reached past a floor: short ones next to the boxes, and on the side where the boxes end."""
    into: dict[str, list[tuple[Box, Box]]] = {}
    for source, target in arrows:
        into.setdefault(target.room.name, []).append((source, target))
    taken: dict[tuple[bool, int], list[tuple[float, float]]] = {}
    found = []
    for pairs in sorted(into.values(), key=lambda pairs: (pairs[0][1].y - min(s.y for s, _ in pairs), pairs[0][1].y)):
        target, starts = pairs[0][1], tuple(source for source, _ in pairs)
        top, bottom = min(s.y for s in starts), target.y
        free = {side: first_free(taken, side, top, bottom) for side in (False, True)}
        right = min((False, True), key=lambda side: (sum(not b.ends[side] for b in (*starts, target)), free[side]))
        taken.setdefault((right, free[right]), []).append((top, bottom))
        away = LANE * (free[right] + 1)
        found.append(Lane(target, starts, right, RIGHT + away if right else LEFT - away))
    return found


def first_free(taken: dict[tuple[bool, int], list[tuple[float, float]]], right: bool, top: float, bottom: float) -> int:
    place = 0
    while any(top <= b and a <= bottom for a, b in taken.get((right, place), [])):
        place += 1
    return place


def draw(house: House, rooms: dict[str, Room]) -> str:
    """The tower as SVG."""
    placed = boxes(house, rooms)
    short = {name: below & set(placed) for name, below in reduced(house.arrows()).items() if name in placed}
    pairs = [(placed[a], placed[b]) for a, below in sorted(short.items()) for b in sorted(below)]
    step = HEIGHT + GAP
    past = lanes((a, b) for a, b in pairs if round(b.y - a.y) != step)
    height = max(box.y for box in placed.values()) + HEIGHT + 24
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" role="img">',
        "<title>The rooms of the package, floor by floor, and which imports which</title>",
        f"<style>{style()}</style>", *heads(), f'<rect class="paper" width="{WIDTH}" height="{height:.0f}"/>',
        f'<text class="name" x="{LEFT}" y="26">One tower: every import runs down.</text>',
        f'<text class="soft" x="{LEFT}" y="44">Arrows point at what is imported; one that follows from others is left out. '
        "Lines of code in hundreds.</text>",
        *(line for lane in past for line in lane_lines(lane, past)),
        *(straight(a, b) for a, b in pairs if round(b.y - a.y) == step),
        *(line for box in placed.values() for line in box_lines(box)), "</svg>", "",
    ])  # fmt: skip


def style() -> str:
    def colours(of: dict[str, str]) -> str:
        fills = " ".join(f".{k} {{ fill: {v} }}" for k, v in of.items())
        return f"{fills} .edge {{ stroke: {of['soft']} }} .under {{ stroke: {of['paper']} }}"

    return (
        "text { font-family: system-ui, 'Segoe UI', Helvetica, Arial, sans-serif } text.name { font-size: 14px; font-weight: 600 } "
        "text.soft { font-size: 11.5px } .edge { stroke-width: 0.6; stroke-opacity: 0.5 } .line { fill: none; stroke-width: 1.6 } "
        ".under { fill: none; stroke-width: 5 } text.name { fill: " + LIGHT["ink"] + " } " + colours(LIGHT) + " "
        "@media (prefers-color-scheme: dark) { text.name { fill: " + DARK["ink"] + " } " + colours(DARK) + " }"
    )


def heads() -> Iterator[str]:
    for group, colour in LINES.items():
        yield (
            f'<marker id="{group}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto" '
            f'markerUnits="userSpaceOnUse"><path d="M0 0.5 8 4 0 7.5z" fill="{colour}"/></marker>'
        )


def box_lines(box: Box) -> Iterator[str]:
    hundreds = f"{max(1, round(box.lines / 100)) * 100:,}" if box.lines >= 100 else "&lt; 100"
    yield f'<rect class="{box.group} edge" x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{HEIGHT}" rx="5"/>'
    room = box.width - 60  # beside the number of lines
    tight = f' textLength="{room:g}" lengthAdjust="spacingAndGlyphs"' if len(box.room.name) * 8.4 > room else ""
    yield f'<text class="name" x="{box.x + 10:g}" y="{box.y + 16:g}"{tight}>{escape(box.room.name)}</text>'
    yield f'<text class="soft" x="{box.x + 10:g}" y="{box.y + 31:g}">{escape(box.room.holds)}</text>'
    yield f'<text class="soft" text-anchor="end" x="{box.x + box.width - 10:g}" y="{box.y + 16:g}">{hundreds}</text>'
    if box.ends[0]:
        yield f'<text class="soft" text-anchor="end" x="26" y="{box.y + 24:g}">{box.room.floor}</text>'


def arrow(box: Box, points: list[tuple[float, float]]) -> str:
    path = "M" + " ".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path class="line" stroke="{LINES[box.group]}" marker-end="url(#{box.group})" d="{path}"/>'


def straight(source: Box, target: Box) -> str:
    """An arrow to the floor below: upright where the boxes stand above each other, else with a step between the floors."""
    if max(source.x, target.x) < min(source.x + source.width, target.x + target.width):
        narrow = min(source, target, key=lambda b: b.width).middle
        return arrow(target, [(narrow, source.y + HEIGHT), (narrow, target.y)])
    aside = -ASIDE if source.x < target.x else ASIDE
    begin, end, gap = source.middle - aside, target.middle + aside, target.y - GAP / 2
    return arrow(target, [(begin, source.y + HEIGHT), (begin, gap), (end, gap), (end, target.y)])


def lane_lines(lane: Lane, past: list[Lane]) -> Iterator[str]:
    """Out of each source's side, down the lane, into the target's side; below them wider lines in the paper's colour."""
    lines = []
    for source in lane.sources:
        leaving = [other for other in past if source in other.sources and other.right == lane.right]
        nth = sorted(leaving, key=lambda other: abs(other.x - WIDTH / 2), reverse=True).index(lane)
        start = source.y + HEIGHT * (0.5 + 0.4 * nth / len(leaving))  # lines leave below the middle, and enter above it
        points = [
            *side(source, lane, start, True),
            *reversed(side(lane.target, lane, lane.target.y + HEIGHT / 4, False)),
        ]
        lines.append(arrow(lane.target, points))
    yield from (re.sub(r'class="line" .* d=', 'class="under" d=', line) for line in lines)
    yield from lines


def side(box: Box, lane: Lane, y: float, leaves: bool) -> list[tuple[float, float]]:
    """From a box to its lane: through its side, or through the gap between floors where another box stands beside it."""
    if box.ends[lane.right]:
        return [(box.x + box.width if lane.right else box.x, y), (lane.x, y)]
    gap = box.y + HEIGHT + GAP / 2 if leaves else box.y - GAP / 2
    at = box.middle + (ASIDE if leaves else -ASIDE)
    return [(at, box.y + HEIGHT if leaves else box.y), (at, gap), (lane.x, gap)]


if __name__ == "__main__":
    DRAWING.write_text(draw(House(ROOT), table(PAGE.read_text(encoding="utf-8"))), encoding="utf-8")
    sys.stderr.write(f"{DRAWING} written\n")
