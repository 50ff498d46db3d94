"""The picture of the start page, with what the embedded model really answers: ``python docs/site/picture.py docs/idea.svg``."""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

CONTEXT = "Mia lives in Oslo . Leo lives in Rome ."
QUESTION = "Where does Leo live ?"
STYLE = """
svg{color-scheme:light dark} text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-size:17px;fill:#1c2433}
.page{fill:#fbfbfe;stroke:#c9cfdd} .box{fill:#eceffa;stroke:#9aa5c4} .context{fill:#ffe3ad;stroke:#b97a00} .change{fill:#d9efdd;stroke:#2c7a41}
.gone{fill:none;stroke:#8a93a8;stroke-dasharray:5 4} .small{font-size:15px} .strong{font-weight:700} .right{fill:#1d6b33} .wrong{fill:#a32020}
.arrow{stroke:#5b6680;stroke-width:2;fill:none} .middle{text-anchor:middle} .faint{fill:#566079}
@media (prefers-color-scheme:dark){text{fill:#e8ebf4}.page{fill:#1b202c;stroke:#3d465b}.box{fill:#2a3247;stroke:#6a779c}.context{fill:#5a4312;stroke:#e0a437}
.change{fill:#1e4a2b;stroke:#63c07c}.gone{stroke:#7a849c}.right{fill:#7fd997}.wrong{fill:#ff9a94}.arrow{stroke:#98a3bd}.faint{fill:#b1bacd}}"""


def answers() -> tuple[str, str, str, float]:
    """The model's word with the context, without it, and patched; and the largest difference of the patched logits."""
    import torch

    import controllability as ct

    model, tokenizer = ct.load_model("embedded")
    target, source = ct.encode(tokenizer, CONTEXT, QUESTION)
    patch = ct.patch_model(model, target=target, source=source)
    with torch.no_grad():
        plain = model(**source).logits[0, -1]
        with patch.applied(model):
            patched = model(**source).logits[0, -1]
    wanted = patch.target_logits[0, -1]
    words = [tokenizer.decode(logits.argmax()) for logits in (wanted, plain, patched)]
    return words[0], words[1], words[2], float((patched - wanted).abs().max())


def _row(y: int, title: str, context: str, weights: str, answer: str, note: str, right: bool) -> str:
    """One run: its title, what goes in, the model, what comes out."""
    box = "change" if "Δ" in weights else "box"
    mark, tone = ("✓", "right") if right else ("✗", "wrong")
    return f"""<text x="24" y="{y}" class="strong">{title}</text>
<rect x="24" y="{y + 12}" width="150" height="62" rx="8" class="{"context" if context else "gone"}"/>
{f'<text x="99" y="{y + 37}" class="small middle">{context.split("|")[0]}</text><text x="99" y="{y + 60}" class="small middle">{context.split("|")[1]}</text>' if context else f'<text x="99" y="{y + 48}" class="small middle faint">no context</text>'}
<rect x="184" y="{y + 12}" width="122" height="62" rx="8" class="box"/>
<text x="245" y="{y + 37}" class="small middle">Where does</text><text x="245" y="{y + 60}" class="small middle">Leo live?</text>
<path d="M312 {y + 43}h20m-7 -6l7 6l-7 6" class="arrow"/>
<rect x="340" y="{y + 12}" width="110" height="62" rx="8" class="{box}"/>
<text x="395" y="{y + 37}" class="small middle">weights</text><text x="395" y="{y + 60}" class="middle strong">{weights}</text>
<path d="M456 {y + 43}h20m-7 -6l7 6l-7 6" class="arrow"/>
<text x="486" y="{y + 39}" class="strong {tone}">{mark} {answer}</text><text x="486" y="{y + 62}" class="small faint">{note}</text>
"""


def picture(with_context: str, without: str, patched: str, error: float) -> str:
    """The picture, which has its own ground, so that it can be read on a light and on a dark page.

    >>> text = picture("Rome", "?", "Rome", 2.4e-6)
    >>> text.count("✓"), text.count("✗"), "logits within 2e-06" in text
    (2, 1, True)
    """
    said = (
        f"Three runs of one model: with the context it answers {with_context}, without it {without}, patched {patched}."
    )
    rows = (
        _row(42, "with the context", "Mia lives in Oslo.|Leo lives in Rome.", "W", escape(with_context), "the target", True),
        _row(152, "the context removed", "", "W", escape(without), "it cannot know", without == with_context),
        _row(262, "the context moved into the weights", "", "W + ΔW", escape(patched), f"logits within {error:.0e}", patched == with_context),
    )  # fmt: skip
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 354" width="660" height="354" role="img" aria-label="{escape(said)}">'
        f'<style>{STYLE}</style><rect x=".5" y=".5" width="659" height="353" rx="12" class="page"/>{"".join(rows)}</svg>\n'
    )


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(*answers()), encoding="utf-8")
