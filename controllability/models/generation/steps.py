"""What patched generation found out, token by token."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from controllability.arrays import errors_and_sizes
from controllability.arrays.one_line import OneLine
from controllability.errors import BadInput, in_a_line
from controllability.models.reading.logits import compare_logits
from controllability.models.sweep.report import Layers


@dataclass(frozen=True, eq=False, repr=False)
class GeneratedToken(OneLine):
    """One generated token of every sample; tensors are (B,), one entry a sample.

    ``target``, ``patched`` and ``unpatched`` are the chosen token ids (the last is None without control);
    ``relative_error`` is max |patched − target| / max |target| over the logits, ``kl`` KL(target ‖ patched) in nats, ``tv`` the total
    variation, ``top1_gap`` the difference between the contextual model's two largest logits; ``near_tie`` says whether its two best
    scores (after the processors of logits) are closer than twice the largest error.  ``active`` says which samples had
    not ended before; the numbers of the others are 0.  ``seconds``: what the target's step and the sweep took.  ``layers``, where
    reports were asked for, are those of ``mp.report``; its tokens are the active samples, in order.
    """

    target: Tensor
    patched: Tensor
    unpatched: Tensor | None
    relative_error: Tensor
    max_logit_error: Tensor
    max_logit_error_unpatched: Tensor | None
    kl: Tensor
    tv: Tensor
    top1_gap: Tensor
    near_tie: Tensor
    active: Tensor
    position: Tensor
    seconds: dict[str, float]
    layers: Layers | None = field(default=None, repr=False)

    @property
    def agrees(self) -> Tensor:
        """Where both chose the same token: (B,) booleans."""
        return self.target == self.patched

    @property
    def explained(self) -> Tensor:
        """Where they agree, or the contextual model's two best tokens were a near-tie."""
        return self.agrees | self.near_tie

    def of(self, sample: int) -> dict[str, Any]:
        """One sample's numbers, ready for JSON."""
        return {name: value[sample].item() for name, value in vars(self).items() if isinstance(value, Tensor)}


def _largest(name: str, doc: str) -> property:
    """The largest number of that name over the tokens of all steps, as a float."""
    return property(lambda self: float(self._over_active(name).max()), doc=doc)


@dataclass(frozen=True, eq=False, repr=False)
class Generation(OneLine):
    """All steps.  ``sequences`` (B, L + N): the prompts, padded on the left, and the tokens that both went on with.

    A sample that ended is filled with padding; only its active steps count below.
    """

    sequences: Tensor
    prompt_lengths: Tensor
    steps: tuple[GeneratedToken, ...]
    route: str
    dtype: str

    def _over_active(self, name: str) -> Tensor:
        return torch.cat([getattr(step, name)[step.active] for step in self.steps])

    @property
    def agreement(self) -> float:
        """The share of tokens for which the patched model chose what the contextual one chose."""
        return float(self._over_active("agrees").double().mean())

    kl_max = _largest("kl", "The largest KL(contextual ‖ patched) of a token, in nats.")
    tv_max = _largest("tv", "The largest total variation between the two distributions of a token.")
    relative_error = _largest("relative_error", "The largest relative error of a token's logits.")
    max_logit_error = _largest("max_logit_error", "The largest error of a logit.")

    @property
    def max_logit_error_unpatched(self) -> float | None:
        """The same without patches; None when that was not run."""
        ran = self.steps[0].unpatched is not None
        return float(self._over_active("max_logit_error_unpatched").max()) if ran else None

    @property
    def mismatches(self) -> list[tuple[int, int]]:
        """(step, sample) of every token on which they disagree."""
        return [
            (t, b) for t, step in enumerate(self.steps) for b in range(len(step.target))
            if bool(step.active[b]) and not bool(step.agrees[b])
        ]  # fmt: skip

    @property
    def explained(self) -> bool:
        """Whether every disagreement is rounding: a gap of the two best tokens below twice the logit error."""
        return bool(self._over_active("explained").all())

    @property
    def seconds_per_token(self) -> dict[str, float]:
        """Median seconds of a step of the whole batch: the target's cached step, and the sweep that replaces it.

        The first step, in which the target reads the prompt, is left out where there are others.  Where both are done in
        one pass, each is given half of it.
        """
        steps = self.steps[1:] or self.steps
        return {name: float(torch.tensor([s.seconds[name] for s in steps]).median()) for name in ("target", "patched")}

    def tokens(self, sample: int = 0) -> list[dict[str, Any]]:
        """One sample's steps up to its end, ready for JSON."""
        return [step.of(sample) for step in self.steps if bool(step.active[sample])]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: every sample's tokens and the summary."""
        return {
            "samples": [self.tokens(b) for b in range(len(self.prompt_lengths))], "agreement": self.agreement,
            "kl_max": self.kl_max, "tv_max": self.tv_max, "relative_error": self.relative_error, "max_logit_error": self.max_logit_error,
            "max_logit_error_unpatched": self.max_logit_error_unpatched, "seconds_per_token": self.seconds_per_token,
            "route": self.route, "dtype": self.dtype,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sampler:
    """How a token is chosen from logits: the user's processors, then the largest, or a draw.

    Every run has ``processors`` of its own, called once a step: some count their calls or keep a cache.
    """

    processors: Sequence[Any]
    do_sample: bool

    @staticmethod
    def of(processors: Any, do_sample: bool, runs: int, model: Any) -> "Sampler":
        """The caller's own processors for the first run, copies (but of the model) for the others; ``BadInput`` where that cannot be."""
        try:
            copies = [copy.deepcopy(processors, {id(model): model}) for _ in range(runs - 1)]
        except Exception as error:  # whatever the caller's own code holds
            raise BadInput(
                f"each run needs logits processors of its own, and these cannot be copied: {in_a_line(error)}"
            ) from None
        return Sampler([processors, *copies], do_sample)

    def among(self, input_ids: Tensor, *all_logits: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """A token (B,) from each of several logits (B, vocabulary), and the scores it was chosen by.

        Every draw is made with the same random numbers; the scores are in float32, as in transformers.
        """
        tokens, all_scores = [], []
        on_cuda = input_ids.device.type == "cuda"
        generator = torch.cuda.default_generators[input_ids.device.index] if on_cuda else torch.default_generator
        state = generator.get_state()
        for processors, logits in zip(self.processors, all_logits, strict=True):
            generator.set_state(state)  # a processor may draw too
            scores = processors(input_ids, logits.to(torch.float32, copy=True))
            drawn = torch.multinomial(scores.softmax(-1), 1)[:, 0] if self.do_sample else scores.argmax(-1)
            tokens.append(drawn)
            all_scores.append(scores)
        return tokens, all_scores


@torch.inference_mode(False)
@torch.no_grad()
def compared(
    input_ids: Tensor, target: Tensor, patched: Tensor, unpatched: Tensor | None, choice: Sampler, active: Tensor,
    position: Tensor, seconds: dict[str, float], layers: Layers | None = None,
) -> GeneratedToken:  # fmt: skip
    """The step in which the contextual model gave ``target`` and the patched one ``patched``.

    Logits have one row for each of the A active samples, (A, vocabulary); what is not active gets 0.
    """

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(len(active), *values.shape[1:]).index_put_((active,), values)

    given = [logits for logits in (target, patched, unpatched) if logits is not None]
    tokens, scores = choice.among(input_ids, *map(spread, given))
    found, best = compare_logits(patched, target), target.double().topk(2, -1).values
    numbers = {
        "relative_error": found.relative_errors, "max_logit_error": found.error, "kl": found.kl, "tv": found.tv,
        "top1_gap": best[:, 0] - best[:, 1],
    }  # fmt: skip
    off = None if unpatched is None else spread(errors_and_sizes(unpatched.double(), target.double())[0]).cpu()
    return GeneratedToken(
        target=tokens[0].cpu(), patched=tokens[1].cpu(), unpatched=None if off is None else tokens[2].cpu(),
        max_logit_error_unpatched=off,
        near_tie=_near_tie(scores[0], scores[1]).cpu(), active=active.cpu().clone(), position=position.cpu().clone(), seconds=seconds,
        layers=layers, **{name: spread(value).cpu() for name, value in numbers.items()},
    )  # fmt: skip


def _near_tie(target: Tensor, patched: Tensor) -> Tensor:
    """Whether the target's two best scores are closer than twice the largest error of a score, (B,) booleans."""
    best = target.topk(2, -1).values
    error = (patched - target).abs().nan_to_num(0, posinf=0).amax(-1)  # what a processor shut out has no score
    return best[:, 0] - best[:, 1] < 2 * error
