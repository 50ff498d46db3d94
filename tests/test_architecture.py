"""The tower of docs/architecture.md: every import runs down, no circle, no long file, and the drawing is what the code is."""

from __future__ import annotations

import ast
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from architecture import (
    DRAWING,
    LEFT,
    PAGE,
    RIGHT,
    ROOT,
    WIDTH,
    House,
    Import,
    Room,
    boxes,
    draw,
    reduced,
    room_of,
    table,
)

# packages that cost too much to load with ours, and those that not everybody has: they may be imported inside functions
HEAVY = {
    "torch", "transformers", "sympy", "scipy", "matplotlib", "pandas", "mpmath", "numpy", "rich", "tokenizers", "safetensors",
    "peft", "bitsandbytes", "accelerate", "gguf", "clarabel", "pyarrow",
}  # fmt: skip
FACE = "controllability"  # loads its names on first use; what it names under TYPE_CHECKING runs down like all else

# imports inside functions that are neither of heavy packages nor of a lower floor, each with its reason
LAZY_ROOMS = {
    "cli": "a command loads its own file only, so that --help is instant",
    "checks": "a level loads its own machinery only; whoever asks for the names of the levels loads none",
}
LAZY = {
    ("controllability", "importlib"): "the package itself loads next to nothing",
    ("architectures.registry", "difflib"): "only somebody who mistyped a name waits for it",
}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 66
LONG = {  # files and functions that may be longer: up to how many lines, and why
    "controllability.compiling.compile_context.compile_context": (
        67,
        "a public function: half of it says what it takes",
    ),
    "controllability.models.generation.generate.generate": (68, "a public function: more than half says what it takes"),
}


@pytest.fixture(scope="module")
def house() -> House:
    return House(ROOT)


@pytest.fixture(scope="module")
def rooms() -> dict[str, Room]:
    return table(PAGE.read_text(encoding="utf-8"))


# ------------------------------------------------------------------ what is looked for: each gives the places, in words


def without_floor(house: House, rooms: dict[str, Room]) -> list[str]:
    return [
        *(f"{room} stands in no row of the table" for room in house.rooms if room not in rooms),
        *(f"{room} stands in the table and not in the code" for room in rooms if room not in house.rooms),
    ]


def not_down(house: House, rooms: dict[str, Room]) -> list[str]:
    """Imports of a room that stands on the same floor or higher, wherever they are written."""
    return [
        f"{said(one)}: {to} (floor {rooms[to].floor}) is not below {of} (floor {rooms[of].floor})"
        for one in house.imports
        if one.target in house.files
        for of, to in [(room_of(one.module), room_of(one.target))]
        if of != to and of in rooms and to in rooms and rooms[to].floor >= rooms[of].floor
    ]


def circles(house: House) -> list[list[str]]:
    """Files that import each other, by way of others perhaps.

    ``from package import name`` is an import of the package's ``__init__``, and through it of all that it passes on;
    ``from package.module import name`` one of the module alone.
    """
    after: dict[str, set[str]] = {module: set() for module in house.files}
    for one in house.imports:
        if one.target in after:
            after[one.module].add(one.target)
    reach = {module: reached(module, after) for module in after}
    found = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in after if a in reach[a]}
    return sorted(map(list, found))


def reached(module: str, after: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [*after[module]]
    while waiting:
        if (one := waiting.pop()) not in found:
            found.add(one)
            waiting += after[one]
    return found


def lazy(house: House, rooms: dict[str, Room]) -> list[Import]:
    """Imports inside functions, but those of heavy packages and of lower floors."""

    def is_lower(one: Import) -> bool:
        of, to = room_of(one.module), room_of(one.target)
        return one.target in house.files and of in rooms and to in rooms and rooms[to].floor < rooms[of].floor

    return [
        one for one in house.imports if one.inside and one.target.partition(".")[0] not in HEAVY and not is_lower(one)
    ]


def excused(one: Import, house: House) -> bool:
    own_room = one.target in house.files and room_of(one.target) == room_of(one.module)
    return (own_room and room_of(one.module) in LAZY_ROOMS) or excuse(one) in LAZY


def excuse(one: Import) -> tuple[str, str]:
    """The key of an import in ``LAZY``: the module, and the module of ours or the package that it imports."""
    ours = one.target.partition(".")[0] in ("controllability", "architectures")
    return one.module, one.target if ours else one.target.partition(".")[0]


def remembered(house: House) -> list[tuple[str, str]]:
    """(file, name) of what outlives a call: cached functions, weak tables, context variables, tables that begin empty."""
    found = []
    for module, path in house.files.items():
        file = "/".join(path.parts[path.parts.index(module.partition(".")[0]) :]).removeprefix("controllability/")
        for node in ast.walk(house.trees[module]):
            decorators = getattr(node, "decorator_list", [])
            if any("cache" in ast.unparse(one) for one in decorators):
                found.append((file, node.name))
        for node in house.trees[module].body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                value = ast.unparse(node.value)
                if value in ("{}", "[]", "set()", "dict()", "Cache()") or re.match(
                    r"[\w.]*(Weak\w+|ContextVar)\(", value
                ):
                    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                    found.append((file, ast.unparse(target)))
    return found


def too_long(house: House) -> list[str]:
    found = []
    for module, path in house.files.items():
        found.append((module, len(path.read_text(encoding="utf-8").splitlines()), MOST_LINES))
        for node in ast.walk(house.trees[module]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                found.append((f"{module}.{node.name}", lines, MOST_LINES_OF_A_FUNCTION))
    return [f"{name} has {lines} lines" for name, lines, most in found if lines > LONG.get(name, (most, ""))[0]]


def said(one: Import) -> str:
    return f"{one.module}, line {one.line}, imports {one.target}"


# --------------------------------------------------------------------------------------------------- this house


def test_every_room_has_a_floor(house, rooms):
    assert without_floor(house, rooms) == []


def test_imports_run_one_way(house, rooms):
    """Those inside functions and under TYPE_CHECKING included: a reader follows them too."""
    assert not_down(house, rooms) == []


def test_no_file_imports_itself_by_way_of_others(house):
    assert circles(house) == []


def test_imports_inside_functions_are_of_heavy_packages_or_run_down(house, rooms):
    assert [said(one) for one in lazy(house, rooms) if not excused(one, house)] == []


def test_no_excuse_outlives_its_import(house, rooms):
    found = {excuse(one) for one in lazy(house, rooms)}
    assert [key for key in LAZY if key not in found] == [], "delete these lines of LAZY"


def test_what_is_remembered_stands_on_the_page(house):
    paragraphs = PAGE.read_text(encoding="utf-8").replace("\n\n", "\n|").split("\n|")
    for file, name in remembered(house):
        assert any(f"`{file}" in text and f"`{name}`" in text for text in paragraphs), (file, name)
    names = {name for _, name in remembered(house)}
    rows = [text.split(" | ") for text in paragraphs if ".py` | `" in text]
    stated = {name.strip("`") for row in rows for name in row[1].split(", ")}
    assert stated <= names, stated - names


def test_no_file_and_no_function_is_too_long(house):
    assert too_long(house) == []


def test_the_drawing_is_what_the_code_is(house, rooms):
    drawn = draw(house, rooms)
    assert DRAWING.read_text(encoding="utf-8") == drawn, "run: python tests/architecture.py"
    for name, room in rooms.items():
        assert f">{name}</text>" in drawn, room


def test_the_drawing_leaves_out_only_arrows_that_follow_from_others(house):
    arrows = house.arrows()
    short = reduced(arrows)
    for room, below in arrows.items():
        assert below <= reached(room, short), room
        for other in short[room]:  # none of those that are drawn follows from the rest
            assert other not in reached(room, short | {room: short[room] - {other}}), (room, other)


def test_texts_fit_their_boxes_and_boxes_the_page(house, rooms):
    placed = [*boxes(house, rooms).values()]
    for box in placed:
        assert 6.2 * len(box.room.holds) < box.width - 16, box.room  # 11.5 px letters are 6 px wide on average
        assert box.x >= LEFT and box.x + box.width <= RIGHT + 1e-6 < WIDTH
    for a, b in pairwise(sorted(placed, key=lambda box: (box.y, box.x))):
        assert a.y < b.y or a.x + a.width < b.x


# ------------------------------------------------------------------------------ made-up houses, each with one fault

MADE_UP = """
| 3 | `top` | what is on top |
| 2 | `left` | one side |
| 2 | `right` | the other side |
| 1 | `architectures` | the ground |
"""
SOUND = {
    "controllability/top/__init__.py": "from controllability.top.face import face as face\n",
    "controllability/top/face.py": "from controllability.left import side\nfrom controllability.right import other\n\ndef face():\n    import torch\n    from controllability.left import side\n",
    "controllability/left.py": "import os\nimport architectures\nside = 1\n",
    "controllability/right.py": "other = 1\n",
    "architectures/__init__.py": "from architectures.registry import add as add\n",
    "architectures/registry.py": "def add(): ...\n",
}


def made_up(tmp_path: Path, **changed: str) -> House:
    """The sound house with these files (``left`` for ``controllability/left.py``) changed or added."""
    for name, text in (
        SOUND | {f"controllability/{k.replace('__in__', '/')}.py": v for k, v in changed.items()}
    ).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return House(tmp_path)


def test_a_sound_house_passes(tmp_path):
    house, rooms = made_up(tmp_path), table(MADE_UP)
    assert without_floor(house, rooms) == not_down(house, rooms) == circles(house) == lazy(house, rooms) == []
    assert too_long(house) == []
    assert reduced(house.arrows())["top"] == {"left", "right"}


IMPORTS = {
    "plain": "from controllability.top.face import face\n",
    "of the package": "import controllability.top\n",
    "relative": "from .top import face\n",
    "inside a function": "def f():\n    from controllability.top.face import face\n",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from controllability.top.face import face\n",
    "by its name": 'from importlib import import_module\ntop = import_module("controllability.top")\n',
}


@pytest.mark.parametrize("text", IMPORTS.values(), ids=IMPORTS)
def test_an_import_that_runs_up_is_named(tmp_path, text):
    (found,) = not_down(made_up(tmp_path, right=text), table(MADE_UP))
    line = len(text.splitlines())
    assert found.startswith(f"controllability.right, line {line}, imports controllability.top")
    assert found.endswith("top (floor 3) is not below right (floor 2)")


def test_an_import_of_a_neighbour_is_named(tmp_path):
    (found,) = not_down(made_up(tmp_path, right="from controllability import left\n"), table(MADE_UP))
    assert found == (
        "controllability.right, line 1, imports controllability.left: left (floor 2) is not below right (floor 2)"
    )


def test_a_room_without_a_floor_is_named_and_a_floor_without_a_room(tmp_path):
    house, more = made_up(tmp_path, cellar="x = 1\n"), MADE_UP + "| 1 | `attic` | dust |\n"
    assert without_floor(house, table(more)) == [
        "cellar stands in no row of the table", "attic stands in the table and not in the code",
    ]  # fmt: skip


CIRCLES = {
    "two files": {
        "top__in__a": "from controllability.top import b",
        "top__in__b": "from controllability.top.a import x",
    },
    "inside a function": {
        "top__in__a": "def f():\n    from controllability.top.b import x",
        "top__in__b": "from controllability.top.a import x",
    },
}


@pytest.mark.parametrize("files", CIRCLES.values(), ids=CIRCLES)
def test_a_circle_is_named(tmp_path, files):
    assert circles(made_up(tmp_path, **files)) == [["controllability.top.a", "controllability.top.b"]]


def test_a_circle_through_what_a_package_passes_on_is_named(tmp_path):
    """A file may import its neighbour, not the package that imports both."""
    house = made_up(tmp_path, top__in__face="from controllability.top import something\n")
    assert circles(house) == [["controllability.top", "controllability.top.face"]]
    assert circles(made_up(tmp_path, top__in__face="from controllability.top import other\n", top__in__other="")) == []


def test_a_lazy_import_of_the_own_room_or_of_a_light_package_is_named(tmp_path):
    text = "def f():\n    import torch\n    import json\n    from controllability.top import face\n"
    house = made_up(tmp_path, top__in__other=text)
    found = [said(one) for one in lazy(house, table(MADE_UP)) if not excused(one, house)]
    assert found == [
        "controllability.top.other, line 3, imports json",
        "controllability.top.other, line 4, imports controllability.top.face",
    ]


def test_what_is_remembered_is_found(tmp_path):
    text = "from functools import lru_cache\nimport weakref\n\n@lru_cache\ndef f(): ...\n\n_SEEN: dict = {}\nT = weakref.WeakKeyDictionary()\nFIXED = {1: 2}\n"
    found = remembered(made_up(tmp_path, left=text))
    assert found == [("left.py", "f"), ("left.py", "_SEEN"), ("left.py", "T")]


def test_what_is_too_long_is_named(tmp_path):
    body = "    x = 1\n" * MOST_LINES_OF_A_FUNCTION
    house = made_up(tmp_path, left=f"def f():\n{body}", right="x = 1\n" * (MOST_LINES + 1))
    assert too_long(house) == ["controllability.left.f has 67 lines", "controllability.right has 401 lines"]


def test_a_drawing_changes_with_the_imports(tmp_path):
    rooms = table(MADE_UP)
    before = draw(made_up(tmp_path), rooms)
    assert draw(made_up(tmp_path, left="side = 1\n"), rooms) != before
    assert draw(made_up(tmp_path, left="import os\nimport architectures\nside = 2  # another line\n"), rooms) == before


def test_the_standard_library_is_no_heavy_package():
    assert not HEAVY & sys.stdlib_module_names
