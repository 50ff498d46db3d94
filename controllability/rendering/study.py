"""What a study found, as records, text, a figure and one self-contained page, readable without colour and without scripts."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from controllability.arrays.one_line import OneLine
from controllability.rendering.figure import Panel, figure_of
from controllability.rendering.tables import aligned, html_table, number

STYLE, SCRIPT = (
    files("controllability.rendering").joinpath(f"study.{kind}").read_text("utf-8") for kind in ("css", "js")
)


class Study(OneLine):
    """What was measured, as rows: a subclass gives ``records``, and what else is to be said and drawn."""

    title = ""

    def records(self) -> list[dict[str, Any]]:
        """The rows, JSON-ready."""
        raise NotImplementedError

    def panels(self) -> Sequence[Panel]:
        """What is drawn."""
        return ()

    def table(self) -> list[list[str]]:
        """The rows as text, their heading first."""
        rows = self.records()
        cells = (
            [number(v) if v is None or isinstance(v, float) else " ".join(str(v).split()) for v in row.values()]
            for row in rows
        )
        return [[*rows[0]] if rows else [], *cells]

    def below(self) -> str:
        """What is to be said of all of them."""
        return ""

    def parts(self) -> list[str]:
        """The parts of the page."""
        return [html_table(self.title, self.table(), self.below())]

    def frame(self) -> Any:
        """The records as a ``pandas.DataFrame`` where pandas is installed, else as they are."""
        if find_spec("pandas") is None:
            return self.records()
        import pandas  # type: ignore[import-not-found]

        return pandas.DataFrame(self.records())

    def __str__(self) -> str:
        return f"{aligned(self.table())}\n{self.below()}".rstrip()

    def _repr_html_(self) -> str:
        return html_table(self.title, self.table(), self.below())

    def plot(self, path: str | Path | None = None) -> Any:
        """A matplotlib figure, drawn without a display; with ``path`` it is written there, and the path returned."""
        return figure_of(self.panels(), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page; with ``path`` it is written there as well."""
        title = escape(self.title)
        text = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{title}</title><style>{STYLE}</style></head><body><main><h1>{title}</h1>{''.join(self.parts())}</main></body></html>\n"
        )
        if path is not None:
            temporary = Path(path).with_name(f".{Path(path).name}.part")
            try:
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        return text


def coloured(chunks: Sequence[str], numbers: Mapping[str, Sequence[float]], told: Sequence[str]) -> str:
    """The chunks of a text with a number each, in per cent, those of the first name; a slider chooses another.  ``told`` is shown on hovering."""
    first = next(iter(numbers.values()))
    spans = []
    for i, (text, more) in enumerate(zip(chunks, told, strict=True)):
        hover = "\n".join([f"chunk {i}", *(f"{name}: {number(of[i])}" for name, of in numbers.items()), more])
        spans.append(
            f'<span class="chunk" tabindex="0" title="{escape(hover)}">{escape(text)}<sup>{100 * first[i]:.0f}%</sup></span>'
        )
    data = json.dumps({name: [round(v, 6) for v in of] for name, of in numbers.items()}).replace("<", "\\u003c")
    return (
        "<h2>The context</h2><p>Each chunk has its share in per cent behind it; ▲ marks the largest, the line below is as thick as the share, "
        'dotted where it is negative.</p><label for="which">Share of <output id="said">'
        f'{escape(next(iter(numbers)))}</output></label><input type="range" id="which" min="0" max="{len(numbers) - 1}" value="0">'
        f'<p class="text">{"".join(spans)}</p><script type="application/json" id="numbers">{data}</script><script>{SCRIPT}</script>'
    )
