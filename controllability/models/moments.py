"""Second moments of what every matrix of a model reads on ordinary text: the metric in which other inputs feel a patch least.

Source: theory 7; the metric is that of ROME and MEMIT [Meng et al.].
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from architectures.reading import Layer, Reading, Tap
from controllability.deltas import LowRank
from controllability.errors import BadInput
from controllability.interfaces import Path, node, updates_of
from controllability.models.hooks.layer_hooks import LayerHooks, LayerListener
from controllability.models.hooks.own_modes import own_modes
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.inputs import refuse_bad_inputs, refuse_malformed, without_cache
from controllability.models.tokens import with_special
from controllability.solvers.metric_fit import NO_MOMENTS, Drift

SHRINK = 0.1  # weight of the identity in Σ: no direction of which the texts say nothing is free


@dataclass(frozen=True, eq=False)
class Metric:
    """Σ = (1 − a)·C·n/tr C + a·I of what one matrix reads; ΔW solved for L⁻¹x, with Σ = LLᵀ, has the least tr(ΔW Σ ΔWᵀ)."""

    second: Tensor  # C (n, n)

    @cached_property
    def factor(self) -> Tensor:
        """L (n, n), lower triangular, float64."""
        C = self.second.double()
        scaled = C * ((1 - SHRINK) * len(C) / C.diagonal().sum())
        factor, failed = torch.linalg.cholesky_ex(scaled + SHRINK * torch.eye(len(C), dtype=C.dtype, device=C.device))
        if failed:
            raise BadInput(NO_MOMENTS)
        return factor

    @property
    def drift(self) -> Drift:
        """How much the texts feel a change of the matrix."""
        return self._drift

    @cached_property
    def _drift(self) -> Drift:
        return Drift(self.second.double().cpu().numpy())

    def seen(self, x: Tensor) -> Tensor:
        """L⁻¹x for rows x (…, n), in float64."""
        factor = self.factor.to(x.device)
        rows = x.double().reshape(-1, x.shape[-1])
        return torch.linalg.solve_triangular(factor, rows.mT, upper=False).mT.reshape(x.shape)

    def back(self, change: LowRank, like: Tensor) -> LowRank:
        """ΔW that reads x, from the one that reads L⁻¹x; in the precision of ``like``."""
        right = change.right.reshape(-1, change.right.shape[-1]).double()
        found = torch.linalg.solve_triangular(self.factor.to(right.device), right, upper=False, left=False)
        return replace(change, left=change.left.to(like.dtype), right=found.reshape(change.right.shape).to(like.dtype))


@dataclass(frozen=True, eq=False)
class Moments:
    """C = E[x xᵀ] of every matrix that a patch may move, by the parameter's name; each token counts by the direction it reads.

    So a few tokens of massive activations (attention sinks) do not count for all others.  ``tokens`` says over how many.
    """

    metrics: Mapping[str, Metric]
    tokens: int

    def refuse_other(self, reading: Reading) -> None:
        """Raise ``BadInput`` unless these are moments of this model's matrices."""
        for layer in reading.layers:
            for name in (name for tap in layer.taps for path in tap.paths for name in matrices(layer, path)):
                width = layer.params[name].shape
                metric = self.metrics.get(name)
                if metric is None or metric.second.shape not in [(n, n) for n in width]:
                    raise BadInput(f"moments: there are none that fit {name}: they are of another model")
                finite = bool(metric.second.sum().isfinite())
                if not finite or not float(metric.second.diagonal().sum()) > 0:
                    raise BadInput(f"moments: those of {name} are zero or not finite: make them anew on other texts")

    def __repr__(self) -> str:
        return f"Moments({len(self.metrics)} matrices, {self.tokens} tokens)"


def second_moments(
    model: nn.Module,
    texts: Iterable[Any],
    tokenizer: Any = None,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Moments:
    """C = E[x xᵀ]/‖x‖² of what the matrices of the feed-forward halves read on ``texts``; for ``patch_model(..., moments=)``.

    ``texts``: strings (then ``tokenizer`` is needed), token ids (T,) or (B, T), or keyword arguments of the model's forward.
    Some thousand tokens are needed, more than the widest matrix reads numbers.  Raises ``BadInput`` for texts that cannot be read, or none.
    Source: theory 7.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1)
    >>> model = LlamaForCausalLM(config).eval()
    >>> moments = second_moments(model, [torch.arange(40), torch.arange(9, 29)])
    >>> moments
    Moments(6 matrices, 60 tokens)
    >>> ids = torch.arange(5, 17)[None]
    >>> source = {"input_ids": ids[:, -3:], "position_ids": torch.arange(9, 12)[None]}
    >>> from controllability import patch_model
    >>> mp = patch_model(model, {"input_ids": ids}, source, scope="last", moments=moments)
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise BadInput(f"second_moments: give a list of texts, got {type(texts).__name__}")
    runs = [_inputs(text, tokenizer) for text in texts]
    for inputs in runs:
        refuse_malformed(inputs, "second_moments")
    if not runs:
        raise BadInput("second_moments: no texts were given")
    with own_modes(model):
        checked = checked_reading(model, runs[0])
        for inputs in runs:
            refuse_bad_inputs(model, checked, inputs, "second_moments")
        layers = checked.reading.layers
        listeners = [_Listener(layer) for layer in layers]
        tokens = 0
        with LayerHooks(model, checked.reading) as hooks, torch.inference_mode():
            for number, inputs in enumerate(runs):
                mask = inputs.get("attention_mask")
                for listener in listeners:
                    listener.valid = None if mask is None else mask.bool()
                hooks.run(listeners, without_cache(model, inputs))
                tokens += sum(int(listener.rows) for listener in listeners[:1])
                progress("second moments", number + 1, len(runs))
        metrics = {name: Metric(sums.clone()) for listener in listeners for name, sums in listener.sums.items()}
    if not tokens:
        raise BadInput("second_moments: all tokens of the texts are padding")
    return Moments(metrics, tokens)


def _inputs(text: Any, tokenizer: Any) -> Mapping[str, Any]:
    if isinstance(text, str):
        if tokenizer is None:
            raise BadInput("second_moments: texts that are strings need tokenizer=")
        text = torch.tensor([with_special(tokenizer, text)[0]])
    if isinstance(text, Tensor):
        return {"input_ids": text if text.ndim > 1 else text[None]}
    if not isinstance(text, Mapping):
        raise BadInput(f"second_moments: give strings, token ids or inputs of the model, got {type(text).__name__}")
    return text


class _Listener(LayerListener):
    """Adds up, layer by layer, the directions that the matrices read."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.sums: dict[str, Tensor] = {}
        self.valid: Tensor | None = None
        self.rows = 0  # tokens of the last run
        # what the last tap read, and its moment: gate and up read the same
        self._read: tuple[Any, Tensor] | None = None

    def begins(self) -> None:
        self._read = None

    def entering(self, index: int, value: Tensor) -> None:
        self.rows = int(self.valid.sum()) if self.valid is not None else value.shape[0] * value.shape[1]

    def leaving(self, value: Tensor) -> None:
        self._read = None

    def computed(self, tap: Tap, x: Tensor, y: Tensor) -> None:
        names = [name for path in tap.paths for name in matrices(self.layer, path)]
        if not names or x.ndim != 3:
            return
        if self._read is None or self._read[0] is not x:
            rows = x[self.valid] if self.valid is not None else x.reshape(-1, x.shape[-1])
            units = torch.nn.functional.normalize(rows.float(), dim=-1)
            self._read = x, units.mT @ units
        for name in names:
            held = self.sums.get(name)
            self.sums[name] = self._read[1].clone() if held is None else held.add_(self._read[1])


def matrices(layer: Layer, path: Path) -> list[str]:
    """The full names of the matrices that the leaf at ``path`` can be moved by, experts' own ones left out."""
    updates = updates_of(node(layer.block, path), "input", "output")
    return list(dict.fromkeys(update.param.name for update in updates if update.kind == "linear"))
