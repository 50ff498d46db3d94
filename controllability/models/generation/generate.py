"""Generation without the context: the patched model sees the current token alone, token after token.

The protocol of [G, section 4].  transformers' own ``generate`` prepares caches, positions, logits processors and
stopping criteria; only its decoding loop is ours.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from controllability.errors import BadInput, ControllabilityError, in_a_line
from controllability.models.generation.steps import GeneratedToken, Generation, Sampler, compared
from controllability.models.hooks.carried_patches import refuse_carried, uncompiled
from controllability.models.hooks.layer_hooks import LayerHooks
from controllability.models.hooks.own_modes import own_modes
from controllability.models.reading.checked_reading import Checked, checked_reading
from controllability.models.reading.heads import Result
from controllability.models.reading.model_facts import forward_arguments, input_embedding, takes_cache
from controllability.models.reading.positions import Positions
from controllability.models.reading.random_inputs import refuse_ids
from controllability.models.sweep.layer_sweep import LayerSweep
from controllability.models.sweep.one_pass import in_one_pass, narrow, possible, same, widened
from controllability.models.sweep.records import record
from controllability.models.sweep.report import Layers
from controllability.models.sweep.source_run import (
    AFTER_THE_LAST_LAYER,
    Plan,
    refuse_other_output,
    refuse_unreached,
    sweep,
)
from controllability.models.sweep.target_run import LayerTarget, check_finite, observe_target, silent
from controllability.models.transformers_parts import CACHE, after_step
from controllability.prover.derivation import Derivation

OTHER_MODES = ("penalty_alpha", "dola_layers", "num_beams", "constraints", "assistant_early_exit", "use_mtp")
IGNORED = (  # of transformers' options those that its own loop alone would heed
    "output_scores", "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate",
    "prefill_chunk_size", "synced_gpus", "low_memory", "num_beam_groups", "length_penalty", "early_stopping", "diversity_penalty",
    "num_assistant_tokens", "assistant_confidence_threshold", "assistant_tokenizer",
)  # fmt: skip
OnStep = Callable[[GeneratedToken], None]


def generate(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 20, *,
    via: str = "input-output", route: str = "auto", follow: str = "target", control: bool = True, reports: bool = False,
    seed: int | None = None, on_step: OnStep | None = None, place: str | None = None, **options: Any,
) -> Generation:  # fmt: skip
    """Generate with the context and, beside it, without: patches recomputed for every token take its place.

    ``input_ids`` (B, L) are prompts; where their lengths differ ``attention_mask`` marks the padding, on either side.
    At every step the contextual model decodes the current token with its cache; one sweep over the current token
    alone, at its absolute position, solves every layer's patch and gives the patched logits, for each sample its own.
    ``follow`` says whose choice both go on with: "target", the contextual model's (after a mismatch the patched one is
    forced back: the papers' protocol), or "patched".  ``control`` runs the token without patches as well, ``reports`` keeps
    each step's layer reports (residual, margins, condition, route of every sample).  ``seed`` fixes what is sampled; both
    models draw with the same random numbers.  ``on_step`` is called after every token, ``place`` is as in ``patch_model``.  ``options`` are those of
    transformers' ``generate``: do_sample, temperature, top_k, top_p, repetition_penalty, eos_token_id, streamer, ….

    Raises ``BadInput`` for prompts that cannot be run (empty, too long for the model's positions, not a decoder with a
    cache), and what ``patch_model`` raises.  The model is left as it was.  Source: [G, section 4]; batches and
    sampling are new.

    >>> import torch
    >>> from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    >>> config = Gemma3TextConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64)
    >>> model = Gemma3ForCausalLM(config).eval()
    >>> prompt = torch.arange(5, 17)[None]
    >>> done = generate(model, prompt, max_new_tokens=4, eos_token_id=None)
    >>> bool((done.sequences == model.generate(prompt, max_new_tokens=4, eos_token_id=None, do_sample=False)).all())
    True
    >>> done.agreement
    1.0
    """
    model = uncompiled(model)
    _refuse_misuse(model, follow, max_new_tokens, options)
    if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**64):
        raise BadInput(f"seed must be an integer, got {seed!r:.40}; it has 64 bits")
    if on_step is not None and not callable(on_step):
        raise BadInput(f"on_step must be a function of a step, got {type(on_step).__name__}")
    ids, mask = left_padded(input_ids, attention_mask)
    with own_modes(model):
        checked = _checked(model, ids, place)
        _refuse_prompts(model, checked, ids, mask, max_new_tokens)
        proofs = checked.proofs(via, route)
        with LayerHooks(model, checked.reading) as hooks:
            streamer = options.get("streamer")
            loop = _Loop(model, hooks, checked, proofs, len(ids), follow, control, reports, on_step, streamer)
            if seed is not None:
                torch.manual_seed(seed)
            defaults = {"do_sample": False, "pad_token_id": _padding(model, options), "use_cache": True}
            settings = {"attention_mask": mask, "max_new_tokens": max_new_tokens, "custom_generate": loop.run}
            try:
                with torch.inference_mode():  # small operations cost less there
                    model.generate(ids, **settings, **(defaults | options))  # type: ignore[operator]
            except (ControllabilityError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever the model's own code, or transformers' about the options, may raise
                if loop.outside:
                    raise
                raise _failure(model, ids, mask, len(loop.steps), error) from error
    return Generation(loop.sequences.cpu().clone(), mask.sum(1).cpu(), tuple(loop.steps), route, str(model.dtype)[6:])


@dataclass(frozen=True, eq=False)
class _Found:
    """What one step computed for the A active samples: logits (A, vocabulary) of the three runs, and the solved layers."""

    target: Tensor
    patched: Tensor
    without: Tensor | None
    solvers: list[LayerSweep]
    seconds: dict[str, float]


class _Loop:
    """The decoding loop that transformers calls, and what it leaves behind."""

    def __init__(
        self, model: Any, hooks: LayerHooks, checked: Checked, proofs: list[Derivation], prompts: int, follow: str,
        control: bool, reports: bool, on_step: OnStep | None, streamer: Any,
    ) -> None:  # fmt: skip
        self.model, self.hooks, self.checked, self.proofs = model, hooks, checked, proofs
        self.prompts, self.follow, self.control, self.reports = prompts, follow, control, reports
        self.on_step, self.streamer = on_step, streamer
        self.steps: list[GeneratedToken] = []
        self.outside = False
        self.one_pass: bool | None = None  # whether both runs may share a pass: unknown until it was compared
        self.sequences = torch.empty(0)

    def run(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        """As transformers calls a ``custom_generate``."""
        for name in ("synced_gpus", "streamer", "tokenizer"):  # transformers hands them on in some releases
            options.pop(name, None)
        if len(input_ids) != self.prompts:
            raise BadInput(
                f"the generation config asks for {len(input_ids)} sequences from {self.prompts} prompts (beams, several "
                "continuations): one continuation of each prompt is generated"
            )
        mode = str(getattr(generation_config.get_generation_mode(), "value", ""))
        if mode not in ("greedy_search", "sample"):
            raise BadInput(
                f"these options ask for {mode.replace('_', ' ')} (one of {', '.join(OTHER_MODES)}): patched generation decodes "
                "greedily or by drawing; leave them out, in the model's generation_config too"
            )
        self.sampler = Sampler.of(logits_processor, generation_config.do_sample, 3 if self.control else 2, model)
        active = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        padding = generation_config.pad_token_id
        first = True
        while bool(active.any()):
            at = {"next_sequence_length": None if first else 1, "is_first_iteration": first}
            inputs = model.prepare_inputs_for_generation(input_ids, **at, **options)
            self._refuse_rewritten(input_ids, inputs)
            step = self._step(input_ids, inputs, self.sampler, active)
            options = after_step(model, self._output, options)
            chosen = step.target if self.follow == "target" else step.patched
            chosen = torch.where(active, chosen.to(input_ids.device), padding)
            self.sequences = input_ids = torch.cat([input_ids, chosen[:, None]], 1)
            self.steps.append(step)
            self._tell(step, chosen)
            active = active & ~stopping_criteria(input_ids, None)
            first = False
        self._tell(None, None)
        return input_ids

    def _tell(self, step: GeneratedToken | None, chosen: Tensor | None) -> None:
        """The caller's own code; what it raises is the caller's."""
        self.outside = True
        with torch.inference_mode(False):
            if self.streamer is not None:
                self.streamer.put(chosen.cpu().clone()) if chosen is not None else self.streamer.end()
            if self.on_step is not None and step is not None:
                self.on_step(step)
        self.outside = False

    def _step(self, input_ids: Tensor, inputs: dict[str, Any], choice: Sampler, active: Tensor) -> GeneratedToken:
        running = active.nonzero()[:, 0].cpu()  # samples that ended are decoded on by the batch, and not patched
        position = self._position(inputs, input_ids)
        source = {"input_ids": input_ids[running][:, -1:], "use_cache": False}
        if "position_ids" in forward_arguments(self.model):
            source["position_ids"] = position[running][:, None]
        at_once = self.one_pass is not False and possible(inputs, self.checked.streams)
        found = (self._together if at_once else self._apart)(input_ids, inputs, source, running)
        check_finite(found.patched, "source", self.checked.reading.layers[-1], "of the logits after")
        tokens = lambda row: f"prompt {int(running[row])}, position {int(position[running[row]])}"  # noqa: E731
        worst = refuse_unreached(found.solvers)
        refuse_other_output(Result.of(found.patched), Result.of(found.target), worst, tokens, AFTER_THE_LAST_LAYER)
        layers = Layers(map(record, found.solvers), self.checked.norms) if self.reports else None
        return compared(
            input_ids, found.target, found.patched, found.without, choice, active, position, found.seconds, layers
        )

    def _apart(self, input_ids: Tensor, inputs: dict[str, Any], source: dict[str, Any], running: Tensor) -> _Found:
        """The target's step with its cache, then the sweep."""
        started = time.perf_counter()
        batch, length = inputs["input_ids"].shape
        rows = Positions(running, torch.full_like(running, length - 1), (batch, length))
        targets, self._output = observe_target(self.hooks, {**inputs, "return_dict": True}, self._all(rows), silent)
        target = self._output.logits[: len(input_ids)][running, -1]
        observed = time.perf_counter()
        solvers, patched = self._sweep(targets, source)
        seconds = {"target": observed - started, "patched": time.perf_counter() - observed}
        return _Found(target, patched, self._without(source), solvers, seconds)

    def _sweep(self, targets: list[list[LayerTarget]], source: dict[str, Any]) -> tuple[list[LayerSweep], Tensor]:
        count = len(source["input_ids"])
        rows = Positions(torch.arange(count), torch.zeros(count, dtype=torch.long), (count, 1))
        solvers, output = sweep(self.hooks, Plan(self.proofs, "each"), targets, source, self._all(rows), silent)
        return solvers, output.logits[:, -1]

    def _without(self, source: dict[str, Any]) -> Tensor | None:
        return self.hooks.run((), source).logits[:, -1] if self.control else None

    def _together(self, input_ids: Tensor, inputs: dict[str, Any], source: dict[str, Any], running: Tensor) -> _Found:
        """Both in one pass; the first time the sweep is done by itself as well, and must have met the same states."""
        started = time.perf_counter()
        batch = len(input_ids)
        wide = widened(inputs, input_ids, 3 if self.control else 2)
        rows = Positions(running, torch.zeros_like(running), (batch, 1))
        targets, solvers, self._output = in_one_pass(self.hooks, Plan(self.proofs, "each"), wide, rows)
        groups = self._output.logits[:, -1].split(batch)
        target, patched, without = groups[0][running], groups[1][running], groups[2][running] if self.control else None
        half = (time.perf_counter() - started) / 2
        seconds = {"target": half, "patched": half}
        if solvers is None or self.one_pass is None:
            swept, alone = self._sweep(targets, source)
            if self.one_pass is None and solvers is not None:
                self.one_pass = same(solvers, swept)
                if not self.one_pass:
                    narrow(inputs, batch)
            if not self.one_pass or solvers is None:
                return _Found(target, alone, self._without(source), swept, seconds)
        return _Found(target, patched, without, solvers, seconds)

    def _refuse_rewritten(self, input_ids: Tensor, inputs: Mapping[str, Any]) -> None:
        given = inputs.get("input_ids")
        if not isinstance(given, Tensor) or given.ndim != 2 or not torch.equal(given[:, -1], input_ids[:, -1]):
            raise BadInput(
                f"{type(self.model).__name__} does not decode its last token (it adds a token of its own, or reads several "
                "rows of them): there is no current token that the patched model could see alone"
            )

    def _all(self, rows: Positions) -> Positions:
        """The rows of every state that the model keeps a position."""
        streams = self.checked.streams
        return rows.streamed(streams) if streams > 1 else rows

    def _position(self, inputs: Mapping[str, Any], input_ids: Tensor) -> Tensor:
        """The absolute position of the current token of each sample, (B,)."""
        given = inputs.get("position_ids")
        if isinstance(given, Tensor) and given.ndim == 2:
            return given[:, -1].expand(len(input_ids))
        mask = inputs.get("attention_mask")
        counts = mask.sum(1) if isinstance(mask, Tensor) and mask.ndim == 2 else None
        return counts - 1 if counts is not None else torch.full((len(input_ids),), input_ids.shape[1] - 1)


def left_padded(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts (B, L) and mask (B, L), with the padding of every sample on its left.

    Raises ``BadInput`` for anything else than integers (B, L) with a token in every sample.

    >>> import torch
    >>> left_padded(torch.tensor([[7, 8, 0]]), torch.tensor([[1, 1, 0]]))[0]
    tensor([[7, 8]])
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise BadInput("input_ids must be a tensor of integers (B, L): one row of token ids a prompt")
    if 0 in input_ids.shape:
        raise BadInput(f"the prompt is empty (input_ids of shape {tuple(input_ids.shape)})")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        raise BadInput(f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}")
    mask = (mask != 0).to(input_ids)
    if not bool(mask.any(1).all()):
        empty = int((~mask.any(1)).nonzero()[0])
        raise BadInput(f"prompt {empty} is empty: it has no token that is not padding")
    order = mask.argsort(dim=1, stable=True)  # the tokens of each sample move to its end, in their order
    longest = int(mask.sum(1).max())
    return input_ids.gather(1, order)[:, -longest:], mask.gather(1, order)[:, -longest:]


def _checked(model: Any, ids: Tensor, place: str | None) -> Checked:
    """The model's reading, checked on token ids alone; on others it could not generate."""
    try:
        return checked_reading(model, {"input_ids": ids}, place)
    except (ControllabilityError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's own code may raise
        raise BadInput(
            f"{type(model).__name__} cannot be run on one row of token ids a prompt and nothing else: {_said(error)}; patched "
            "generation is for models that read text; nothing was changed"
        ) from error


def _failure(model: Any, ids: Tensor, mask: Tensor, tokens: int, error: Exception) -> BadInput:
    """What to say of an error in ``model.generate``: the options are to blame where it works without them."""
    name, settings = type(model).__name__, {"attention_mask": mask, "pad_token_id": _padding(model, {})}
    try:
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=2, do_sample=False, **settings)
    except Exception as plain:  # as above
        return BadInput(
            f"transformers' own generate() fails on this {name}, without any patch: {_said(plain)}; nothing was changed"
        )
    return BadInput(
        f"{name} cannot generate with these options, after {tokens} tokens: {_said(error)}; nothing was changed"
    )


def _said(error: Exception) -> str:
    """Type and words of another library's error, in one line."""
    return f"{type(error).__name__}: {in_a_line(error)}"


def _padding(model: nn.Module, options: Mapping[str, Any]) -> int:
    """A token for the padding: any will do, it is masked and no result of it is used."""
    config = getattr(model, "generation_config", None)
    for value in (options.get("pad_token_id"), getattr(config, "pad_token_id", None)):
        if isinstance(value, int):
            return value
    return 0


def _refuse_misuse(model: Any, follow: str, count: Any, options: Mapping[str, Any]) -> None:
    if follow not in ("target", "patched"):
        raise BadInput(f"follow must be 'target' or 'patched', got {follow!r}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise BadInput(f"max_new_tokens must be a positive integer, got {count!r}")
    if options.get("use_cache", True) is not True:
        raise BadInput("use_cache must stay on: the contextual model decodes with its cache, nothing is run again")
    for name in ("num_beams", "num_return_sequences"):
        if options.get(name, 1) != 1:
            raise BadInput(f"{name}={options[name]}: one continuation of each prompt is generated; leave it at 1")
    for name in IGNORED:
        if options.get(name):
            raise BadInput(f"{name} has no effect on patched generation, which returns a Generation: leave it out")
    for name in ("custom_generate", "assistant_model", "inputs_embeds", "prompt_lookup_num_tokens", *CACHE):
        if options.get(name) is not None:
            raise BadInput(f"{name} cannot be combined with patched generation")
    config = getattr(model, "config", None)
    if not hasattr(model, "generate") or config is None:
        raise BadInput(f"{type(model).__name__} has no generate(): patched generation is built on that of transformers")
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput(f"{type(model).__name__} is an encoder-decoder: patched generation is for decoder-only models")
    if not takes_cache(model):
        raise BadInput(
            f"{type(model).__name__} keeps no cache: without one the history would be run again for every token"
        )
    refuse_carried(model, "generating")


def _refuse_prompts(model: Any, checked: Checked, ids: Tensor, mask: Tensor, count: int) -> None:
    embedding = input_embedding(model)
    if embedding is not None:
        refuse_ids(ids.masked_fill(mask == 0, 0), int(embedding.shape[0]), "prompt")
    if checked.codebooks > 1:
        raise BadInput(f"{type(model).__name__} reads several rows of ids a sample: patched generation is for text")
    limit = checked.position_limit
    longest = int(mask.sum(1).max())
    if limit is not None and limit < longest + count - 1:
        raise BadInput(
            f"a prompt of {longest} tokens and {count} more need {longest + count - 1} positions, the model has {limit}"
        )
