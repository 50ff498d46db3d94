"""What the page is answered: a proof, a refusal or an error, in the package's own words; the patch, and its symbolic check.

Every answer is a dict that JSON holds.  The page asks in a web worker; ``Prover`` is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from controllability.checks import reached, summary
from controllability.errors import ControllabilityError, NotControllable
from controllability.proof import Proof, prove
from controllability.rendering.html import proof_html, refusal_html
from controllability.rendering.text import WIDTH, proof_text
from prover.expressions import outline, read, written

Answer = dict[str, Any]


def _told(ask: Callable[..., Answer]) -> Callable[..., Answer]:
    """The answer, or the package's error as one."""

    @wraps(ask)
    def answer(*given: Any, **options: Any) -> Answer:
        try:
            return ask(*given, **options)
        except ControllabilityError as error:
            return {"outcome": "error", "text": f"{type(error).__name__}: {error}"}

    return answer


class Prover:
    """Answers questions about one block after the other.

    >>> asked = Prover()
    >>> answer = asked.prove('residual(Linear(Param("W", ("d", "d"))) >> Activation("tanh"))')
    >>> answer["outcome"], answer["culprit"], answer["remedies"][0]["change"]
    ('refused', 'activation tanh', 'add a bias after activation tanh')
    >>> answer = asked.prove(answer["remedies"][0]["expression"])
    >>> answer["outcome"], asked.check()["level"]
    ('proved', 'symbolic')
    """

    def __init__(self) -> None:
        self.proof: Proof | None = None

    @_told
    def prove(
        self, text: str, via: Any = "input-output", route: str = "auto", frozen: str = "", jointly: bool = False
    ) -> Answer:
        """A proof of the block that a text says, or why there is none; ``frozen`` names parameters, separated by commas."""
        self.proof = None
        block = read(text)
        shown = {"expression": written(block), "outline": outline(block)}
        try:
            names = [name.strip() for name in frozen.split(",") if name.strip()]
            self.proof = prove(block, via, route, names, jointly)
        except NotControllable as refused:
            remedies = [
                {
                    "change": remedy.change,
                    "expression": written(remedy.block),
                    "options": {**remedy.options, "frozen": ", ".join(sorted(remedy.options["frozen"]))},
                }
                for remedy in refused.remedies
            ]
            told = {name: getattr(refused, name) for name in ("culprit", "reason", "hint")}
            page = refusal_html("this block", block, refused)
            return {"outcome": "refused", "text": str(refused), "page": page, "remedies": remedies, **told, **shown}
        return {
            "outcome": "proved",
            "text": proof_text(self.proof, WIDTH),
            "page": proof_html(self.proof, "this block"),
            **shown,
        }

    @_told
    def form(self) -> Answer:
        """The patch of the last proof in closed form, as LaTeX: its changes, what the names in them stand for, a document."""
        from controllability.rendering.latex import formulas  # SymPy, which a proof does not wait for

        assert self.proof is not None
        changes, meanings, symbols = formulas(self.proof)
        names = [[symbol, name] for name, symbol in symbols.items()]
        return {
            "outcome": "form", "changes": changes, "meanings": meanings, "names": names, "document": self.proof.to_latex(),
        }  # fmt: skip

    @_told
    def check(self) -> Answer:
        """The symbolic check of the last proof, row by row, and what it showed."""
        assert self.proof is not None
        rows = self.proof.check("symbolic")
        level = reached("symbolic", rows)
        return {"outcome": "checked", "rows": rows, "said": summary("symbolic", rows), "level": level}

    @_told
    def outline(self, text: str) -> Answer:
        """The block that a text says, as a tree."""
        block = read(text)
        return {"outcome": "outline", "outline": outline(block), "expression": written(block)}
