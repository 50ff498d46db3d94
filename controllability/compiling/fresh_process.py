"""Plain transformers in a process of its own: ``python fresh_process.py MODEL_DIR INPUTS LOGITS``.  Nothing of ours is imported."""

import sys


def main(directory: str, inputs: str, logits: str) -> None:
    """Load the checkpoint, run each of the token ids (1, L) in ``inputs``, and write their logits under the same names."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
    AutoTokenizer.from_pretrained(directory, local_files_only=True)
    with torch.no_grad():
        found = {name: model(input_ids=ids).logits.contiguous() for name, ids in load_file(inputs).items()}
    assert not any(name.split(".")[0] in ("controllability", "architectures") for name in sys.modules)
    save_file(found, logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
