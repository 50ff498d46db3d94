"""How the pages look: states differ in colour, in the line of their border, and in their label."""

from importlib.resources import files

# state -> (fill, border and label, pattern of the border, its width)
STATES = {
    "input": ("#dbeafe", "#0b4f9e", "", 2.5),
    "output": ("#fdebd8", "#a34100", "", 2.5),
    "undone": ("#f1e8fa", "#5f2f96", "2 3", 2),
    "shared": ("#e3f3e8", "#17603a", "8 3 2 3", 2),
    "own": ("#ffffff", "#46505c", "6 4", 1.5),
    "fixed": ("#f4f5f6", "#767d86", "", 1),
    "culprit": ("#fde2e2", "#a80020", "", 4),
    "junction": ("#ffffff", "#333a42", "", 1.5),
    "choice": ("#ffffff", "#767d86", "3 3", 1),
}


def _state(name: str, fill: str, line: str, dashes: str, width: float) -> str:
    border = "dotted" if dashes[:1] == "2" else "dashed" if dashes else "solid"
    pattern = f";stroke-dasharray:{dashes}" if dashes else ""
    return (
        f"a.{name} .body{{fill:{fill};stroke:{line};stroke-width:{width}{pattern}}}a.{name} .pill{{fill:{line}}}"
        f".swatch.{name},.state.{name}{{background:{fill};border:{max(2, int(width))}px {border} {line}}}"
    )


STYLE = files("controllability.rendering").joinpath("page.css").read_text("utf-8") + "".join(
    _state(name, *look) for name, look in STATES.items()
)
