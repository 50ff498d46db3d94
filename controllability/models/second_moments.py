"""``second_moments``: what every matrix of a model reads on ordinary text, run by run, and in a safetensors file from which it goes on,
tied to the weights that they are of.

Nothing but the sums is kept, however many texts there are.  Source: theory 7.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from architectures.reading import Layer, Tap
from controllability.arrays.sharded import gathered
from controllability.errors import BadInput, ControllabilityWarning, PatchError
from controllability.models.files.folders import refuse_unusable, written
from controllability.models.files.tensor_files import read_tensors
from controllability.models.hooks.carried_patches import refuse_carried, uncompiled
from controllability.models.hooks.layer_hooks import LayerHooks, LayerListener
from controllability.models.hooks.own_modes import own_modes
from controllability.models.loading import on_device
from controllability.models.moments import Metric, Moments, matrices
from controllability.models.reading.checked_reading import checked_reading
from controllability.models.reading.fingerprints import known_fingerprint
from controllability.models.reading.heads import Runs, without_logits
from controllability.models.reading.inputs import refuse_bad_inputs, refuse_malformed
from controllability.models.reading.model_facts import position_limit, text_config
from controllability.models.sweep.target_run import Progress, silent
from controllability.models.tokens import with_special

FORMAT = "controllability-moments"


@dataclass(frozen=True)
class Begun:
    """Sums over the first ``runs`` runs, whose inputs have the hash ``texts``; ``complete`` if there were no more."""

    moments: Moments
    runs: int = 0
    texts: str = ""
    complete: bool = False


NOTHING = Begun(Moments({}, 0))


def save_moments(moments: Moments, path: str | Path, model: nn.Module) -> Path:
    """Write the second moments of ``model`` into the new file ``path``.  Raises ``PatchError`` where it cannot be written.

    ``second_moments(..., save=path)`` writes them as they are made, and can be interrupted.

    >>> # path = ct.save_moments(moments, "moments.safetensors", model)
    """
    path, model = Path(path), uncompiled(model)
    refuse_unusable(path, file=True)
    refuse_carried(model, "saving its moments")
    write_begun(Begun(moments, complete=True), path, model)
    return path


def load_moments(path: str | Path, model: nn.Module) -> Moments:
    """The second moments that ``save_moments`` or ``second_moments`` wrote, float32.

    Raises ``PatchError`` for a file that is missing, damaged, unfinished, of something else, or of another model than ``model``.

    >>> # moments = ct.load_moments("moments.safetensors", model)
    """
    found = _read(Path(path), uncompiled(model))
    if not found.complete:
        raise PatchError(
            f"the moments in {path} are unfinished ({found.moments.tokens:,} tokens): make them again with the same texts and file, "
            "which goes on from there"
        )
    return found.moments


def begun(path: Path, model: nn.Module) -> Begun:
    """What a file holds to go on from; nothing, where there is none yet.  Raises ``PatchError``, also where it could not be written."""
    refuse_carried(model, "making its moments")
    if not path.exists():
        refuse_unusable(path, file=True)
        return NOTHING
    found = _read(path, model)
    if not found.texts:
        raise PatchError(
            f"{path} holds moments of texts that it does not remember: give a new file, or read it with load_moments"
        )
    return found


def write_begun(found: Begun, path: Path, model: nn.Module) -> None:
    """Write sums in place of those that are there."""
    notes = {
        "format": FORMAT, "tokens": str(found.moments.tokens), "fingerprint": known_fingerprint(model), "runs": str(found.runs),
        "texts": found.texts, "complete": str(found.complete),
    }  # fmt: skip
    with written(path, path.name) as folder:
        tensors = {name: metric.second.cpu().contiguous() for name, metric in found.moments.metrics.items()}
        save_file(tensors, folder / path.name, notes)


def _read(path: Path, model: nn.Module) -> Begun:
    tensors, notes, _ = read_tensors(path)
    tokens, runs = notes.get("tokens", ""), notes.get("runs", "0")  # older files have no runs, and are complete
    square = all(t.ndim == 2 and t.shape[0] == t.shape[1] and t.dtype == torch.float32 for t in tensors.values())
    counted = all(n.isascii() and n.isdecimal() and len(n) < 19 for n in (tokens, runs))
    if notes.get("format") != FORMAT or not counted or not square:
        raise PatchError(f"{path} holds no second moments: save_moments(moments, path, model) writes them")
    refuse_carried(model, "reading its moments")
    if notes.get("fingerprint") != known_fingerprint(model):
        raise PatchError(f"the moments in {path} are of other weights (the fingerprints differ): make them anew")
    moments = Moments({name: Metric(second) for name, second in tensors.items()}, int(tokens))
    return Begun(moments, int(runs), notes.get("texts", ""), notes.get("complete", "True") == "True")


ROWS, LENGTH = 8, 96  # of one run of strings
PAUSE = 30.0  # seconds between two states on disk, and 20 times as long as it takes to write one
WORDS = 8  # in a row that a text and a context do not share by chance


def second_moments(
    model: nn.Module, texts: Iterable[Any], tokenizer: Any = None, progress: Progress = silent,
    save: str | Path | None = None, without: str = "", place: str | None = None,
) -> Moments:  # fmt: skip
    """C = E[x xᵀ]/‖x‖² of what the matrices of one place (as in ``patch_model``) read on ``texts``; for ``patch_model(..., moments=)``.

    ``texts``: strings (then ``tokenizer`` is needed), token ids (T,) or (B, T), or keyword arguments of the model's forward; an iterator is
    never held whole.  Strings are put end to end and read in rows of 96 tokens, 8 rows a run.  ``save``: a file, written every so often;
    the same call with the same texts goes on from it, with the result of a call that was not interrupted, to the bit, and ``load_moments``
    reads it when it is complete.  ``without``: a context; strings with 8 words in a row of it are refused.

    A ``ControllabilityWarning`` names too few tokens: fewer than the widest matrix reads numbers.  Raises ``BadInput`` for texts that cannot be
    read, or none, and ``PatchError`` for a file that cannot be written, or of other texts or another model.  Source: theory 7.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1)
    >>> model = LlamaForCausalLM(config).eval()
    >>> moments = second_moments(model, [torch.arange(40), torch.arange(9, 29)])
    >>> moments
    Moments(6 matrices, 60 tokens)
    >>> ids = torch.arange(5, 17)[None]
    >>> source = {"input_ids": ids[:, -3:], "position_ids": torch.arange(9, 12)[None]}
    >>> from controllability import patch_model
    >>> mp = patch_model(model, {"input_ids": ids}, source, scope="last", moments=moments)
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise BadInput(f"second_moments: give a list of texts, got {type(texts).__name__}")
    model = uncompiled(model)
    sums = _Sums(model, None if save is None else Path(save), place)
    length = position_limit(text_config(model)) or LENGTH
    try:
        for count, inputs in _runs(texts, tokenizer, min(LENGTH, length), without):
            sums.take(inputs)
            progress("second moments", count, max(count, length_hint(texts)))
            sums.write(pause=PAUSE)
    except BaseException:
        sums.write()
        raise
    return sums.finished()


class _Sums:
    """The sums so far; not ``whole`` while a run is going on, which may be interrupted after some of the layers."""

    def __init__(self, model: nn.Module, path: Path | None, place: str | None) -> None:
        self.model, self.path, self.place, self.whole = model, path, place, True
        self.known = NOTHING if path is None else begun(path, model)  # what is on disk
        self.sums = {name: metric.second for name, metric in self.known.moments.metrics.items()}
        self.tokens, self.runs, self.digest = self.known.moments.tokens, 0, hashlib.sha256((place or "").encode())
        self.written, self.took = time.monotonic(), 0.0

    def take(self, inputs: Mapping[str, Any]) -> None:
        """Add one run, unless it is among those on disk."""
        refuse_malformed(inputs, "second_moments")
        if self.runs >= self.known.runs:
            self._add(inputs)
        for value in tree_leaves(sorted(inputs.items())):
            self.digest.update(f"{getattr(value, 'shape', value)}".encode())
            if isinstance(value, Tensor):
                self.digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.runs += 1
        self.whole = True
        if self.runs == self.known.runs and self.digest.hexdigest() != self.known.texts:
            self._refuse_other_texts()

    def _add(self, inputs: Mapping[str, Any]) -> None:
        inputs = on_device(dict(inputs), str(next(self.model.parameters()).device))
        mask = inputs.get("attention_mask")
        with own_modes(self.model):
            checked = checked_reading(self.model, inputs, self.place)
            refuse_bad_inputs(self.model, checked, inputs, "second_moments")
            valid = None if mask is None else mask.bool()
            listeners = [_Listener(layer, valid, self.sums) for layer in checked.reading.layers]
            lean = Runs(self.model, without_logits(self.model, [inputs], checked.tried))
            with lean, LayerHooks(self.model, checked.reading) as hooks:
                self.whole = False
                hooks.run(listeners, lean.inputs(inputs))
        self.tokens += sum(listener.rows for listener in listeners[:1])

    def write(self, pause: float = 0.0, complete: bool = False) -> None:
        """Put what is not on disk there, if it is to be there and the last time is long ago."""
        began = time.monotonic()
        if self.path is None or not self.whole or began - self.written < max(pause, 20 * self.took) * bool(pause):
            return
        if self.runs > self.known.runs or (complete and not self.known.complete):
            found = Begun(self.moments, self.runs, self.digest.hexdigest(), complete)
            write_begun(found, self.path, self.model)
            self.known, self.written = found, time.monotonic()
            self.took = self.written - began

    @property
    def moments(self) -> Moments:
        """Of the runs so far."""
        return Moments({name: Metric(second) for name, second in self.sums.items()}, self.tokens)

    def finished(self) -> Moments:
        """The moments, on disk as well.  Raises ``BadInput`` where there was nothing to read; warns of too few tokens."""
        if self.runs < self.known.runs:
            self._refuse_other_texts()
        if not self.tokens:
            why = "all tokens of the texts are padding" if self.runs else "there are no texts, or no tokens in them"
            raise BadInput(f"second_moments: {why}")
        self.write(complete=True)
        name = max(self.sums, key=lambda name: len(self.sums[name]), default="")
        if name and self.tokens < len(self.sums[name]):
            warnings.warn(
                f"second moments of {self.tokens:,} tokens: {name} reads {len(self.sums[name]):,} numbers, so the texts say nothing of "
                "some directions: give more texts", ControllabilityWarning, stacklevel=3,
            )  # fmt: skip
        return self.moments

    def _refuse_other_texts(self) -> None:
        raise BadInput(f"the moments in {self.path} were begun on other texts: give a new file, or the same texts")


def _runs(texts: Iterable[Any], tokenizer: Any, length: int, without: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(how many texts have been read, the inputs of the next run): strings end to end, everything else as it is."""
    held: list[int] = []
    lead: list[int] = []
    count, step, forbidden = 0, length, shares_words(without)
    for count, text in enumerate(texts, 1):
        if isinstance(text, Tensor | Mapping):
            yield count, text if isinstance(text, Mapping) else {"input_ids": text if text.ndim > 1 else text[None]}
            continue
        if not isinstance(text, str):
            raise BadInput(f"second_moments: give strings, token ids or inputs of the model, got {type(text).__name__}")
        if tokenizer is None:
            raise BadInput("second_moments: texts that are strings need tokenizer=")
        if forbidden(text):
            raise BadInput(f"second_moments: text {count} has {WORDS} words in a row of the context: leave it out")
        ids, first = with_special(tokenizer, text) if text else ([], 0)
        lead, held = lead or ids[:first], held + ids[first:]
        step = max(1, length - len(lead))
        whole = len(held) - len(held) % (ROWS * step)
        for start in range(0, whole, ROWS * step):
            yield count, _rows(lead, held[start : start + ROWS * step], step)
        held = held[whole:]
    whole = len(held) - len(held) % step
    for rest, size in ((held[:whole], step), (held[whole:], len(held) - whole)):
        if rest:
            yield count, _rows(lead, rest, size)


def _rows(lead: list[int], tokens: list[int], step: int) -> dict[str, Tensor]:
    rows = torch.tensor(tokens).reshape(-1, step)
    return {"input_ids": torch.cat([torch.tensor(lead, dtype=rows.dtype).expand(len(rows), -1), rows], dim=1)}


def shares_words(context: str) -> Callable[[str], bool]:
    """What says of a text whether it has 8 words in a row of a context; all of them, where the context has fewer.

    >>> shares = shares_words("Mia lives in Oslo .")
    >>> shares("They say that Mia lives in Oslo ."), shares("Mia lives in Rome .")
    (True, False)
    """
    size = min(WORDS, len(context.split()))

    def parts(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)} if size else set()

    known = parts(context)
    return lambda text: not known.isdisjoint(parts(text))


class _Listener(LayerListener):
    """Adds up, layer by layer, the directions that the matrices read."""

    def __init__(self, layer: Layer, valid: Tensor | None, sums: dict[str, Tensor]) -> None:
        self.layer, self.valid, self.sums = layer, valid, sums
        self.rows = 0  # tokens of the run
        # what the last tap read, and its moment: gate and up read the same
        self._read: tuple[Any, Tensor] | None = None

    def begins(self) -> None:
        self._read = None

    def entering(self, index: int, value: Tensor) -> None:
        self.rows = int(self.valid.sum()) if self.valid is not None else value.shape[0] * value.shape[1]

    def leaving(self, value: Tensor) -> None:
        self._read = None

    def computed(self, tap: Tap, x: Tensor, y: Tensor) -> None:
        names = matrices(self.layer, tap)
        if not names or x.ndim != 3:
            return
        if self._read is None or self._read[0] is not x:
            whole = gathered(x)
            rows = whole[self.valid.to(x.device)] if self.valid is not None else whole.reshape(-1, x.shape[-1])
            units = torch.nn.functional.normalize(rows.float(), dim=-1)
            self._read = x, units.mT @ units
        for name in names:
            held = self.sums.get(name)
            # a matrix that one run does not reach loses nothing; what was read from a file is on the CPU
            self.sums[name] = self._read[1].clone() if held is None else held.to(x.device).add_(self._read[1])
