"""A patch of a whole model: applied for a while, merged into the weights, undone to the last bit."""

from __future__ import annotations

import inspect
import uuid
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from controllability.errors import BadInput, PatchError
from controllability.interfaces import Together
from controllability.models.hooks.carried_patches import (
    anything_applied,
    carried,
    carry,
    drop,
    load_of,
    put_down,
    refuse_on_it,
    uncompiled,
)
from controllability.models.hooks.installation import Installation
from controllability.models.hooks.layer_hooks import Watch
from controllability.models.patches.applier import Applier, Entry, refuse_other_tokens
from controllability.models.patches.corrected_merge import solved_again
from controllability.models.patches.merged_error import MergedError, merged_error
from controllability.models.patches.merging import refuse_quantised, refuse_shared, restore, write
from controllability.models.reading.checked_reading import known_reading
from controllability.models.reading.devices import refuse_offloaded
from controllability.models.reading.fingerprints import (
    State,
    changes,
    fingerprint,
    known_fingerprint,
    same_again,
    state_of,
)
from controllability.models.reading.positions import Rows, main_input
from controllability.models.sweep.report import Report, Rounding

if TYPE_CHECKING:
    from controllability.models.files.peft_export import Exported
    from controllability.models.files.peft_forms import Form
    from controllability.models.patches.extend import Extension
    from controllability.models.patches.served_sequences import Stream


@dataclass(eq=False)
class ModelPatch:
    """What ``patch_model`` returns: every layer's patch, the patched logits, and the report.

    ``logits`` (B, T, vocabulary) come from the sweep itself (``last_hidden_state`` of models
    without logits); None for a patch loaded from disk, which remembers the model's name and how PEFT would
    reach each parameter (``forms``).
    """

    entries: tuple[Entry, ...]
    scope: str
    rows: Rows
    report: Report
    inputs: dict[str, Any]
    logits: Tensor | None = None
    target_logits: Tensor | None = None
    made_under: tuple[str, ...] = ()
    fingerprint: str | None = None
    model_name: str = ""
    together: Together | None = None
    stream: Stream | None = field(default=None, repr=False)
    extensions: list[Extension] = field(default_factory=list, repr=False)
    forms: dict[str, Form] = field(default_factory=dict, repr=False)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _model: weakref.ref[nn.Module] | None = field(default=None, repr=False)
    _seen: State = field(default_factory=dict, repr=False)
    _before_merge: State = field(default_factory=dict, repr=False)
    _merged_state: State = field(default_factory=dict, repr=False)
    _originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _merged_into: Any = field(default=None, repr=False)

    # ------------------------------------------------------------------------------------ applying

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within this context the model's own modules compute with the patched weights.

        Matrices stay factored.  Everything is undone on exit, also after an exception or Ctrl-C.  One thread at a
        time: another that applies, merges or solves on the same model waits.  Compiled models (``torch.compile``) run
        uncompiled meanwhile, in every thread.  Raises ``PatchError`` when the patch was made for other weights, or
        while other patches were on the model.  More, with examples: docs/applying.md.

        >>> # with mp.applied(model): model(**source).logits
        """
        given, model = model, uncompiled(model)
        with load_of(model).lock:  # another thread waits: two patches at once would see each other's weights
            self._refuse_misuse(model)
            installation = Installation()
            try:
                carry(model, self.id, installation, self.parameters)
                installation.assign(model, "__deepcopy__", _refuse_copy)
                installation.assign(model, "__reduce_ex__", _refuse_copy)
                self._install(model, installation)
                yield given
            finally:
                in_order = put_down(model, self.id)
            if not in_order:
                raise PatchError("patches were left out of order: this one and those applied after it were all undone")

    def _install(self, model: nn.Module, installation: Installation) -> None:
        reading = known_reading(model)
        rows = self.rows if self.scope == "each" else None
        name = main_input(self.inputs["source"]) or ""
        if rows and name.endswith("input_ids") and name in inspect.signature(model.forward).parameters:
            valid = self.inputs["source"][name]
            installation.before(model, lambda ids: refuse_other_tokens(ids, valid), name)
        for layer in reading.layers:
            entries = [e for e in self.entries if e.layer == layer.index]
            if entries:
                applier = Applier(layer, entries, rows, 1 if rows else self._samples(entries[0]))
                Watch(
                    model, layer, applier, installation, applier.taps, states=False,
                    sequence_first=reading.architecture.sequence_first,
                )  # fmt: skip

    def _samples(self, entry: Entry) -> int:
        return len(self.rows.sample) if self.scope == "last" else 1

    def _refuse_misuse(self, model: nn.Module) -> None:
        refuse_offloaded(model)
        if carried(model) != self.made_under:
            refuse_on_it(model, self.id, self.parameters, self.made_under)
        self._refuse_other_model(model)

    def _refuse_other_model(self, model: nn.Module) -> None:
        if self._model is not None and self._model() is model:
            self._refuse_changes(model)
            return
        if known_fingerprint(model) != (self.fingerprint or self.fingerprint_of(self.model())):
            raise PatchError("this patch was made for other weights (the fingerprints differ)")

    def _refuse_changes(self, model: nn.Module) -> None:
        if changed := changes(self._seen, state_of(model)):
            raise PatchError(f"{changed[0]} changed since this patch was made: make it again")

    def extend(
        self, model: nn.Module, target: Mapping[str, Any], source: Mapping[str, Any], positions: Any = None
    ) -> Extension:
        """Add one sequence of token ids to a patch of scope "all", or the tokens by which a known one has grown.

        The block outputs of the earlier tokens do not move, and for a sequence that grows the cost is that of its new
        tokens (a cached step of each run, O(rank · width) a map); what a new joint scale costs is timed apart.  Returns an
        ``Extension``; the patch is changed in place, or left as it was.  Raises ``SideConditionFailed`` with a
        certificate where the new tokens contradict the earlier ones, ``PatchError`` while the patch is on a model.
        Source: theory 5, streaming (new).

        >>> # mp.extend(model, target={"input_ids": context_and_more}, source={"input_ids": more})
        """
        from controllability.models.patches.extend import extend

        return extend(self, model, target, source, positions)

    # ------------------------------------------------------------------------------------- merging

    def merge(self, model: nn.Module, corrected: bool = False) -> int:
        """Write the patch into the weights (W := W + ΔW, rounded to the model's dtype).

        Keeps the originals for ``unmerge`` and returns how many bytes that takes; ``report.rounding`` says what
        rounding cost each parameter, ``merged_error(model)`` measures the whole.  ``corrected=True`` solves each layer again
        on top of the rounded weights before it, so that rounding does not add up (one source run a layer).  Raises ``PatchError``
        when the patch is not one set of weights: scope "each" with more than one position, or one patch
        for each of several samples.
        """
        if self._merged_into is not None:
            raise PatchError("this patch is merged already: unmerge it first")
        self.refuse_several("merged into one set of weights")
        with load_of(model).lock:
            return self._merge(model, corrected)

    def refuse_several(self, done: str) -> None:
        """Raise ``PatchError`` unless this patch is one set of weights; ``done`` says what else cannot be done with it."""
        if any(entry.call for entry in self.entries):
            raise PatchError(
                "a layer of this model runs several times in one forward pass and has one patch a call: "
                f"they cannot be {done}; use applied()"
            )
        count = len(self.rows.sample)
        if self.scope == "all":
            return
        if count > 1:
            per = "position" if self.scope == "each" else "sample"
            raise PatchError(
                f"scope '{self.scope}' holds {count} patches, one a {per}: they cannot be {done}; "
                + ("use scope='last'" if self.scope == "each" else "patch a batch of 1")
            )
        positions = self.rows.shape[0] * (self.rows.shape[1] + self.rows.before)
        if self.scope == "each" and positions > 1:
            raise PatchError(
                f"scope 'each' holds a patch for one of {positions} positions and leaves the others as they are, which weights "
                f"cannot do: it cannot be {done}; use scope='last'"
            )

    def _merge(self, model: nn.Module, corrected: bool) -> int:
        model = uncompiled(model)
        self._refuse_misuse(model)
        if anything_applied(model):
            raise PatchError("a patch is applied at the moment: leave its context before merging")
        refuse_quantised(model, self.entries)
        refuse_shared(model, self.entries)
        originals: dict[str, Tensor] = {}
        rounding: list[Rounding] = []
        self._before_merge = state_of(model)
        try:
            for entry in solved_again(self, model) if corrected else self.entries:
                stored = model.get_submodule(entry.module)._parameters[entry.attribute]
                assert stored is not None
                originals.setdefault(entry.param.name, stored.detach().clone())
                rounding.append(write(stored, entry.param, entry.delta))
        except BaseException as error:
            restore(model, originals)
            same_again(model, originals, self._before_merge)
            if isinstance(error, RuntimeError):  # inference tensors, expanded weights
                why = str(error).splitlines()[0]
                raise PatchError(f"the weights cannot be written to: {why}; nothing was changed") from None
            raise
        self._originals, self._merged_into = originals, model
        self.report = replace(self.report, rounding=rounding)
        self._merged_state = state_of(model)
        carry(model, self.id, None, self.parameters)
        return sum(t.numel() * t.element_size() for t in originals.values())

    def unmerge(self, model: nn.Module) -> None:
        """Put the original weights back, bit for bit.

        Raises ``PatchError`` when the patch is not merged into ``model``, when another one is on top of it,
        or when the merged weights were changed since: nothing is overwritten then.
        """
        model = uncompiled(model)
        with load_of(model).lock:
            if self._merged_into is not model:
                raise PatchError("this patch is not merged into this model")
            if carried(model)[-1:] != (self.id,):
                raise PatchError("another patch was applied or merged after this one: undo that first")
            now = state_of(model)
            changed = [name for name in self._originals if now.get(name) != self._merged_state.get(name)]
            if changed:
                raise PatchError(f"parameter {changed[0]} changed since the merge: unmerging would overwrite that")
            restore(model, self._originals)
            same_again(model, self._originals, self._before_merge)
            self._originals, self._merged_into = {}, None
            drop(model, self.id)

    def merged_error(self, model: nn.Module) -> MergedError:
        """Run the merged model on the patch's own source.  See ``controllability.models.patches.merged_error``."""
        return merged_error(self, model)

    # -------------------------------------------------------------------------------------- saving

    def model(self) -> nn.Module:
        """The model this patch was made on.  Raises ``PatchError`` when it is gone, or was never in this process."""
        model = self._model() if self._model is not None else None
        if model is None:
            raise PatchError("the model that this patch was made on is gone: pass the model")
        return model

    def fingerprint_of(self, model: nn.Module) -> str:
        """The fingerprint of the weights that this patch is for, its own merge undone in thought."""
        on_it = carried(model)
        if self._merged_into is model and on_it == (self.id,):
            return fingerprint(model, self._originals)
        if self._model is not None and self._model() is model and not on_it:
            self._refuse_changes(model)
        if on_it:
            raise PatchError("patches are on the model at the moment: leave applied() or unmerge before saving")
        return known_fingerprint(model)

    def save(self, directory: str | Path, model: nn.Module | None = None) -> Path:
        """Write the patch as safetensors and JSON, atomically.  See ``controllability.models.files.patch_files``."""
        from controllability.models.files.patch_files import save_patch

        return save_patch(self, Path(directory), model)

    def export_peft(self, directory: str | Path, model: nn.Module | None = None) -> Exported:
        """Write the patch as a LoRA adapter that ``peft`` loads.  See ``controllability.models.files``."""
        from controllability.models.files.peft_export import export_peft

        return export_peft(self, Path(directory), model)

    def __reduce_ex__(self, _: Any) -> Any:
        raise PatchError(
            "a patch belongs to one model and is neither copied nor pickled: write it with mp.save(directory) and read "
            "it with ct.load_patch(directory), in another process too"
        )

    @property
    def parameters(self) -> frozenset[str]:
        """The names of the parameters that this patch changes."""
        return frozenset(entry.param.name for entry in self.entries)

    @property
    def numbers(self) -> int:
        """How many numbers the patch holds."""
        return sum(entry.delta.numbers for entry in self.entries)

    @property
    def dense_numbers(self) -> int:
        """How many numbers the dense ΔW would be (one position's worth for each patch)."""
        return sum(entry.delta.dense_numbers for entry in self.entries)


def _refuse_copy(_: Any) -> Any:
    raise PatchError(
        "a patch is applied at the moment: a copy of the model, or a file of it, would keep its hooks; leave the context before copying"
    )


def refuse_scope(scope: str) -> None:
    """Raise ``BadInput`` unless the scope is one that exists."""
    if scope not in ("each", "last", "all"):
        raise BadInput(f"unknown scope {scope!r}: choose each, last or all")
