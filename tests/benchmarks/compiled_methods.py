"""The methods without gradients: ours, and two approximate ones from the literature.  Each returns a model of its own.

exact       ``patch_model(scope="all")``: one set of weights, equal to the contextual model on the queries
ridge       the same problem as a fit, with a penalty on the change, and a rank
down alone  ridge on each down projection, layer by layer, nothing else moves
mean        the patches of the single tokens, averaged
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from compiled_sets import Task
from torch import Tensor

import controllability as ct
from controllability.arrays import arithmetic
from controllability.compiling.token_sets import padded, positions
from controllability.solvers.secular import secular


def one_set_of_weights(model: Any, task: Task, **options: Any) -> Any:
    """Ours: exact, or a fit with ``ridge`` or ``rank``.  A new model object: reading and checking it is part of the work."""
    changed = copy.deepcopy(model)
    ct.patch_model(
        changed, padded(task.queries, "target"), padded(task.queries, "source"), scope="all",
        positions=positions(task.queries), **options,
    ).merge(changed)  # fmt: skip
    return changed


@torch.no_grad()
def mean_of_token_patches(model: Any, task: Task) -> Any:
    """Every token's own patch, as ``scope="each"`` makes it; their mean, added to the weights."""
    changed, sums, tokens = copy.deepcopy(model), {}, 0
    for sample in task.queries:
        mp = ct.patch_model(
            model, padded([sample], "target"), padded([sample], "source"), positions=positions([sample])
        )
        for entry in mp.entries:
            own = entry.delta.row(slice(sample.first, None)).dense().sum(0)  # the first token's patch is zero
            sums[entry.param.name] = sums.get(entry.param.name, 0) + own
        tokens += len(sample.source) - sample.first
    for name, total in sums.items():
        changed.get_parameter(name).add_(total / tokens)
    return changed


@torch.no_grad()
def ridge_on_down_alone(model: Any, task: Task, ridge: float) -> Any:
    """Gemma 3: min Σ_t ‖(W + ΔW) h_t − y*_t‖²/‖h_t‖² + ``ridge`` ‖ΔW‖², each layer on top of the patched ones before it.

    y* is the nearest that the layer's output can come to the contextual one while the scale of the norm behind W stays.
    One pass with the context and one without; ΔW is written while the second runs.
    """
    changed = copy.deepcopy(model)
    source, target = padded(task.queries, "source"), padded(task.queries, "target")
    there = positions(task.queries)[1]
    used = source.get("attention_mask", torch.ones_like(source["input_ids"])).bool()
    wanted: list[Tensor] = []
    reads: dict[str, Tensor] = {}

    def solve(layer: Any, hidden: Tensor, goal: Tensor) -> None:
        weight, norm = layer.mlp.down_proj.weight, layer.post_feedforward_layernorm
        present = hidden @ weight.double().T
        unit = secular(arithmetic(goal), goal, 1 + norm.weight.double(), torch.ones_like(goal[:, :1]))[1]
        gap = unit * present.square().mean(-1, keepdim=True).add(norm.eps).sqrt() - present
        size = hidden.norm(dim=-1, keepdim=True)
        rows = hidden / size
        gram = rows @ rows.T + ridge * torch.eye(len(rows), dtype=rows.dtype)
        weight.add_((torch.linalg.solve(gram, gap / size).T @ rows).to(weight.dtype))

    def before_down(layer: Any, inner: Tensor, output: Tensor) -> None:
        solve(layer, inner[used].double(), output[:, there][used].double() - reads["v"])

    def before_norm(norm: Any, args: Any) -> None:
        reads["v"] = args[0][used].double()

    hooks = [layer.register_forward_hook(lambda _, args, output: wanted.append(output)) for layer in model.model.layers]
    model(**target, use_cache=False)
    for layer, output in zip(changed.model.layers, wanted, strict=True):
        hooks.append(layer.pre_feedforward_layernorm.register_forward_pre_hook(before_norm))
        hooks.append(
            layer.mlp.down_proj.register_forward_pre_hook(
                lambda _, args, layer=layer, output=output: before_down(layer, args[0], output)
            )
        )
    changed(**source, use_cache=False)
    for hook in hooks:
        hook.remove()
    return changed
