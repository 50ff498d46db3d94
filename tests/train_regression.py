"""Train a transformer for linear regression in context and follow its patches: ``python tests/train_regression.py [PICTURE]``.

A plain ``LlamaForCausalLM`` (2 layers) reads pairs (x, y) with y = w·x, a new w for each prompt, and answers a last x with one of 32 bins of y. Deterministic
for a seed and a machine; a few minutes on one core. The pairs of a prompt become the rows of its embedding, so that ``ct.dynamics`` takes it like any other model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import controllability as ct
from controllability.embedded.world import draw_worlds
from controllability.rendering.figure import Lines, drawn, two_plots

WIDTH, BINS, MOST, REACH = 2, 32, 24, 4.0  # of x; of y; pairs of a prompt; y is cut off there
SEED, STEPS, BATCH = 0, 2000, 32


def make_model(seed: int = SEED) -> tuple[LlamaForCausalLM, nn.Linear]:
    """(model, what makes states of (x, y, whether y is asked for)), untrained."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=BINS + MOST + 1, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=MOST + 2, initializer_range=0.1, pad_token_id=None, bos_token_id=None,
        eos_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config), nn.Linear(WIDTH + 2, 32)


def draw_prompts(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x (count, MOST + 1, WIDTH) and y (count, MOST + 1)."""
    w, x = torch.randn(count, WIDTH, 1, generator=generator), torch.randn(count, MOST + 1, WIDTH, generator=generator)
    return x, (x @ w)[..., 0].clamp(-REACH, REACH)


def bins(y: Tensor) -> Tensor:
    return ((y + REACH) / (2 * REACH) * BINS).long().clamp(0, BINS - 1)


def vectors(x: Tensor, y: Tensor, asked: bool) -> Tensor:
    """(..., WIDTH + 2): a pair, or an x whose y is asked for."""
    y = torch.zeros_like(y) if asked else y
    return torch.cat([x, y[..., None], torch.full_like(y, float(asked))[..., None]], -1)


def answers(model: LlamaForCausalLM, states: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """Logits (B, MOST + 1, ·) of the y of every x behind the pairs before it, all in one run: questions are seen by themselves alone."""
    count = x.shape[1]
    row = torch.arange(2 * count)
    pair, place = row < count, row % count  # pairs, then questions
    sees = (pair[None] & (place[None] < place[:, None])) | (row[:, None] == row[None])
    mask = torch.zeros(2 * count, 2 * count).masked_fill(~sees, torch.finfo(torch.float32).min)[None, None]
    both = torch.cat([vectors(x, y, False), vectors(x, y, True)], 1)
    found = model(
        inputs_embeds=states(both),
        attention_mask=mask.expand(len(x), -1, -1, -1),
        position_ids=place[None],
        use_cache=False,
    )
    return found.logits[:, count:]


def train(steps: int = STEPS, seed: int = SEED) -> tuple[LlamaForCausalLM, nn.Linear, list[float]]:
    """(model, states, the mean loss of each hundredth of the steps)."""
    model, states = make_model(seed)
    generator, seen = torch.Generator().manual_seed(seed), []
    parameters = [*model.parameters(), *states.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 2))
    for _ in range(steps):
        x, y = draw_prompts(BATCH, generator)
        loss = nn.functional.cross_entropy(answers(model, states, x, y).flatten(0, 1), bins(y).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        seen.append(loss.item())
    size = max(1, steps // 100)
    return model.eval(), states, [sum(seen[i : i + size]) / size for i in range(0, steps - size + 1, size)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """``b7`` is a bin of y, ``z3`` the pair number 3 of the prompt, ``q`` the x that is asked."""
    names = [*(f"b{i}" for i in range(BINS)), *(f"z{i}" for i in range(MOST)), "q"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="q"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@torch.no_grad()
def put_prompt(model: LlamaForCausalLM, states: nn.Linear, x: Tensor, y: Tensor) -> None:
    """Make the rows of the embedding those of a prompt, x (MOST + 1, WIDTH): its last x is asked."""
    whole = torch.cat([vectors(x[:-1], y[:-1], False), vectors(x[-1:], y[-1:], True)])
    model.get_input_embeddings().weight[BINS:] = states(whole)


def gradients(model: LlamaForCausalLM, states: nn.Linear, x: Tensor, y: Tensor, names: list[str]) -> dict[str, Tensor]:
    """∇L of one demonstration: L is the cross-entropy of its y, asked without a context, as fine-tuning on it would."""
    held = [model.get_parameter(name) for name in names]
    logits = model(inputs_embeds=states(vectors(x, y, True))[None, None].detach()).logits[0, -1]
    loss = nn.functional.cross_entropy(logits, bins(y))
    return dict(zip(names, torch.autograd.grad(loss, held), strict=True))


def follow(model: LlamaForCausalLM, states: nn.Linear, count: int, seed: int = SEED + 1) -> dict[str, Tensor]:
    """Means over prompts, (layers, MOST): ``norms`` of the steps, ``cosines`` to −∇L of each demonstration; ``loss`` (1, MOST + 1)."""
    tokenizer, found = make_tokenizer(), []
    xs, ys = draw_prompts(count, torch.Generator().manual_seed(seed))
    context = " ".join(f"z{i}" for i in range(MOST))
    for x, y in zip(xs, ys, strict=True):
        put_prompt(model, states, x, y)
        curve = ct.dynamics(model, tokenizer, context, "q", answer=f"b{int(bins(y[-1]))}", gradients=False)
        seen, rows = curve.attribution, []
        names = {layer: seen.matrices(layer) for layer in curve.layers}
        every = [name for own in names.values() for name in own]
        down = [gradients(model, states, x[i], y[i], every) for i in range(MOST)]
        for own in names.values():
            steps = [torch.cat([seen.increment(i, name).matrix.flatten() for name in own]) for i in range(MOST)]
            plain = [torch.cat([-down[i][name].flatten() for name in own]) for i in range(MOST)]
            rows.append(
                torch.tensor(
                    [
                        float(nn.functional.cosine_similarity(a, b.double(), 0))
                        for a, b in zip(steps, plain, strict=True)
                    ]
                )
            )
        found.append({"norms": curve.norms, "cosines": torch.stack(rows), "loss": curve.loss[None]})
    return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}


def follow_facts(count: int, facts: int = 8, seed: int = 20) -> dict[str, Tensor]:
    """The same of the embedded model: worlds of facts, a fact a step."""
    model, tokenizer = ct.load_model("embedded")
    found = []
    for world in draw_worlds(seed=seed, count=count, facts=(facts, facts)):
        curve = ct.dynamics(model, tokenizer, world.context, world.questions[0].text, chunks="sentence")
        found.append({"norms": curve.norms, "cosines": curve.gradient_cosines, "loss": curve.loss[None]})
    return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}


def panels(found: dict[str, Tensor], what: str) -> list[Any]:
    by_layer = lambda held: {f"layer {i}": row for i, row in enumerate(held.tolist())}  # noqa: E731
    steps = range(1, found["norms"].shape[1] + 1)
    return [
        Lines(
            f"{what}: size of each step", "demonstrations", "mean ‖ΔW_{i+1} − ΔW_i‖", steps, by_layer(found["norms"])
        ),
        Lines(f"{what}: each step and −∇L", "demonstrations", "mean cosine", steps, by_layer(found["cosines"])),
        Lines(
            f"{what}: loss", "demonstrations", "mean −log p", range(len(steps) + 1), {"loss": found["loss"][0].tolist()}
        ),
    ]


def draw(both: dict[str, dict[str, Tensor]], path: Path) -> None:
    """A column for each model."""
    figure, axes = two_plots(3, (11, 9))
    for column, (name, found) in enumerate(both.items()):
        for row, panel in enumerate(panels(found, name)):
            panel.draw(axes[row][column])
            axes[row][column].set_title(panel.title)
    drawn(figure, path, dpi=75)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the order of sums, and so the result, depends on it
    model, states, losses = train()
    print(
        "loss while training:",
        *(f"{loss:.3f}" for loss in losses[:: max(1, len(losses) // 10)]),
        f"{losses[-1]:.3f}",
        flush=True,
    )
    both = {"regression": follow(model, states, 24), "facts": follow_facts(24)}
    for name, found in both.items():
        for key, held in found.items():
            print(name, key, *(" ".join(f"{v:.3g}" for v in row) for row in held.tolist()), sep="\n  ")
    if len(sys.argv) > 1:
        draw(both, Path(sys.argv[1]))
