"""What a study found, as records, text, a figure and one self-contained page, readable without colour and without scripts."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from controllability.arrays.one_line import OneLine
from controllability.rendering.figure import Panel, figure_of
from controllability.rendering.tables import aligned, html_table, number

STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0;font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:#1c2128;background:#fff}
main{max-width:64rem;margin:0 auto;padding:1rem 1.2rem 4rem}h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:1.6rem 0 .4rem}
.text{font-size:1.1rem;line-height:2.5;white-space:pre-wrap;overflow-wrap:anywhere}
.chunk{padding:.15rem .1rem;border-bottom:1px solid #46505c;border-radius:3px}
.chunk sup{font:600 .68rem ui-monospace,Menlo,Consolas,monospace;color:#1c2128;margin-left:.15rem;white-space:nowrap}
.chunk:focus-visible{outline:3px solid #0b4f9e}.best sup::before{content:"▲"}
input[type=range]{width:min(24rem,100%);display:block}output{font-weight:600}
table{border-collapse:collapse;font-size:.92rem}caption{text-align:left;font-weight:600}
th,td{text-align:left;vertical-align:top;padding:.25rem .8rem .25rem 0;border-bottom:1px solid #dfe3e8}
"""
# colours and marks of the number that the slider names: blue adds to the patch, red takes from it, the line below is as thick as the share
SCRIPT = """
const of=JSON.parse(document.getElementById('numbers').textContent),slider=document.getElementById('which');
function show(){const name=Object.keys(of)[slider.value],v=of[name],most=Math.max(...v.map(Math.abs))||1;
document.getElementById('said').textContent=name;slider.setAttribute('aria-valuetext',name);
document.querySelectorAll('.chunk').forEach((e,i)=>{const a=Math.abs(v[i])/most;
e.style.background=`rgba(${v[i]<0?'190,30,45':'30,100,190'},${(.45*a).toFixed(3)})`;
e.style.borderBottomWidth=(1+5*a).toFixed(1)+'px';e.style.borderBottomStyle=v[i]<0?'dotted':'solid';
e.classList.toggle('best',v[i]===Math.max(...v));e.querySelector('sup').textContent=(100*v[i]).toFixed(0)+'%';});}
slider.addEventListener('input',show);show();
"""


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
