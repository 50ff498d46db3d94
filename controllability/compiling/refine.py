"""A fit gone on with by a few gradient steps, in coordinates in which ordinary text feels every direction alike.  (new)

What one layer asks for in closed form is what it lacks by itself; the queries' loss sees all layers at once.  What is kept of the closed
form: where each change reads (its right factors), and the exact price of it, tr(ΔW C ΔWᵀ).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from controllability.compiling.token_sets import batches
from controllability.compiling.yardstick import Yardstick, run
from controllability.deltas import LowRank
from controllability.errors import BadInput
from controllability.models.hooks.shards import sharded
from controllability.models.model_patch import ModelPatch
from controllability.models.patches.applier import Entry
from controllability.models.sweep.target_run import Progress

PRICE = 30.0  # of what ordinary text feels of all maps together, beside the queries' mean KL in nats
FLOOR = 0.03  # of the mean square of what a map reads, that a direction counts of which the texts say nothing
RATE = 0.1  # of the mean size of a map's left factors, the first step; it falls to 0

Factors = dict[str, tuple[Tensor, Tensor]]  # parameter -> left (k, out), right (k, in)


def refined(model: Any, queries: Yardstick, patch: ModelPatch, steps: int, progress: Progress) -> ModelPatch:
    """``patch`` after ``steps`` steps of Adam down the queries' mean KL + ``PRICE`` · Σ tr(ΔW C ΔWᵀ)/tr(W C Wᵀ).

    Three passes over the queries a step.  Raises ``BadInput`` where it moves more than plain matrices.
    """
    if sharded(model):
        raise BadInput(
            "refine runs gradients through the model, which is not done for one that is split over devices: leave refine at 0"
        )
    factors = {entry.param.name: _whitened(patch, entry) for entry in patch.entries}
    price = {name: PRICE / _felt(model, patch, name) for name in factors}
    with torch.enable_grad():
        left = {name: pair[0].requires_grad_() for name, pair in factors.items()}
        rates = [{"params": [x], "lr": RATE * float(x.detach().square().mean().sqrt())} for x in left.values()]
        descent = torch.optim.Adam(rates, betas=(0.9, 0.99))
        falling = torch.optim.lr_scheduler.LambdaLR(descent, lambda step: 1 - step / steps)
        for step in range(steps):
            found = _gradients(model, queries, factors, left)
            for name, x in left.items():
                x.grad = found[name] + 2 * price[name] * x.detach()
            descent.step()
            falling.step()
            progress("refining the fit", step + 1, steps)
    entries = tuple(_moved(entry, *factors[entry.param.name]) for entry in patch.entries)
    fit = (patch.report.fit or {}) | {"refined": steps}
    numbers = sum(entry.delta.numbers for entry in entries)
    changed = {"entries": entries, "output": None, "report": replace(patch.report, fit=fit, numbers=numbers)}
    return ModelPatch.of(ModelPatch(**(vars(patch) | changed)))


def _metric(patch: ModelPatch, name: str) -> Tensor:
    """C of mean diagonal 1, with a floor."""
    C = patch.metrics[name].second.float()
    return C * (len(C) / C.diagonal().sum()) + FLOOR * torch.eye(len(C), device=C.device)


def _whitened(patch: ModelPatch, entry: Entry) -> tuple[Tensor, Tensor]:
    """ΔW = leftᵀ right with right C rightᵀ = I: directions that it does not read apart are one."""
    delta = entry.delta
    if type(delta) is not LowRank or delta.transposed or entry.param.index or entry.param.name not in patch.metrics:
        raise BadInput(f"refine serves changes of plain matrices; {entry.param} is none: leave refine at 0")
    left, right = (x.reshape(-1, x.shape[-1]).float() for x in (delta.left, delta.right))
    B = _metric(patch, entry.param.name).to(right.device)
    sizes, turn = torch.linalg.eigh((right @ B @ right.mT).double())
    kept = sizes > 1e-7 * sizes.max()
    turn, roots = turn[:, kept].float(), sizes[kept].sqrt().float()[:, None]
    return roots * (turn.mT @ left), (turn.mT @ right) / roots


def _felt(model: Any, patch: ModelPatch, name: str) -> float:
    """tr(W C Wᵀ): what ordinary text makes of the map itself."""
    W = model.get_parameter(name).detach().float()
    return float((W @ _metric(patch, name).to(W) * W).sum())


@contextmanager
def _attached(model: Any, factors: Factors, left: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with the changes beside its maps."""

    def beside(name: str) -> Any:
        return lambda _, x, y: y + ((x[0] @ factors[name][1].mT.to(x[0])) @ left[name].to(x[0])).to(y.dtype)

    hooks = [model.get_submodule(n.removesuffix(".weight")).register_forward_hook(beside(n)) for n in factors]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _gradients(model: Any, queries: Yardstick, factors: Factors, left: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the mean KL over the queries' tokens, each sample by its weight; batch by batch."""
    wanted = dict(zip(map(id, queries.samples), queries.wanted, strict=True))
    whole = sum(sample.weight * len(wanted[id(sample)]) for sample in queries.samples)
    found = {name: torch.zeros_like(x) for name, x in left.items()}
    for batch in batches(queries.samples, "source"):
        with _attached(model, factors, left):
            logits = run(model, batch, "source")
            loss = logits.new_zeros((), dtype=torch.float32)
            for i, sample in enumerate(batch):
                log = logits[i, sample.rows("source", queries.known)].float().log_softmax(-1)
                goal = wanted[id(sample)].to(log).log_softmax(-1)
                loss = loss + sample.weight / whole * torch.nn.functional.kl_div(
                    log, goal, reduction="sum", log_target=True
                )
            for name, gradient in zip(left, torch.autograd.grad(loss, [*left.values()]), strict=True):
                found[name] += gradient
    return found


def _moved(entry: Entry, left: Tensor, right: Tensor) -> Entry:
    """The entry with its new factors, shaped as they were."""
    delta = entry.delta
    assert isinstance(delta, LowRank)
    shape = delta.left.shape[:-2]
    parts = {"left": left.detach(), "right": right}
    return replace(
        entry, delta=replace(delta, **{k: v.reshape(*shape, *v.shape).to(delta.left.dtype) for k, v in parts.items()})
    )
