"""What patching costs a model that two processes share: (target run + sweep) ÷ two plain passes of the same model.

    python tests/benchmarks/sharded.py

Random weights at the shape of a Gemma 3 of 270M with a third of its layers: 256 tokens of context and query, 32 of query.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_sharded import ended, start


def main() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=32768, hidden_size=640, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=256, max_position_embeddings=1024,
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        Gemma3ForCausalLM(config).save_pretrained(folder)
        output, errors = ended(start(Path(folder), f"costs:{folder}"), within=900)
    lines = [line for line in output.splitlines() if line.startswith("{")]
    print(f"(target run + sweep) ÷ two plain passes: {json.loads(lines[0])['found']:.2f}" if lines else errors[-2000:])


if __name__ == "__main__":
    main()
