"""What two processes of ``torchrun`` do for tests/test_sharded.py: each case prints one line of JSON, from process 0."""

import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import controllability as ct
from controllability.models.exact_mode import exact_mode

IDS = torch.arange(5, 17)[None] * 7 % 60
TARGET = {"input_ids": IDS}
SOURCE = {"input_ids": IDS[:, -3:], "position_ids": torch.arange(9, 12)[None]}


class Bytes(TorchDispatchMode):
    """Counts what is handed to collectives, whoever calls them."""

    sent = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its parts come by here
        if "c10d" in function.namespace and not any(word in str(function) for word in ("wait", "wrap_tensor")):
            held = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.sent += sum(x.numel() * x.element_size() for x in held)
        return function(*args, **(kwargs or {}))


def load(folder: str, split: bool, dtype: torch.dtype = torch.float32) -> Any:
    how: dict[str, Any] = {"distributed_config": DistributedConfig(tp_size=dist.get_world_size())} if split else {}
    if dtype == torch.float64:  # for which the experts' own kernel is not made
        how["experts_implementation"] = "eager"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).eval()


def miss(found: torch.Tensor, wanted: torch.Tensor, scope: str) -> float:
    """max |difference| / max |wanted|; of the last position for scope "last"."""
    found, wanted = (x[:, -1] if scope == "last" else x for x in (found, wanted))
    return float((found - wanted).abs().max() / wanted.abs().max())


def run(model: Any, patch: Any = None) -> torch.Tensor:
    with torch.no_grad():
        if patch is None:
            return model(**SOURCE).logits
        with patch.applied(model):
            return model(**SOURCE).logits


def bits(model: Any) -> list[torch.Tensor]:
    return [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]


def patched(folder: str, out: str) -> dict[str, Any]:
    """Every scope at both places: applied, merged, saved by two and loaded by one, in float32 and in exact float64."""
    found = {}
    whole, split, saved = load(folder, False), load(folder, True), 0
    for place in ("feed-forward", "mixer"):
        for scope in ("each", "last", "all"):
            one, two = (ct.patch_model(m, TARGET, SOURCE, scope=scope, place=place) for m in (whole, split))
            wanted, here = two.target_logits, {}
            assert wanted is not None
            here["unpatched"] = miss(run(split), wanted, scope)
            here["applied"] = miss(run(split, two), wanted, scope)
            here["against one process"] = miss(run(split, two), run(whole, one), scope)
            if scope != "each":
                before = bits(split)
                two.merge(split)
                here["merged"] = miss(run(split), wanted, scope)
                two.unmerge(split)
                here["same bits"] = all(torch.equal(a, b) for a, b in zip(before, bits(split), strict=True))
            saved += 1
            folder_of_patch = Path(out) / f"patch-{saved}"
            two.save(folder_of_patch)
            here["files"] = sorted(p.name for p in folder_of_patch.iterdir())
            here["loaded by one"] = miss(run(whole, ct.load_patch(folder_of_patch)), wanted, scope)
            here["loaded by two"] = miss(run(split, ct.load_patch(folder_of_patch)), wanted, scope)
            found[f"{place} {scope}"] = here
    return found


def exactly(folder: str, out: str) -> dict[str, Any]:
    found = {}
    whole, split = (load(folder, s, torch.float64) for s in (False, True))
    with exact_mode():
        for scope in ("each", "last", "all"):
            one, two = (ct.patch_model(m, TARGET, SOURCE, scope=scope) for m in (whole, split))
            wanted = two.target_logits
            assert wanted is not None
            found[scope] = {
                "applied": miss(run(split, two), wanted, scope),
                "against one process": miss(run(split, two), run(whole, one), scope),
                "unpatched": miss(run(split), wanted, scope),
            }
    return found


def sent(folder: str, out: str) -> dict[str, list[float]]:
    """Bytes of a sweep beyond the model's own two passes: for each further source token and layer, and once a patch."""
    split, found = load(folder, True), {}
    layers, (few, many) = split.config.num_hidden_layers, (3, 11)

    def source(tokens: int) -> dict[str, Any]:
        return {"input_ids": IDS[:, -tokens:], "position_ids": torch.arange(12 - tokens, 12)[None]}

    def beyond(tokens: int, scope: str, place: str) -> int:
        ct.patch_model(split, TARGET, source(tokens), scope=scope, place=place)  # the reading is compared once
        with Bytes() as own, torch.no_grad():
            split(**TARGET), split(**source(tokens))
        with Bytes() as swept:
            ct.patch_model(split, TARGET, source(tokens), scope=scope, place=place)
        return swept.sent - own.sent

    for place in ("feed-forward", "mixer"):
        for scope in ("each", "last", "all"):
            less, more = (beyond(tokens, scope, place) for tokens in (few, many))
            slope = (more - less) / (many - few) / layers
            found[f"{place} {scope}"] = [slope, less - slope * few * layers]
    return found


def generated(folder: str, out: str) -> dict[str, Any]:
    whole, split = load(folder, False), load(folder, True)
    one, two = (ct.generate(m, IDS, max_new_tokens=5) for m in (whole, split))
    return {
        "same": torch.equal(one.sequences, two.sequences), "error": two.max_logit_error,
        "unpatched": two.max_logit_error_unpatched,
    }  # fmt: skip


def compiled(folder: str, out: str) -> dict[str, Any]:
    """The embedded model on two processes: a context compiled into weights."""
    from controllability import embedded

    whole, tokenizer = ct.load_model("embedded")
    split = load(str(Path(embedded.__file__).parent / "model"), True)
    context, found = "Mia lives in Oslo . Leo lives in Rome . Zoe lives in Lima .", {}
    questions = ["Where does Leo live ?", "In which city does Zoe stay ?"]
    moments = [ct.second_moments(m, [tokenizer(context, return_tensors="pt").input_ids]) for m in (whole, split)]
    pairs = [[m.metrics[name].second for m in moments] for name in moments[0].metrics]
    found["moments"] = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    for strength in ("exact", "balanced"):
        results = [ct.compile_context(m, tokenizer, context, questions, strength=strength) for m in (whole, split)]
        found[strength] = [[r.exact, [a["patched"] for a in r.answers()]] for r in results]
    return found


def refused(folder: str, out: str) -> dict[str, str]:
    """What must end in one clear error in every process."""
    split, rank, found = load(folder, True), dist.get_rank(), {}

    def told(name: str, act: Callable[[], object]) -> None:
        try:
            act()
            found[name] = "nothing was refused"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    other = {"input_ids": IDS + rank}
    told("inputs", lambda: ct.patch_model(split, other, SOURCE))
    patch = ct.patch_model(split, TARGET, SOURCE, scope="last")
    another = ct.patch_model(split, TARGET, SOURCE, scope="each")
    told("patches", lambda: run(split, another if rank else patch))
    told("export", lambda: patch.export_peft(Path(out) / "adapter"))
    told("occupied", lambda: patch.save(Path(folder)))
    from controllability.models.hooks import shards

    shards.__version__ += str(rank)
    told("versions", lambda: ct.patch_model(split, TARGET, SOURCE))
    shards.__version__ = ct.__version__
    found["afterwards"] = str(miss(run(split, patch), patch.target_logits, "last"))  # type: ignore[arg-type]
    for name in ("mlp.down_proj", "self_attn.q_proj"):  # one that is patched, one that is not: in process 1 alone
        weight = split.get_parameter(f"model.layers.1.{name}.weight")._local_tensor
        before = weight[0, 0].clone()
        with torch.no_grad():
            weight[0, 0] = float("nan") if rank else before
        told(f"NaN in {name}", lambda: ct.patch_model(split, TARGET, SOURCE))
        with torch.no_grad():
            weight[0, 0] = before
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    assert all(told == everyone[0] for told in everyone), everyone
    return found


def fully_sharded(folder: str, out: str) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = load(folder, False)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    try:
        ct.patch_model(model, TARGET, SOURCE)
    except ct.BadInput as error:
        return str(error)
    return "nothing was refused"


def uneven(folder: str, out: str) -> str:
    try:
        ct.patch_model(load(folder, True), TARGET, SOURCE)
    except ct.BadInput as error:
        return str(error)
    return "nothing was refused"


def killed(folder: str, out: str) -> None:
    """One process gets SIGTERM in the middle; torchrun ends the other."""
    split = load(folder, True)
    Path(out, f"running-{dist.get_rank()}").touch()
    dist.barrier()
    if dist.get_rank():
        os.kill(os.getpid(), signal.SIGTERM)
    while True:
        ct.patch_model(split, TARGET, SOURCE)


def costs(folder: str, out: str) -> float:
    """(target run + sweep) ÷ two plain passes, medians of five, at the shape of ``folder``."""
    split = load(folder, True)
    long = {"input_ids": torch.arange(256)[None] % split.config.vocab_size}
    short = {"input_ids": long["input_ids"][:, -32:], "position_ids": torch.arange(224, 256)[None]}
    ct.patch_model(split, long, short)

    def seconds(act: Callable[[], object]) -> float:
        dist.barrier()
        started = time.perf_counter()
        act()
        return time.perf_counter() - started

    def plain() -> None:
        with torch.inference_mode():
            split(**long), split(**short)

    pairs = [(seconds(plain), seconds(lambda: ct.patch_model(split, long, short))) for _ in range(5)]
    ratios = sorted(b / a for a, b in pairs)
    return ratios[2]


CASES = {
    f.__name__: f for f in (patched, exactly, sent, generated, compiled, refused, fully_sharded, uneven, killed, costs)
}


def main() -> None:
    """``torchrun sharded_worker.py OUT CASE:FOLDER …``"""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dist.init_process_group("gloo")
    out, *wanted = sys.argv[1:]
    for case in wanted:
        name, _, folder = case.partition(":")
        try:
            found: Any = CASES[name](folder, out)
        except Exception:
            found = {"error": traceback.format_exc()}
        if dist.get_rank() == 0:
            print(json.dumps({"case": case, "found": found}), flush=True)
        if isinstance(found, dict) and "error" in found and isinstance(found["error"], str):
            sys.exit(1)  # the other process ends with it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
