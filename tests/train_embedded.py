"""Train the embedded model: ``python tests/train_embedded.py [--out DIR] [--seed N]``.

A real ``Gemma3ForCausalLM`` (3 layers, sliding and full attention mixed) learns to look facts
up in its context.  Deterministic for a seed and a machine; about four minutes on two cores.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from controllability.embedded.world import World, draw_world, draw_worlds, vocabulary
from controllability.models.loading import embedded_directory

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
ANSWER_WEIGHT = 1.0
OTHER_WORDS_WEIGHT = 0.05  # facts are random: only the answers teach something
PROMOTION = 0.9  # recall at which worlds may hold one fact more
QUESTIONS, BARE_SHARE = 6, 0.5  # questions after each context; how many of them are a bare name


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the micro-world; ``<bos>`` in front unless special tokens are off."""
    words = {word: i for i, word in enumerate((*SPECIAL, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", model_max_length=256,
    )  # fmt: skip


def make_model(vocab_size: int, seed: int) -> Gemma3ForCausalLM:
    """The untrained model.  The wide initialisation matters: at 0.02 training sits at guessing."""
    torch.manual_seed(seed)
    torch.set_num_threads(2)  # the order of sums, and so the result, depends on it
    config = Gemma3TextConfig(
        vocab_size=vocab_size, hidden_size=96, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32,
        max_position_embeddings=256, sliding_window=24, initializer_range=0.1,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        pad_token_id=0, eos_token_id=1, bos_token_id=2, dtype="float32",
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def encode(worlds: list[World], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Ids and loss weights (B, T): the context, then questions drawn with replacement, each with its answer.

    Half of the questions are a bare name.  Looking a bare name up is learned within minutes, and
    whole questions then only have to find their name; whole questions alone stay at guessing.
    """
    rows, weights = [], []
    for world in worlds:
        ids = tokenizer(world.context)["input_ids"]
        row = [OTHER_WORDS_WEIGHT] * len(ids)
        for question in rng.choices(world.questions, k=QUESTIONS):
            asked = question.name if rng.random() < BARE_SHARE else question.text
            more = tokenizer(f"{asked} {question.answer} .", add_special_tokens=False)["input_ids"]
            ids = ids + more
            row += [OTHER_WORDS_WEIGHT] * (len(more) - 2) + [ANSWER_WEIGHT, 0.3]
        rows.append(torch.tensor(ids))
        weights.append(torch.tensor(row))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(weights, batch_first=True)


@torch.no_grad()
def accuracy(model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerFast, worlds: list[World]) -> float:
    """Share of questions, each asked alone after its context, whose first word is right."""
    right = total = 0
    for world in worlds:
        context = tokenizer(world.context)["input_ids"]
        for question in world.questions:
            query = tokenizer(question.text, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([context + query]), logits_to_keep=1).logits
            right += tokenizer.decode(logits[0, -1].argmax()) == question.answer
            total += 1
    return right / total


def train(
    steps: int, seed: int, batch: int = 48, peak_rate: float = 2e-3
) -> tuple[Gemma3ForCausalLM, PreTrainedTokenizerFast]:
    """Train with a curriculum: one fact more whenever the answers are recalled; prints as it goes."""
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 50) * max(0.05, 1 - (step / steps) ** 3)
    )
    rng = random.Random(seed)
    started = time.perf_counter()
    most, smoothed = 4, 0.0
    for step in range(steps):
        worlds = [draw_world(rng, rng.randint(2, most) if most > 4 else most) for _ in range(batch)]
        ids, weights = encode(worlds, tokenizer, rng)
        logits, labels, weights = model(ids, use_cache=False).logits[:, :-1], ids[:, 1:], weights[:, 1:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        recall = (logits.argmax(-1) == labels)[weights == ANSWER_WEIGHT].float().mean().item()
        smoothed = 0.9 * smoothed + 0.1 * recall
        if smoothed > PROMOTION and most < 8:
            most, smoothed = most + 1, 0.5
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            found = f"facts <= {most}  loss {loss.item():.4f}  recall {recall:.3f}"
            print(f"step {step:5d}  {found}  {seconds:5.0f} s", flush=True)
    return model.eval(), tokenizer


def main() -> None:
    """Train, measure on fresh worlds, and save only a model that recalls."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=embedded_directory(), help="where to save model and tokenizer")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = train(args.steps, args.seed)
    score = accuracy(model, tokenizer, draw_worlds(seed=10_000 + args.seed, count=100))
    size = sum(p.numel() for p in model.parameters())
    print(f"{size} parameters, accuracy {score:.4f} on 100 fresh worlds")
    if score < 0.99:
        raise SystemExit("not saved: accuracy below 0.99; train longer or with another seed")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
