"""One patch for T tokens on random models in exact mode: ``python tests/benchmarks/scope_all.py [--keep-rms]``.

Gemma 3, Llama, Mixtral, GPT-J, OLMo 2 and BERT, d 256, h 768, three layers, random weights, norms and biases in float64.  The
source is the last T tokens of a target of 10 + T distinct ones, at positions from 0.  A markdown table: relative error of the
logits with the patch and without, the resort that each layer's norm took, the largest relative change of a parameter,
seconds; or the refusal's certificate, and whether it holds in exact arithmetic (dependent floats hold to rounding).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from common import markdown

import controllability as ct

MODELS = ("gemma3", "llama", "mixtral", "gptj", "olmo2", "bert")
TOKENS = (1, 8, 64, 200, 400)
VIA = ("input-output", "output")
CONTEXT, LONGEST = 10, 512


def random_model(name: str, d: int = 256, h: int = 768, layers: int = 3, vocabulary: int = 600) -> Any:
    """A model in evaluation mode and float64; every parameter random, matrices of entries around 1/√d."""
    kind = {
        "gemma3": "Gemma3",
        "llama": "Llama",
        "mixtral": "Mixtral",
        "gptj": "GPTJ",
        "olmo2": "Olmo2",
        "bert": "Bert",
    }[name]
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": d, "intermediate_size": h, "num_hidden_layers": layers,
        "num_attention_heads": 4, "max_position_embeddings": LONGEST, "initializer_range": d**-0.5,
    }  # fmt: skip
    if name == "gptj":
        sizes = {"vocab_size": vocabulary, "n_embd": d, "n_inner": h, "n_layer": layers, "n_head": 4}
        sizes |= {"rotary_dim": 4, "n_positions": LONGEST, "initializer_range": d**-0.5}
    elif name != "bert":
        sizes["num_key_value_heads"] = 2
    if name == "gemma3":
        sizes["head_dim"] = d // 4
    if name == "mixtral":  # eager: the other kernels sum in float32
        sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    model_class = getattr(transformers, f"{kind}ForMaskedLM" if name == "bert" else f"{kind}ForCausalLM")
    model = model_class(config_class(**sizes)).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def task(tokens: int, vocabulary: int = 600, seed: int = 1) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """(target, source, positions): the last ``tokens`` of distinct ones, without what stood before them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(vocabulary - 10, generator=generator)[None, : CONTEXT + tokens] + 5
    here = torch.arange(tokens)
    return {"input_ids": ids}, {"input_ids": ids[:, CONTEXT:]}, (here, here + CONTEXT)


@torch.no_grad()
def measure(model: Any, tokens: int, via: str, keep_rms: bool = False) -> dict[str, Any]:
    """One row of the table."""
    target, source, positions = task(tokens, model.config.vocab_size)
    row: dict[str, Any] = {"tokens": tokens, "via": via, "keep_rms": keep_rms, "refused": None}
    with ct.exact_mode():
        wanted, unpatched = model(**target).logits[:, CONTEXT:], model(**source).logits
        row["unpatched"] = relative(unpatched, wanted)
        started = time.perf_counter()
        try:
            mp = ct.patch_model(
                model, target, source, scope="all", via=via, positions=positions, keep_rms=keep_rms
            )  # fmt: skip
        except ct.SideConditionFailed as failed:
            assert failed.certificate is not None
            told = failed.certificate.to_dict()
            return row | {
                "refused": told["kind"], "holds": failed.certificate.holds(), "inputs": told.get("inputs"),
                "targets": told.get("targets"), "where": failed.where, "seconds": time.perf_counter() - started,
            }  # fmt: skip
        row["seconds"] = time.perf_counter() - started
        with mp.applied(model):
            row["error"] = relative(model(**source).logits, wanted)
    changes = [v for layer in mp.report.layers for v in layer.relative_changes.values() if v is not None]
    return row | {"resorts": [layer.route for layer in mp.report.layers], "largest_change": max(changes)}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """max |difference| / max |target|."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def shown(name: str, row: dict[str, Any]) -> list[Any]:
    """A row's cells."""
    start = [name, row["tokens"], row["via"]]
    if row["refused"]:
        how = "exactly" if row["holds"] else f"inputs to {row['inputs']:.0e}, targets differ by {row['targets']:.1g}"
        return [*start, "refused", row["unpatched"], f"{row['refused']} ({how}) at {row['where']}", "–", row["seconds"]]
    resorts = "; ".join(dict.fromkeys(row["resorts"])) if len(set(row["resorts"])) == 1 else "; ".join(row["resorts"])
    return [*start, row["error"], row["unpatched"], resorts, row["largest_change"], row["seconds"]]


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help=f"up to {LONGEST - CONTEXT}")
    parser.add_argument("--via", choices=VIA, nargs="+", default=VIA)
    parser.add_argument("--keep-rms", action="store_true")
    parser.add_argument("--sizes", type=int, nargs=3, default=(256, 768, 3), metavar=("D", "H", "LAYERS"))
    args = parser.parse_args(given)
    rows = []
    for name in args.models:
        model = random_model(name, *args.sizes)
        measure(model, 1, "output")  # reads and checks the model
        rows += [
            shown(name, measure(model, count, via, args.keep_rms)) for count in args.tokens for via in args.via
        ]  # fmt: skip
    columns = ("model", "T", "via", "relative error", "unpatched", "resort of each layer", "largest change", "seconds")
    print(markdown(columns, rows))


if __name__ == "__main__":
    main()
