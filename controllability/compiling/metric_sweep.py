"""One set of weights that carries a context over to other wordings and leaves other text alone: a fit in the metric of ordinary text.

Layer by layer, on the run that is patched so far, each map in the layers of a ``Strength`` is asked for what its layer lacks of the
contextual model's state (theory 7).  The first token is held where it is: every text begins with it, and much attention rests on it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from controllability.arrays.sharded import gathered
from controllability.compiling.strengths import Strength
from controllability.compiling.token_sets import Prefix, Sample, batches, padded, positions
from controllability.compiling.yardstick import Yardstick, run
from controllability.deltas import LowRank
from controllability.errors import BadInput
from controllability.interfaces import FitRows, JointOptions
from controllability.models.hooks.shards import sharded
from controllability.models.model_patch import ModelPatch
from controllability.models.moments import Moments
from controllability.models.patches.applier import Entry
from controllability.models.patches.solve import solve
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.sweep.shared_past import SharedPast
from controllability.models.sweep.target_run import Progress

PRICE = 30.0  # of what ordinary text feels of all maps together, beside the queries' mean KL in nats
FLOOR = 0.03  # of the mean square of what a map reads, that a direction counts of which the texts say nothing
RATE = 0.1  # of the mean size of a map's left factors, the first step; it falls to 0

Factors = dict[str, tuple[Tensor, Tensor]]  # parameter -> left (k, out), right (k, in)


def refined(model: Any, queries: Yardstick, patch: ModelPatch, steps: int, progress: Progress) -> ModelPatch:
    """``patch`` after ``steps`` steps of Adam down the queries' mean KL + ``PRICE`` · Σ tr(ΔW C ΔWᵀ)/tr(W C Wᵀ).

    What one layer asks for in closed form is what it lacks by itself; the queries' loss sees all layers at once.  Kept of the closed
    form are where each change reads (its right factors), and the exact price of it.  Three passes over the queries a step.  Raises
    ``BadInput`` where it moves more than plain matrices.  (new)
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
                kl = torch.nn.functional.kl_div(log, goal, reduction="sum", log_target=True)
                loss = loss + sample.weight / whole * kl
            for name, gradient in zip(left, torch.autograd.grad(loss, [*left.values()]), strict=True):
                found[name] += gradient
    return found


def _moved(entry: Entry, left: Tensor, right: Tensor) -> Entry:
    """The entry with its new factors, shaped as they were."""
    delta = entry.delta
    assert isinstance(delta, LowRank)
    shape = delta.left.shape[:-2]
    moved = (v.reshape(*shape, *v.shape).to(delta.left.dtype) for v in (left.detach(), right))
    return replace(entry, delta=replace(delta, **dict(zip(("left", "right"), moved, strict=True))))


FIRST = 10.0  # how many tokens' weight the first ones have together
EVEN = 0.1  # of the mean gap, that a token counts where the context changes nothing


def fitted(
    model: Any, queries: Yardstick, strength: Strength, rank: int | None, moments: Moments | None, progress: Progress,
    past: SharedPast | None = None, place: str | None = None,
) -> ModelPatch:  # fmt: skip
    """The patch.  ``rank`` bounds the rank of every ΔW; ``past`` is the context, run already."""
    samples, device = queries.samples, next(model.parameters()).device
    target, source = (padded(samples, side, device=device) for side in ("target", "source"))
    layers = strength.layers(len(checked_reading(model, place=place).reading.layers))
    joint = JointOptions(rank=rank, damping=strength.damping, rows=fit_rows(queries, strength), layers=layers)
    record = solve(
        model, target, source, "all", "output", "auto", positions(samples), progress, joint, moments, past, place,
    )  # fmt: skip
    patch = ModelPatch.of(record)
    return refined(model, queries, patch, strength.refine, progress) if strength.refine else patch


def drifts(model: Any, patch: ModelPatch) -> dict[str, float]:
    """√(tr(ΔW C ΔWᵀ)/tr(W C Wᵀ)), exact: how much ordinary text feels the change of each map, beside what the map gives there."""
    found = {}
    for entry in patch.entries:
        metric, delta = patch.metrics.get(entry.param.name), entry.delta
        if metric is None or type(delta) is not LowRank or entry.param.index:
            continue
        W = gathered(model.get_parameter(entry.param.name).detach()).float()
        W = W.mT if delta.transposed else W
        C, left, right = metric.second.to(W), delta.left.to(W), delta.right.to(W)
        change = ((left @ left.mT).double() * (right @ C @ right.mT).double()).sum()
        whole = (W @ C * W).sum(dtype=torch.float64)
        found[entry.param.name] = float((change.clamp_min(0) / whole).sqrt())
    return found


def fit_rows(queries: Yardstick, strength: Strength) -> FitRows:
    """How every token of every sample counts: by the KL that the context makes there, and a little anyway.

    One that begins several samples counts where it comes first.  The first ones stay, with the weight of ``FIRST`` mean tokens in all.
    """
    samples, gaps = queries.samples, [gap.kl for gap in queries.gaps]
    mean = float(torch.cat(gaps).mean()) or 1.0
    seen: set[Prefix] = set()
    firsts = {prefix for sample in samples for prefix in sample.prefixes() if len(prefix) <= sample.first}
    held = {p for s, hard in zip(samples, hard_ones(samples, strength), strict=True) if hard for p in s.prefixes()}
    weights, hard = [], []
    for sample, gap in zip(samples, gaps, strict=True):
        own = [0.0] * sample.first + [(float(kl) / mean + EVEN) * sample.weight for kl in gap]
        for prefix, weight in zip(sample.prefixes(), own, strict=True):
            weight = FIRST * (1 + EVEN) / len(firsts) if prefix in firsts else weight
            weights.append(0.0 if prefix in seen else weight)
            hard.append(prefix in held and prefix not in firsts)
            seen.add(prefix)
    stay = [len(prefix) <= sample.first for sample in samples for prefix in sample.prefixes()]
    return FitRows(tuple(weights), tuple(stay), tuple(hard) if any(hard) else None)


def hard_ones(samples: Sequence[Sample], strength: Strength) -> list[bool]:
    """Which queries the last block reaches exactly, where no norm stands behind its map: those that say so, or else all.

    A strength whose last layers do not close what the others leave has those alone that say so.
    """
    said = [sample.hard for sample in samples]
    return said if any(said) or not strength.closing else [True] * len(said)
