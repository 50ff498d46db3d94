"""What came of compiling a context: the patch, how it was come by, and how far it carries."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from controllability.compiling.answers import ASKED, Answers
from controllability.compiling.controls import ControlArm
from controllability.compiling.exact_or_ridge import Solution, rank_of
from controllability.compiling.token_sets import Context
from controllability.compiling.yardstick import Agreement, Apart, Yardstick
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
MOST_DRIFT = {"nats": 0.2, "times the perplexity": 1.15}  # on unrelated text; what is above drifts, verified or not


@dataclass(frozen=True, eq=False, repr=False)
class Compiled:
    """What ``compile_context`` returns: the patch, how it was come by, and how far it carries.

    ``sets`` are "queries", "heldout", "near" and "unrelated" as far as there are any, ``results`` the agreement of the patched model on
    each, ``logits`` its logits there (the queries one by one); ``drift`` how much ordinary text feels each map's change, beside what
    the map gives.  ``tokens`` counts different tokens: queries that begin alike share some.  ``spoken`` are the answers of the sets that
    are asked, ``arms`` the control arms, ``cache_bytes`` what a token takes in the KV cache.
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
    spoken: dict[str, Answers] = field(default_factory=dict)
    arms: list[ControlArm] = field(default_factory=list)
    cache_bytes: int | None = None

    def __repr__(self) -> str:
        carried = ", ".join(f"{name} {found.top1_agreement:.1%}" for name, found in self.results.items())
        return f"Compiled({'exact' if self.exact else 'a fit'}, {self.tokens} tokens, {len(self)} layers, agreement: {carried})"

    def __len__(self) -> int:
        return len(self.patch)

    def __iter__(self) -> Iterator[LayerReport]:
        """The layers' reports."""
        return iter(self.patch)

    def rows(self) -> list[list[str]]:
        """How far it carries, as a table with its heading: each set of texts, compiled, unpatched or position by position, and the controls."""
        rows = [["texts", "model", "same likeliest token", "KL", "logit error", "same answer"]]
        for name, yardstick in self.sets.items():
            spoken = self.spoken.get(name)
            found = [("compiled", self.results[name], spoken and spoken.same())]
            if spoken:
                found.append(("unpatched", yardstick.unpatched, spoken.same("without_context")))
            elif name in self.apart:
                found += [(which.replace("_", " "), part, None) for which, part in self.apart[name].positions.items()]
            for who, control in [(f"control: {arm.name}", arm.found) for arm in self.arms if arm.found]:
                answers = control.answers.get(name)
                found.append((who, control.results[name], answers and answers.same()))
            for i, (who, result, same) in enumerate(found):
                numbers = f"{result.top1_agreement:.1%}", f"{result.kl:.2g}", f"{result.max_logit_error:.2g}"
                answered = "" if same is None else f"{same:.0%}"
                rows.append(["" if i else TITLES.get(name, name), who, *numbers, answered])
        return rows

    @cached_property
    def apart(self) -> dict[str, Apart]:
        """Of each set that is compared with the base model: whole texts' perplexity, and the first position behind the protected ones."""
        first = 0 if self.context.anchored else len(self.context.lead)
        return {name: self.sets[name].apart(first, self.logits[name]) for name in self.sets if name not in ASKED}

    @property
    def drifts(self) -> str | None:
        """By how much unrelated text moves, where that is more than ``MOST_DRIFT``."""
        ratio = (self.apart["unrelated"].perplexity or {"ratio": 1.0})["ratio"]
        measured = dict(zip(MOST_DRIFT, (self.results["unrelated"].kl, ratio), strict=True))
        above = [f"{measured[k]:.2g} {k} (above {most:g})" for k, most in MOST_DRIFT.items() if measured[k] > most]
        return f"drifts: unrelated text moves by {' and '.join(above)}" if above else None

    @property
    def kv_tokens(self) -> float | None:
        """Of how many tokens the KV cache takes as many bytes as the patch; None for a model without one."""
        arrays = (x for entry in self.patch.entries for x in vars(entry.delta).values() if isinstance(x, Tensor))
        return sum(x.numel() * x.element_size() for x in arrays) / self.cache_bytes if self.cache_bytes else None

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
        return [word(self.context.tokenizer, token) for token in self.context.lead]

    def answers(self) -> list[dict[str, Any]]:
        """What is said behind each query: with the context, from the compiled weights, without either.

        As many tokens as the set has of an answer, each model going on from its own, decoded; one token where it has none.
        """
        return [{"set": which} | row for which in ASKED if which in self.spoken for row in self.spoken[which].rows()]

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
            if name in self.spoken:
                for who, held in (("patched", found[name]), ("without_context", found[name]["unpatched"])):
                    held |= {"exact_match": self.spoken[name].same(who), "right": self.spoken[name].right(who)}
            else:
                found[name] |= self.apart[name].to_dict()
        return found | {
            "tokens": self.tokens, "context_tokens": len(self.context.tokens), "answer_tokens": self.answer_tokens,
            "first_tokens": self.first_tokens, "anchor": self.context.anchored, "exact": self.exact, "certificate": certificate,
            "tried": [attempt.to_dict() for attempt in solution.attempts], "first_token_kept": solution.wish.pinned,
            "via": patch.report.via, "rank": rank_of(patch), "ridge": solution.ridge,
            "numbers": patch.numbers, "dense_numbers": patch.dense_numbers, "layers": _layers(patch), "answers": self.answers(),
            "seconds": self.seconds, "strength": solution.strength, "drift": self.drift,
            "drifts": self.drifts, "kv_tokens": self.kv_tokens, "controls": [arm.to_dict() for arm in self.arms],
            "moments_tokens": patch.moments.tokens if patch.moments is not None else None,
        }  # fmt: skip


def _layers(patch: ModelPatch) -> list[dict[str, Any]]:
    """Each layer's route (which resort a normalised output took) and how much it moved."""
    names = ("index", "route", "residual", "relative_changes")
    return [{name: row[name] for name in names} for row in patch.report.to_dict()["layers"]]
