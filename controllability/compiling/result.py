"""What came of compiling a context: the patch, how it was come by, and how far it carries."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from controllability.compiling.exact_or_ridge import Solution, rank_of
from controllability.compiling.token_sets import Context
from controllability.compiling.yardstick import Agreement, Yardstick
from controllability.models.model_patch import ModelPatch
from controllability.models.reading.token_text import word
from controllability.models.sweep.report import LayerReport
from controllability.rendering.tables import html_table

TITLES = {
    "queries": "queries, against the contextual model",
    "heldout": "held-out queries, against the contextual model",
    "near": "like the queries, of another subject, against the base model",
    "unrelated": "unrelated text, against the base model",
}


@dataclass(frozen=True, eq=False, repr=False)
class Compiled:
    """What ``compile_context`` returns: the patch, how it was come by, and how far it carries.

    ``sets`` are "queries", "heldout", "near" and "unrelated" as far as there are any, ``results`` the agreement of the patched model on
    each, ``logits`` its logits there (the queries one by one); ``drift`` how much ordinary text feels each map's change, beside what
    the map gives.  ``tokens`` counts different tokens: queries that begin alike share some.
    """

    solution: Solution
    context: Context
    answer_tokens: int
    tokens: int
    sets: dict[str, Yardstick]
    results: dict[str, Agreement]
    logits: dict[str, list[Tensor]]
    seconds: float
    drift: dict[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        carried = ", ".join(f"{name} {found.top1_agreement:.1%}" for name, found in self.results.items())
        return f"Compiled({'exact' if self.exact else 'a fit'}, {self.tokens} tokens, {len(self)} layers, agreement: {carried})"

    def __len__(self) -> int:
        return len(self.patch)

    def __iter__(self) -> Iterator[LayerReport]:
        """The layers' reports."""
        return iter(self.patch)

    def rows(self) -> list[list[str]]:
        """How far it carries, as a table with its heading: each set of texts, compiled and unpatched."""
        rows = [["texts", "model", "same likeliest token", "mean KL", "largest logit error"]]
        for name, yardstick in self.sets.items():
            for who, found in (("compiled", self.results[name]), ("unpatched", yardstick.unpatched)):
                numbers = f"{found.top1_agreement:.1%}", f"{found.kl:.2g}", f"{found.max_logit_error:.2g}"
                rows.append([TITLES.get(name, name) if who == "compiled" else "", who, *numbers])
        return rows

    def _repr_html_(self) -> str:
        return html_table("how far it carries", self.rows()) + self.patch._repr_html_()

    @property
    def patch(self) -> ModelPatch:
        """The patch: ``applied``, ``merge``, ``save``, ``export_peft`` as of any other."""
        return self.solution.patch

    @property
    def exact(self) -> bool:
        """Whether every token of the queries is reproduced (to rounding); else the patch is a least-squares fit."""
        return self.solution.exact

    @property
    def first_tokens(self) -> list[str]:
        """What stands before every query: give it to the compiled model too."""
        return [word(self.context.tokenizer, token) for token in self.context.tokens[: self.context.first]]

    def answers(self) -> list[dict[str, Any]]:
        """The likeliest token after each query: with the context, from the compiled weights, without either."""
        rows = []
        for which in ("queries", "heldout"):
            if which not in self.sets:
                continue
            yardstick = self.sets[which]
            for sample, *runs in zip(
                yardstick.samples, yardstick.wanted, self.logits[which], yardstick.without, strict=True
            ):
                words = [word(self.context.tokenizer, int(x[-1].argmax())) for x in runs]
                keys = ("with_context", "patched", "without_context")
                rows.append({"set": which, "query": sample.text} | dict(zip(keys, words, strict=True)))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the report of ``controllability compile``."""
        patch, solution = self.patch, self.solution
        certificate = None if self.exact else next((a.certificate for a in solution.attempts if a.certificate), None)
        found: dict[str, Any] = dict.fromkeys(("queries", "heldout", "near", "unrelated"))
        for name, yardstick in self.sets.items():
            found[name] = self.results[name].to_dict() | {
                "unpatched": yardstick.unpatched.to_dict(),
                "texts": len(yardstick.samples),
            }
        return found | {
            "tokens": self.tokens, "context_tokens": len(self.context.tokens), "answer_tokens": self.answer_tokens,
            "first_tokens": self.first_tokens, "anchor": self.context.anchored, "exact": self.exact, "certificate": certificate,
            "tried": [attempt.to_dict() for attempt in solution.attempts], "first_token_kept": solution.wish.pinned,
            "via": patch.report.via, "rank": rank_of(patch), "ridge": solution.ridge,
            "ridge_choice": solution.choice.to_dict() if solution.choice else None,
            "numbers": patch.numbers, "dense_numbers": patch.dense_numbers, "layers": _layers(patch), "answers": self.answers(),
            "seconds": self.seconds, "strength": solution.strength, "drift": self.drift,
            "moments_tokens": patch.moments.tokens if patch.moments is not None else None,
        }  # fmt: skip


def _layers(patch: ModelPatch) -> list[dict[str, Any]]:
    """Each layer's route (which resort a normalised output took) and how much it moved."""
    names = ("index", "route", "residual", "relative_changes")
    return [{name: row[name] for name in names} for row in patch.report.to_dict()["layers"]]
