"""A patch as a LoRA adapter that a server takes: no norm moves, its rank is bounded, each server's rules are read against it.  (new)"""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from controllability.compiling.exact_or_ridge import rank_of
from controllability.compiling.strengths import STRENGTHS
from controllability.deltas import LowRank
from controllability.errors import NotVerified, PatchError
from controllability.interfaces import JointOptions
from controllability.models.files.folders import refuse_unusable, written
from controllability.models.files.peft_export import check_adapter, on_twin, twin
from controllability.models.files.peft_forms import forms_of, lora_factors, lora_tensors
from controllability.models.files.peft_import import CONFIG, MADE_FOR, PREFIX, TENSORS
from controllability.models.files.server_rules import VLLM_RANKS, refuse_rank, verdict
from controllability.models.hooks.carried_patches import uncompiled
from controllability.models.hooks.installation import HookStack
from controllability.models.hooks.own_modes import own_modes
from controllability.models.model_patch import ModelPatch
from controllability.models.moments import Moments, refuse_other_than_moments
from controllability.models.patches.solve import solve
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.heads import Result, Runs, compare_results, without_logits
from controllability.models.reading.inputs import without_cache
from controllability.models.reading.logits import result_of
from controllability.models.reading.positions import pair_positions
from controllability.models.sweep.target_run import silent
from controllability.models.transformers_parts import as_in_checkpoint


def export_servable(
    patch: ModelPatch, directory: str | Path, server: str, max_rank: int | None = None, model: nn.Module | None = None,
    moments: Moments | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write ``patch`` as an adapter for "vllm", "sglang" or "peft", started with ``max_rank`` (None: with what it needs).

    A patch that moves norms is fitted anew with every scale left alone, as the strength "balanced" does it (in the metric of ``moments``
    where there are some); a higher rank is cut, or fitted anew where that leaves less.  For the two servers experts get the keys of the base model's checkpoints.
    The real ``peft`` loads the adapter in its own layout, and is compared on every query.  What comes back is JSON-ready: "needed" is the
    rank before it was cut, "refitted" whether norms moved before, "kl" {model: {"mean", "worst_query"}} of the queries against the contextual
    model in nats, "verdicts" {server: {"accepted", "reasons", "flags"}}.

    Raises ``BadInput`` for an unknown server or a rank it does not have, ``PatchError`` as ``export_peft`` does and for what the server
    would refuse, ``NotVerified`` where PEFT gives something else; nothing is left behind then.  Source: new.

    >>> # ct.export_servable(compiled.patch, "adapter", "vllm", max_rank=16)["verdicts"]["vllm"]["accepted"]
    """
    refuse_rank(server, max_rank)
    refuse_unusable(Path(directory))
    patch.refuse_several("held by one adapter")
    model, lean = uncompiled(model if model is not None else patch.model()), patch
    patch.refuse_misuse(model)
    if not patch.inputs["target"]:
        raise PatchError("this patch has no queries to compare on: an adapter that was imported is served as it is")
    with own_modes(model), torch.no_grad():
        refuse_other_than_moments(moments)
        reading, moments = checked_reading(model, place=patch.report.place).reading, moments or patch.moments
        if moments is not None:
            moments.refuse_other(reading)
        if refitted := any(form.kind == "dense" for form in forms_of(model, patch.entries).values()):
            plan = STRENGTHS["balanced"]
            joint = JointOptions(damping=plan.damping, layers=plan.layers(len(reading.layers)))
            lean = _solved(patch, model, moments, joint)
        needed = rank_of(lean)
        most = max_rank or (VLLM_RANKS[-1] if server == "vllm" else needed)
        if needed > most:
            tried = [_cut(lean, model, most, moments)]
            if moments is not None and lean.joint is not None and lean.joint.damping is not None:
                tried.append(_solved(lean, model, moments, replace(lean.joint, rank=most)))  # later layers make good
            lean = min(tried, key=lambda one: _lost(one, model))
        with written(Path(directory)) as folder:
            done = lean.export_peft(folder, model)
            if not done.verified:
                raise PatchError(f"{done.check.note}; nothing was written")
            kl = _kl(patch, model, folder)
            if server != "peft" and any(form.kind == "parameter" for form in forms_of(model, lean.entries).values()):
                _experts_one_by_one(lean, model, folder, done.rank)
            verdicts = {s: verdict(folder, s, model, max_rank if s == server else None) for s in ("vllm", "sglang")}
            verdicts |= {"peft": _of_peft(lean, model, folder)}
            if reasons := verdicts[server]["reasons"]:
                raise PatchError(f"{server} would not take this adapter: {reasons[0]}; nothing was written")
    return {
        "out": str(directory), "server": server, "base": getattr(model, "name_or_path", None) or None, "rank": done.rank,
        "needed": needed, "refitted": refitted, "kl": kl, "verdicts": verdicts,
    }  # fmt: skip


def _solved(patch: ModelPatch, model: nn.Module, moments: Moments | None, joint: JointOptions) -> ModelPatch:
    target, source, at = (patch.inputs[name] for name in ("target", "source", "positions"))
    place = patch.report.place
    return ModelPatch.of(solve(model, target, source, "all", "output", "auto", at, silent, joint, moments, place=place))


def _lost(patch: ModelPatch, model: nn.Module) -> float:
    target, source, positions = (patch.inputs[name] for name in ("target", "source", "positions"))
    rows, behind = pair_positions(target, source, patch.scope, positions)
    with Runs(model, without_logits(model, [target, source])) as run:
        wanted = run(target).at(behind).kept()
        with patch.applied(model):
            return float(compare_results(wanted, run(source).at(rows))[0].kl.mean())


def _cut(patch: ModelPatch, model: nn.Module, most: int, moments: Moments | None) -> ModelPatch:
    """Every ΔW cut to rank ``most``: U Uᵀ ΔW, with U what the patch's own tokens, and ordinary text where it is known, feel most of it."""
    read, entries = dict[str, Tensor](), []
    with patch.applied(model), HookStack() as hooks:
        for entry in patch.entries:
            hooks.before(model.get_submodule(entry.module), lambda x, name=entry.param.name: read.update({name: x}))
        model(**without_cache(model, patch.inputs["source"]))
    for entry in patch.entries:
        name, delta = entry.param.name, entry.delta
        assert isinstance(delta, LowRank)
        left, right = delta.left.double(), delta.right.double()
        metric = torch.eye(right.shape[-1], dtype=right.dtype, device=right.device) * 1e-3
        if (x := read[name]).shape[-1] == len(metric):  # experts read something else than their module
            x = nn.functional.normalize(x.to(right).reshape(-1, len(metric)), dim=-1)
            metric += x.mT @ x * (len(metric) / len(x))
        if moments is not None and name in moments.metrics:
            metric += moments.metrics[name].sigma.to(right)
        basis, small = torch.linalg.qr(left.mT)
        turns = torch.linalg.eigh(small @ (right @ metric @ right.mT) @ small.mT).eigenvectors[..., -most:]
        kept = (basis @ turns).mT
        changed = replace(delta, left=kept.to(delta.left), right=(kept @ left.mT @ right).to(delta.right))
        entries.append(replace(entry, delta=changed))
    return replace(patch, entries=tuple(entries), output=None, stream=None)


def _kl(patch: ModelPatch, model: nn.Module, folder: Path) -> dict[str, dict[str, float]]:
    """Of the patch, of the adapter as PEFT loads it, and of what rounds or lacks the context, against the contextual model."""
    target, source, positions = (patch.inputs[name] for name in ("target", "source", "positions"))
    rows, behind = pair_positions(target, source, patch.scope, positions)

    def run(one: nn.Module) -> Result:
        return Result.of(result_of(one(**without_cache(model, source)))).at(rows).kept()

    def contextual(one: nn.Module) -> Result:  # a context is long: its own logits are never made
        with Runs(one, without_logits(one, [target])) as lean:
            return lean(target).at(behind).kept()

    def halved(one: nn.Module) -> nn.Module:
        for parameter in one.parameters():  # of a twin: the model keeps its own
            parameter.data = parameter.data.bfloat16()
        return one

    found = {"unpatched": run(model), "adapter": run(on_twin(model, folder).eval())}
    with patch.applied(model):
        found["patch"] = run(model)
    with suppress(RuntimeError):  # some models are not in bfloat16 when their parameters are
        found["adapter, bfloat16"] = run(halved(on_twin(model, folder).eval()))
        found["context, bfloat16"] = contextual(half := halved(twin(model)))  # noqa: F841 (its head is asked for later)
    every = zip(found, compare_results(contextual(model), *found.values()), strict=True)
    worst = lambda kl: max(float(kl[rows.sample == i].mean()) for i in rows.sample.unique())  # noqa: E731
    return {name: {"mean": float(one.kl.mean()), "worst_query": worst(one.kl)} for name, one in every}


def _experts_one_by_one(patch: ModelPatch, model: nn.Module, folder: Path, rank: int) -> None:
    """The files anew, by the names of the base model's checkpoints; what does not move of experts that do gets zeros."""
    forms, tensors = forms_of(model, patch.entries), dict[str, Tensor]()
    layers = {name.rpartition(".")[0] for name, form in forms.items() if len(form.shape) == 3}
    for name, stored in model.named_parameters():
        shape, own = stored.shape, [entry for entry in patch.entries if entry.param.name == name]
        if own:
            b, a = lora_factors(*lora_tensors(own, forms[name], rank), forms[name])
        elif len(shape) == 3 and name.rpartition(".")[0] in layers:
            b, a = (torch.zeros(shape[0], rank, size) for size in shape[1:])
        else:
            continue
        count = len(as_in_checkpoint(model, {name: torch.empty(shape, device="meta")}))
        a = torch.cat([a] * max(1, count // shape[0]), -2) if len(shape) == 3 else a  # gate and up in one read the same
        for side, factor in (("A", a), ("B", b.mT)):
            for key, one in as_in_checkpoint(model, {name: factor.contiguous()}).items():
                tensors[f"{PREFIX}{key.removesuffix('.weight')}.lora_{side}.weight"] = one.cpu().contiguous()
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config |= {"target_modules": sorted({key.split(".")[-3] for key in tensors}), "target_parameters": None}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt", MADE_FOR: patch.mark()})
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def _of_peft(patch: ModelPatch, model: nn.Module, folder: Path) -> dict[str, Any]:
    try:
        check_adapter(patch, folder, model)
    except (NotVerified, PatchError) as failed:
        return {"accepted": False, "reasons": [str(failed).removesuffix("; nothing was written")], "flags": ""}
    return {"accepted": True, "reasons": [], "flags": ""}
