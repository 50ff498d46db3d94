"""How the pages look: states differ in colour, in the line of their border, and in their label."""

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

BASE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{margin:0;font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;color:#1c2128;background:#fff}
main{max-width:84rem;margin:0 auto;padding:1rem 1.2rem 6rem}body{padding-right:21rem}
h1{font-size:1.7rem;line-height:1.25;margin:.6rem 0}h2{font-size:1.25rem;margin:2rem 0 .5rem}
h3{font-size:1.05rem;margin:0 4.5rem .4rem 0;overflow-wrap:anywhere}h4{font-size:.95rem;margin:1rem 0 .2rem}
header p,header dl{max-width:52rem}.lead{font-size:1.08rem}a{color:#0b4f9e}
.level{border-left:4px solid #46505c;padding:.2rem .8rem;background:#f4f5f6}
.warning{border:3px solid #a80020;padding:.5rem .8rem;font-weight:700;color:#a80020}
code{font:.88em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.where{color:#46505c}.formula,var{font-family:Cambria,"STIX Two Text","Times New Roman","DejaVu Serif",serif}.formula{font-size:1.08em}
dl{margin:.3rem 0;display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.15rem .8rem}
dt{font-weight:600;color:#46505c}dd{margin:0;overflow-wrap:anywhere}
.refusal{border:3px solid #a80020;border-radius:8px;padding:.6rem .9rem;background:#fff7f7}.refusal p{margin:.2rem 0}
.canvas{overflow:auto;border:1px solid #c8cdd3;border-radius:8px;background:#fcfcfd}
.canvas svg{display:block;margin:0 auto;height:auto}
aside{position:fixed;z-index:1;top:0;right:0;bottom:0;width:21rem;overflow:auto;border-left:1px solid #c8cdd3;background:#fff}
.panel{display:none;position:relative;padding:.9rem 1rem;scroll-margin-top:1rem;outline:none}.panel:target{display:block}.panel:focus-visible{outline:none}
.panel:target~.hint{display:none}.hint{margin:0;padding:.9rem 1rem;color:#46505c}
.panel ul{margin:.2rem 0;padding-left:1.2rem}.panel p{margin:.3rem 0}
.close{position:absolute;top:.8rem;right:1rem;font-size:.9rem}
.state{padding:.25rem .6rem;border-radius:6px;border:2px solid #46505c}
.legend{list-style:none;margin:.2rem 0 .8rem;padding:0;display:flex;flex-wrap:wrap;gap:.35rem 1.4rem;font-size:.92rem}
.swatch{display:inline-block;padding:0 .5rem;border-radius:6px;font-size:.82rem;font-weight:600;margin-right:.2rem}
.wide{overflow-x:auto}table{border-collapse:collapse}th,td{text-align:left;vertical-align:top;padding:.3rem .9rem .3rem 0;border-bottom:1px solid #dfe3e8}
td code,td.rule{overflow-wrap:normal;white-space:nowrap}td.formula{min-width:10rem}dd ul{margin:0;padding-left:1.1rem}
td.failed{color:#a80020;font-weight:700}td.skipped{color:#6b4a00}
#derivation{overflow-wrap:anywhere}details{border-left:4px solid #767d86;margin:.4rem 0 .4rem .5rem;padding-left:.8rem}
details.input{border-color:#0b4f9e}details.output{border-color:#a34100;border-left-style:double;border-left-width:6px}
details.through{border-color:#00605e;border-left-style:dashed}
summary{cursor:pointer}details:target>summary{background:#fff3bf}details dl{font-size:.94rem}
a:focus-visible,summary:focus-visible,.canvas:focus-visible{outline:3px solid #0b4f9e;outline-offset:2px}
svg text{font:600 12.5px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;text-anchor:middle;dominant-baseline:central;fill:#1c2128}
svg text.name{font:11.5px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
svg text.badge{font-size:10.5px;fill:#fff}svg text.sign{font-size:17px}
svg text.heading{font-size:11.5px;text-anchor:start}svg text.label{font-size:11.5px;font-weight:400;fill:#46505c}
.wire{fill:none;stroke:#5a636d;stroke-width:1.6}.wire.choice{stroke-dasharray:5 4}.head{fill:#5a636d}
.cut{fill:none;stroke:#46505c;stroke-width:1.5;stroke-dasharray:7 5}
.frame{fill:none}.frame.group{stroke:#a2a9b1}.frame.through{stroke:#00605e;stroke-width:2;stroke-dasharray:9 5}
.frame.culprit{stroke:#a80020;stroke-width:4;fill:#fff0f0}
svg text.heading.through{fill:#00605e}svg text.heading.culprit{fill:#a80020}svg text.heading.group{fill:#46505c}
a.node{cursor:pointer;text-decoration:none}a.node:hover .body{filter:brightness(.95)}
a.node:focus{outline:none}a.node:focus .body{stroke-width:4}a.node .behind{fill:#fff;stroke:#767d86}
.swatch.through{border:2px dashed #00605e;color:#00605e}.swatch.cut{border-top:2px dashed #46505c;border-radius:0}
@media(max-width:60rem){body{padding-right:0}main{padding:.5rem .8rem 55vh}
aside{left:0;top:auto;width:auto;max-height:50vh;border:0;border-top:2px solid #46505c;box-shadow:0 -4px 16px #0003}.hint{padding:.5rem .8rem}}
@media screen and (prefers-color-scheme:dark){html{background:#fff;filter:invert(.92) hue-rotate(180deg)}}
@media print{body,main{padding:0}aside{position:static;width:auto;max-height:none;overflow:visible;border:0;box-shadow:none}
.panel{display:block;break-inside:avoid}.hint,.close{display:none}.canvas,.wide{overflow:visible}.canvas{break-inside:avoid;border:0}
.canvas svg{max-width:100%;max-height:95vh}}
"""


def _state(name: str, fill: str, line: str, dashes: str, width: float) -> str:
    border = "dotted" if dashes[:1] == "2" else "dashed" if dashes else "solid"
    pattern = f";stroke-dasharray:{dashes}" if dashes else ""
    return (
        f"a.{name} .body{{fill:{fill};stroke:{line};stroke-width:{width}{pattern}}}a.{name} .pill{{fill:{line}}}"
        f".swatch.{name},.state.{name}{{background:{fill};border:{max(2, int(width))}px {border} {line}}}"
    )


STYLE = BASE + "".join(_state(name, *look) for name, look in STATES.items())
