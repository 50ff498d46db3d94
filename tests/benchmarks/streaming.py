"""Tokens added one by one against all of them at once: ``python tests/benchmarks/streaming.py``.

Random models (d 256, hidden 768, 2 layers) in exact float64, a context of 20 tokens and a conversation that grows by one
token a step.  Prints JSON, with ``--table`` a table: errors of both patches at every token beside the unpatched one, the
difference of the two patched outputs, and the time per added token (joint scales apart) ÷ the time of solving at once: the median
over rounds of three tokens added behind one solution at once, so that both meet the same machine.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
import transformers
from common import markdown, median, timed

import controllability as ct

CONTEXT = 20
ROUNDS = 9
SIZES = {
    "vocab_size": 600, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 64}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"},
    ),
}


def built(family: str) -> Any:
    """A float64 model with random weights, norms included."""
    torch.manual_seed(0)
    config, model, more = FAMILIES[family]
    made = getattr(transformers, model)(getattr(transformers, config)(**SIZES, **more))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made.double().eval()


@torch.no_grad()
def measure(family: str, count: int, via: str) -> dict[str, Any]:
    """One row."""
    model = built(family)
    ids = torch.randperm(590, generator=torch.Generator().manual_seed(0)) + 5
    first, context, words = torch.tensor([1]), ids[:CONTEXT], ids[CONTEXT:]

    def runs(n: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return {"input_ids": torch.cat([first, context, words[:n]])[None]}, {
            "input_ids": torch.cat([first, words[:n]])[None]
        }

    def pairs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        here = torch.arange(1 + n)
        return here, torch.where(here > 0, here + CONTEXT, 0)

    def at_once(n: int) -> Any:
        return ct.patch_model(model, *runs(n), scope="all", via=via, positions=pairs(n))

    with ct.exact_mode():
        streamed = at_once(2)
        steps = [streamed.extend(model, *runs(n)) for n in range(3, count + 1)]
        whole = at_once(count)
        target, source = runs(count)
        wanted, plain = model(**target).logits[0, pairs(count)[1]], model(**source).logits[0]
        outputs = []
        for patch in (streamed, whole):
            with patch.applied(model):
                outputs.append(model(**source).logits[0])
        rounds = []
        for after in range(count + 1, count + 1 + 3 * ROUNDS, 3):
            seconds = timed(lambda: at_once(count))
            rounds.append((seconds, [streamed.extend(model, *runs(n)) for n in range(after, after + 3)]))

    def relative(found: torch.Tensor, other: torch.Tensor = wanted) -> float:
        return float((found - other).abs().max() / other.abs().max())

    def per_token(some: list[Any]) -> float:
        return median(s.seconds - s.scale_seconds for s in some)

    return {
        "family": family, "tokens": count, "streamed": relative(outputs[0]), "at_once": relative(outputs[1]),
        "unpatched": relative(plain), "difference": relative(outputs[0], outputs[1]),
        "token_ms_start": 1e3 * per_token(steps[:20]), "token_ms_end": 1e3 * per_token(steps[-20:]),
        "scale_ms_end": 1e3 * median(s.scale_seconds for s in steps[-20:]),
        "at_once_ms": 1e3 * median(seconds for seconds, _ in rounds),
        "token_over_at_once": median(per_token(added) / seconds for seconds, added in rounds), "solved_anew": sum(s.anew for s in steps),
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, nargs="+", default=list(FAMILIES))
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--via", choices=("input-output", "output"), default="output")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    rows = [measure(family, args.tokens, args.via) for family in args.family]
    if args.table:
        print(markdown(tuple(rows[0]), [list(row.values()) for row in rows]))
    else:
        print(json.dumps({"threads": torch.get_num_threads(), "via": args.via, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
