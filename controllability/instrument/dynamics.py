"""How the patch grows with its context: the size and direction of each step, beside a step of gradient descent on the same text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from controllability.errors import BadInput, in_a_line
from controllability.instrument.attribution import Attribution, attribute, increments, sizes
from controllability.instrument.chunks import Reading, Rule
from controllability.models.hooks.carried_patches import uncompiled
from controllability.models.hooks.own_modes import own_modes
from controllability.models.reading.logits import result_of
from controllability.models.sweep.target_run import Progress, silent
from controllability.rendering.figure import Lines, Panel
from controllability.rendering.study import Study


@dataclass(frozen=True, eq=False, repr=False)
class Dynamics(Study):
    """A patch as its context grows by one of n chunks after the other; tensors in float64, a row for each of L ``layers``.

    ``norms`` (L, n): ‖ΔW_{i+1} − ΔW_i‖ of the layer's matrices as one vector.  ``cosines`` (L, n − 1): between consecutive increments.
    ``loss`` (n + 1): −log p of the answer by the patched model; for order "backward" by the plain model behind the chunks that are left.
    ``gradient_cosines`` (L, n): between an increment and −∇L, the step of plain fine-tuning: L is the mean cross-entropy of the chunk's tokens behind the first tokens
    of any text (where there are none, a single token behind the one before it), at the unpatched weights.  ``steps`` (L, n): the η with which −η∇L
    comes next to the increment, negative where it points the other way.  Both are None where no gradients were asked for, NaN where a
    chunk has nothing to predict.  ``attribution`` has the chunks and what else was found on the way.
    """

    attribution: Attribution
    layers: tuple[int, ...]
    norms: Tensor
    cosines: Tensor
    loss: Tensor
    gradient_cosines: Tensor | None
    steps: Tensor | None
    title = "How the patch grows with its context"

    def records(self) -> list[dict[str, Any]]:
        found = {"norm": self.norms, "cosine_to_last": nn.functional.pad(self.cosines, (1, 0), value=torch.nan)}
        if self.gradient_cosines is not None and self.steps is not None:
            found |= {"cosine_to_gradient": self.gradient_cosines, "step": self.steps}
        return [
            {"layer": layer, "chunk": i, "text": chunk.text, "loss": float(self.loss[i + 1])}
            | {name: float(held[row, i]) if bool(held[row, i].isfinite()) else None for name, held in found.items()}
            for i, chunk in enumerate(self.attribution.chunks)
            for row, layer in enumerate(self.layers)
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        seen = self.attribution
        return {
            "answer": seen.answer,
            "order": seen.order,
            "loss": self.loss.tolist(),
            "rows": self.records(),
            "notes": seen.notes,
        }

    def below(self) -> str:
        loss = f"loss {self.loss[0]:.2f} at the start, {self.loss[-1]:.2f} at the end"
        return "\n".join(
            [f"answer {self.attribution.answer!r}, order {self.attribution.order}: {loss}", *self.attribution.notes]
        )

    def panels(self) -> Sequence[Panel]:
        by_layer = lambda held: {f"layer {n}": row for n, row in zip(self.layers, held.tolist(), strict=True)}  # noqa: E731
        along, count = "chunks of the context", self.norms.shape[1]
        panels = [
            Lines("size of each step", along, "‖ΔW_{i+1} − ΔW_i‖", range(1, count + 1), by_layer(self.norms)),
            Lines("consecutive steps", along, "cosine", range(2, count + 1), by_layer(self.cosines)),
            Lines("loss", along, "−log p of the answer", range(count + 1), {"loss": self.loss.tolist()}),
        ]
        if self.gradient_cosines is None:
            return panels
        return [
            *panels,
            Lines("each step and −∇L", along, "cosine", range(1, count + 1), by_layer(self.gradient_cosines)),
        ]


def dynamics(
    model: nn.Module, tokenizer: Any, context: str, query: str, chunks: Rule = "token", order: str = "forward",
    gradients: bool = True, progress: Progress = silent, **options: Any,
) -> Dynamics:  # fmt: skip
    """The curve of a patch as its context grows, token by token or demonstration by demonstration.

    The arguments are those of ``attribute``, ``options`` its ``answer``, ``token``, ``via``, ``route`` and ``place``; ``order`` is "forward" or "backward" [arXiv
    2507.16003], and ``gradients`` False leaves the gradient steps out (a run forwards and backwards over each chunk).  The model is left as it was.
    Raises ``BadInput``, and what ``patch_model`` raises.  Source: theory 10.

    >>> import controllability as ct
    >>> model, tokenizer = ct.load_model("embedded")
    >>> curve = ct.dynamics(model, tokenizer, "Mia lives in Oslo . Leo lives in Rome .", "Where does Leo live ?")
    >>> curve.norms.shape, bool(curve.loss[-1] < 0.1 < curve.loss[0])
    (torch.Size([3, 10]), True)
    """
    if order not in ("forward", "backward"):
        raise BadInput(f"order: choose forward or backward, got {order!r:.80}")
    seen = attribute(model, tokenizer, context, query, chunks, order, ablations=0, progress=progress, **options)
    layers = tuple(sorted({*seen.layers}))
    steps = {
        layer: {name: increments(seen.solved.rows(seen.paths[0], name)) for name in seen.matrices(layer)}
        for layer in layers
    }
    norms, cosines = [], []
    for own in steps.values():
        norm = torch.stack([sizes(each) ** 2 for each in own.values()]).sum(0).sqrt()
        pairs = [
            [each.row(part).mapped(lambda held: held[:, None]) for part in (slice(0, -1), slice(1, None))]
            for each in own.values()
        ]
        inner = torch.stack([earlier.products(later)[:, 0, 0] for earlier, later in pairs]).sum(0)
        norms.append(norm)
        cosines.append(inner / (norm[:-1] * norm[1:]))
    found = torch.stack(norms)
    beside = (None, None)
    if gradients:
        with own_modes(model := uncompiled(model)):
            beside = _gradients(model, seen, steps, found, progress)
    return Dynamics(seen, layers, found, torch.stack(cosines), -seen.logprobs[0], *beside)


def _gradients(
    model: nn.Module, seen: Attribution, steps: dict[int, dict[str, Any]], norms: Tensor, progress: Progress
) -> tuple[Tensor, Tensor]:
    """(cosines, steps), (L, n) each: the increments beside −∇L of each chunk."""
    params = {name: seen.solved.params[name] for own in steps.values() for name in own}
    inner, size = torch.zeros(2, *norms.shape, dtype=torch.float64)
    for i in range(len(seen.chunks)):
        progress("gradients", i, len(seen.chunks))
        found = _gradient(model, seen.solved.reading, i, {param.name for param in params.values()})
        for row, own in enumerate(steps.values()):
            for name, each in own.items():
                down = -found[params[name].name][params[name].index].double().cpu()
                inner[row, i] += (each.row(i).dense() * down).sum()
                size[row, i] += down.square().sum()
    progress("gradients", len(seen.chunks), len(seen.chunks))
    return inner / (norms * size.sqrt()), inner / size


def _gradient(model: nn.Module, reading: Reading, chunk: int, names: set[str]) -> dict[str, Tensor]:
    """∇L of the parameters by name, at the model's own weights; 0 where the chunk has nothing to predict."""
    leaves = {name: model.get_parameter(name).detach() for name in names}
    tokens = reading.chunks[chunk].tokens
    before = (
        reading.ids[: reading.lead] or reading.ids[max(0, tokens.start - 1) : tokens.start if len(tokens) == 1 else 0]
    )
    ids = [*before, *reading.ids[tokens.start : tokens.stop]]
    if len(ids) < 2:
        return {name: torch.zeros_like(value) for name, value in leaves.items()}
    held = torch.tensor([ids], device=next(model.parameters()).device)
    with torch.enable_grad(), _differentiable():
        leaves = {name: value.requires_grad_() for name, value in leaves.items()}
        logits = result_of(functional_call(model, leaves, (), {"input_ids": held}))[0]
        first, wide = max(1, len(before)), torch.promote_types(logits.dtype, torch.float32)
        loss = nn.functional.cross_entropy(logits[first - 1 : -1].to(wide), held[0, first:])
        return dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()], materialize_grads=True), strict=True))


@contextmanager
def _differentiable() -> Iterator[None]:
    """Says which option leaves the gradient steps out where a forward overwrites what its gradient needs (RWKV's states)."""
    try:
        yield
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise BadInput(
            f"this model's own forward has no gradient ({in_a_line(error, 90)} …): leave the gradient steps out, gradients=False"
        ) from None
