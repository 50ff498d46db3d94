"""Section 4 of [G]: the same prompts and tokens on every route.  Intervals and sensitivity are new."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from controllability.errors import BadInput, ControllabilityError, Overflow
from controllability.models.generation.generate import generate
from controllability.models.generation.steps import Generation
from controllability.models.patch_model import patch_model
from controllability.models.reading.tolerances import VERIFIED
from controllability.models.sweep.report import Sensitivity
from controllability.models.sweep.target_run import Progress, silent

EVERY = 10  # the sensitivity is measured on every tenth token of a prompt, from the first
TAKEN = ("agreement", "kl_max", "tv_max", "max_logit_error", "max_logit_error_unpatched", "relative_error")
COUNTED = (
    "agreement_interval", "agreement_unpatched", "mismatches", "explained", "sensitivity", "sensitivity_median", "kl_by_token",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Row:
    """One route in one dtype: the generation and sensitivity ratios of some of its tokens, or why it was ``refused``."""

    dtype: str
    route: str
    generation: Generation | None = None
    ratios: tuple[float, ...] = ()
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; what a refused row lacks is None.

        ``agreement_interval`` is Clopper–Pearson's of 95 %; ``explained`` counts mismatches whose two best logits are closer than
        twice an error that rounding explains; ``sensitivity`` is the largest ratio; ``kl_by_token`` the largest of the prompts.
        """
        from scipy.stats import binomtest

        row: dict[str, Any] = {"dtype": self.dtype, "route": self.route, "tokens": 0}
        row |= {**dict.fromkeys((*TAKEN, *COUNTED)), "refused": self.refused}
        if (done := self.generation) is None:
            return row
        active = torch.stack([step.active for step in done.steps])
        alone = torch.stack([step.target == step.unpatched for step in done.steps])[active]
        steps = [(done.steps[t], b) for t, b in done.mismatches]
        allowed = VERIFIED[getattr(torch, self.dtype)]  # a tie within an error that is no rounding explains nothing
        interval = binomtest(len(alone) - len(steps), len(alone)).proportion_ci(0.95)
        ratios = sorted(self.ratios) or [None]
        return row | {name: getattr(done, name) for name in TAKEN} | {
            "tokens": len(alone), "agreement_interval": [float(interval.low), float(interval.high)],
            "agreement_unpatched": float(alone.double().mean()), "mismatches": len(steps),
            "explained": sum(bool(step.near_tie[b]) and float(step.relative_error[b]) <= allowed for step, b in steps),
            "sensitivity": ratios[-1], "sensitivity_median": ratios[len(ratios) // 2],
            "kl_by_token": [float(step.kl.max()) for step in done.steps],
        }  # fmt: skip


def run_protocol(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 20,
    routes: Sequence[str] = ("auto",), progress: Progress = silent, place: str | None = None,
) -> Iterator[Row]:  # fmt: skip
    """A row for each route as it is done, in the dtype of the model; ``input_ids`` (B, L) and the mask as in ``generate``.

    A route that does not exist on these numbers, and a model that overflows, are rows too.  Raises ``BadInput`` for prompts
    that cannot be run.

    >>> from controllability.models.loading import load_model
    >>> model, tokenizer = load_model("embedded")
    >>> ids = tokenizer("Mia lives in Oslo . Where does Mia live ?", return_tensors="pt")["input_ids"]
    >>> done, refused = run_protocol(model, ids, max_new_tokens=2, routes=["auto", "ball"])
    >>> done.generation.agreement, done.to_dict()["sensitivity"] < 4, "image of the norm" in refused.refused
    (1.0, True, True)
    """
    dtype, total = str(next(model.parameters()).dtype).removeprefix("torch."), len(routes) * max_new_tokens
    for i, route in enumerate(routes):
        tell = lambda _, tokens=count(i * max_new_tokens + 1): progress(dtype, next(tokens), total)  # noqa: E731, B008
        try:
            done = generate(model, input_ids, attention_mask, max_new_tokens, route=route, on_step=tell, place=place)
            yield Row(dtype, route, done, tuple(_ratios(model, done, place)))
        except ControllabilityError as refused:
            if isinstance(refused, BadInput) and not isinstance(refused, Overflow):
                raise
            yield Row(dtype, route, refused=" ".join(str(refused).split()))


def _ratios(model: nn.Module, done: Generation, place: str | None) -> list[float]:
    """The sensitivity ratios of the patches of every tenth token; a token on which it cannot be measured has none."""
    found = []
    for t in range(0, len(done.steps), EVERY):
        for b in done.steps[t].active.nonzero()[:, 0].tolist():
            end = done.sequences.shape[1] - len(done.steps) + t
            history = done.sequences[b : b + 1, end - int(done.steps[t].position[b]) - 1 : end]
            with suppress(ControllabilityError):
                found.append(sensitivity_of_token(model, history, route=done.route, place=place).ratio)
    return [ratio for ratio in found if ratio is not None]


def sensitivity_of_token(
    model: nn.Module, history: Tensor, route: str, via: str = "input-output", place: str | None = None
) -> Sensitivity:
    """Of the patch with which the last token of ``history`` (1, L) stands alone."""
    source = {"input_ids": history[:, -1:], "position_ids": torch.tensor([[history.shape[1] - 1]])}
    return patch_model(model, {"input_ids": history}, source, via=via, route=route, place=place).sensitivity
