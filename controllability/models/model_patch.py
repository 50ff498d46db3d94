"""The face of a patch of a whole model: applied for a while, merged into the weights, extended, saved, exported."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from controllability.models.files.patch_files import read_patch, save_patch
from controllability.models.files.peft_export import Exported, export_peft
from controllability.models.files.peft_import import patch_of_adapter
from controllability.models.hooks.own_modes import own_modes
from controllability.models.patches.applied import applied
from controllability.models.patches.extend import Extension, extend, unlearn
from controllability.models.patches.measured import (
    Ablation,
    MergedError,
    ablation,
    merged_error,
    sensitivity_of,
    warn_if_fragile,
)
from controllability.models.patches.merging import as_weights as merged_for_a_while, merge, unmerge
from controllability.models.patches.parts import Change, Parts, change, select
from controllability.models.patches.record import PatchRecord
from controllability.models.sweep.report import LayerReport, Sensitivity


class ModelPatch(PatchRecord):
    """What ``patch_model`` returns: a ``PatchRecord``, with all that can be done with it."""

    @classmethod
    def of(cls, record: PatchRecord) -> "ModelPatch":
        """The face of a record."""
        patch = cls(**vars(record))
        patch.report = replace(patch.report, probe=lambda: sensitivity_of(patch))
        return patch

    def __len__(self) -> int:
        return len(self.report.layers)

    def __iter__(self) -> Iterator[LayerReport]:
        """The layers' reports."""
        return iter(self.report.layers)

    def __bool__(self) -> bool:
        return True  # also an imported one, which reports no layer

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    @property
    def sensitivity(self) -> Sensitivity:
        """How much a small disturbance of all states grows in the logits, with the patch and without.

        Measured when it is first asked for, by two short runs of the source each; ``note`` says why it could not be (the patch
        is merged, or was loaded without its model).  A ratio above 20 is called fragile.  Source: new.

        >>> # mp.sensitivity.ratio
        """
        return sensitivity_of(self)

    def select(
        self, layers: int | Iterable[int] | None = None, parameters: str | Iterable[str] | None = None,
        tokens: int | Iterable[int] | None = None,
    ) -> "ModelPatch":  # fmt: skip
        """The patch of some layers, parameters and tokens alone: a patch like any other, which promises no target.

        ``layers`` are numbers of layers, ``parameters`` names or patterns ("*.down_proj.weight"), ``tokens`` positions of the source,
        negative ones counted from the end; None is all of them.  Its report holds what was found when the whole was solved.
        Raises ``BadInput`` for what this patch has not, and for a token of a patch that has none by itself (scopes "last", "all").

        >>> # with mp.select(layers=range(4)).applied(model): model(**source).logits
        """
        return ModelPatch.of(select(self, layers, parameters, tokens))

    def delta(self, name: str, token: int | None = None, sample: int = 0, call: int = 0) -> Change:
        """The change of one parameter: ``matrix``, ``factors``, ``norm``, ``singular_values``.

        ``token`` is a position of the source (None: the last, or the one patch of scope "last" or "all"), ``call`` which call of a
        layer that runs several times.  Raises ``BadInput`` as ``select`` does.

        >>> # mp.delta("model.layers.5.mlp.down_proj.weight", token=-1).norm
        """
        return change(self, name, token, sample, call)

    def frame(self) -> Any:
        """A row for each parameter and token, as a ``pandas.DataFrame`` where pandas is installed, else a list of dicts.

        Columns: layer, call, parameter, sample, token, rank (factors that are not 0; None for a vector), norm ‖ΔW‖, relative_norm (‖ΔW‖/‖W‖; of a
        norm's scale max |Δm|/|m|), cosine_to_mean (with the mean ΔW of its sample's tokens), margin (the layer's least at this token), route.
        Sample and token are None for the one patch of scope "all".

        >>> # mp.frame()
        """
        return Parts(self).frame()

    def plot(self, path: str | Path | None = None) -> Any:
        """‖ΔW‖ by layer and token as a heat map: a matplotlib figure, or with ``path`` the file that it was written to.

        >>> # mp.plot("patch.png")
        """
        return Parts(self).plot(path)

    def ablation(self, model: nn.Module) -> Ablation:
        """What some layers' patches do alone: each layer alone, left out, cumulatively from below and from above.

        Four runs of the source a layer, one of the target and one without the patch; each row has its relative logit error and its KL
        against the contextual model and against the plain one.  Raises ``BadInput`` for a patch that has no target (loaded from an adapter, or a part),
        ``PatchError`` as ``applied`` does.  Source: new.

        >>> # mp.ablation(model).rows
        """
        return ablation(self, model)

    def applied(self, model: nn.Module, as_weights: bool = False) -> AbstractContextManager[nn.Module]:
        """Within this context the model's own modules compute with the patched weights.

        Matrices stay factored, and the weights as they are: what reads those (a file, a copy, a fused forward) is refused.
        ``as_weights=True`` writes the patch into them for the while, as ``merge`` does.  Everything is undone on exit, also after an exception or Ctrl-C.  One thread at a
        time: another that applies, merges or solves on the same model waits.  Compiled models (``torch.compile``) run
        uncompiled meanwhile, in every thread.  Raises ``PatchError`` when the patch was made for other weights, or
        while other patches were on the model; ``BadInput`` for a model in training mode.  More, with examples: docs/applying.md.

        >>> # with mp.applied(model): model(**source).logits
        """
        return merged_for_a_while(self, model) if as_weights else applied(self, model)

    def extend(
        self, model: nn.Module, target: Mapping[str, Any], source: Mapping[str, Any], positions: Any = None
    ) -> Extension:
        """Add one sequence of token ids to a patch of scope "all", or the tokens by which a known one has grown.

        The block outputs of the earlier tokens do not move, and for a sequence that grows the cost is that of its new
        tokens (a cached step of each run, O(rank · width) a map); what a new joint scale costs is timed apart.  Returns an
        ``Extension``; the patch is changed in place, or left as it was.  Raises ``SideConditionFailed`` with a
        certificate where the new tokens contradict the earlier ones, ``PatchError`` while the patch is on a model.
        A fit (``ridge``, ``rank``) is solved anew with the new tokens; one of a strength (``compile_context``) is refused.
        Source: theory 5, streaming (new).

        >>> # mp.extend(model, target={"input_ids": context_and_more}, source={"input_ids": more})
        """
        return extend(self, model, target, source, positions)

    def unlearn(self, model: nn.Module, context: Mapping[str, Any]) -> Extension:
        """Take a context out of a patch of scope "all": all sequences whose target is these token ids and then their source's own tokens.

        What is left is solved anew, so it is the patch that never knew this context.  Raises ``BadInput`` where no sequence has this
        context, or all have, ``PatchError`` as ``extend`` does; the patch is changed in place, or left as it was.  Source: theory 5 (new).

        >>> # mp.unlearn(model, {"input_ids": context})
        """
        return unlearn(self, model, context)

    def merge(self, model: nn.Module, corrected: bool | None = None, measured: bool = True) -> int:
        """Write the patch into the weights (W := W + ΔW, rounded to the model's dtype).

        Keeps the originals for ``unmerge`` and returns how many bytes that takes.  ``corrected=True`` solves each layer again
        on top of the rounded weights before it, so that rounding does not add up (a target run, and a source run in which each layer runs
        twice); None does so in half precision.  Unless ``measured`` is False the merged model is run on the source: ``merged``
        holds its errors, ``report.rounding`` what rounding cost each parameter, and a ``ControllabilityWarning`` says
        where it misses the target, or where the patch is fragile.  Raises ``PatchError`` when the patch is not one set of weights: scope
        "each" with more than one position, or one patch for each of several samples.
        """
        return merge(self, model, corrected, measured)

    def unmerge(self, model: nn.Module) -> None:
        """Put the original weights back, bit for bit.

        Raises ``PatchError`` when the patch is not merged into ``model``, when another one is on top of it,
        or when the merged weights were changed since: nothing is overwritten then.
        """
        unmerge(self, model)

    def merged_error(self, model: nn.Module) -> MergedError:
        """Run the merged model on the patch's own source.  See ``controllability.models.patches.merging``."""
        return merged_error(self, model)

    def save(self, directory: str | Path, model: nn.Module | None = None) -> Path:
        """Write the patch as safetensors and JSON, atomically.  See ``controllability.models.files.patch_files``."""
        warn_if_fragile(self, "saving", model)
        return save_patch(self, Path(directory), model)

    def export_peft(self, directory: str | Path, model: nn.Module | None = None) -> Exported:
        """Write the patch as a LoRA adapter that ``peft`` loads.  See ``controllability.models.files``."""
        warn_if_fragile(self, "exporting", model)
        with own_modes(model) if model is not None else nullcontext():
            return export_peft(self, Path(directory), model)


def load_patch(directory: str | Path) -> ModelPatch:
    """A patch written by ``mp.save``.  Only JSON and safetensors are read.

    Raises ``PatchError`` for a missing, truncated or corrupt patch and for another format version.
    Whether the weights are the right ones is checked when it is applied or merged.
    """
    return ModelPatch.of(read_patch(directory))


def import_peft(directory: str | Path, model: nn.Module) -> ModelPatch:
    """A LoRA adapter as a patch of ``model``: scope "last", one set of weights, for ``applied``, ``merge`` and ``save``.

    Only JSON and safetensors are read, and the ``peft`` package is not needed.  Any rank, ``lora_alpha``, rsLoRA,
    ``target_parameters`` and ``modules_to_save`` are understood.  Raises ``PatchError`` for what a patch cannot say
    (another method, DoRA, LoRA on attention or embeddings: the module is named) and for an adapter that was exported
    for other weights.

    >>> # mp = ct.import_peft("adapter", model)
    >>> # with mp.applied(model): model(**inputs)
    """
    with own_modes(model):
        return ModelPatch.of(patch_of_adapter(directory, model))
