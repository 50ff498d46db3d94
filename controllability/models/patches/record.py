"""What a patch of a whole model is: its entries, what it was made from, the sequences it serves, and the refusals that protect it."""

import threading
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from controllability.errors import BadInput, PatchError
from controllability.interfaces import JointOptions, Path
from controllability.models.hooks.carried_patches import carried, refuse_carried, refuse_on_it
from controllability.models.hooks.shards import refuse_unlike, sharded
from controllability.models.moments import Metric, Moments
from controllability.models.patches.applier import Entry
from controllability.models.reading.fingerprints import Look, changes, fingerprint, known_fingerprint, look_at
from controllability.models.reading.heads import Result
from controllability.models.reading.model_facts import input_embedding, modules_of, refuse_offloaded, refuse_training
from controllability.models.reading.positions import Positions
from controllability.models.reading.random_inputs import refuse_ids
from controllability.models.sweep.layer_sweep import LayerSweep
from controllability.models.sweep.one_pass import BothPasts
from controllability.models.sweep.report import Report, Sensitivity
from controllability.models.sweep.source_run import only_near
from controllability.solvers.served_tokens import Known

Learned = dict[tuple[int, int], dict[Path, Known]]  # (layer, call) -> what each steered leaf knows of its tokens
PLAIN = ("input_ids", "attention_mask")


@dataclass(eq=False)
class TokenSequence:
    """One sequence of the set: ids (n,) of both runs, pairs (k, 2) of (source, target), and the caches of both runs."""

    target: Tensor
    source: Tensor
    pairs: Tensor
    caches: BothPasts | tuple[Any, Any] | None = None

    def new_tokens(self, target: Tensor, source: Tensor) -> int:
        """How many tokens both ids have behind this sequence's; 0 where they do not go on from it alike."""
        count = len(target) - len(self.target)
        same = count > 0 and count == len(source) - len(self.source)
        if not same or not torch.equal(target[:-count], self.target) or not torch.equal(source[:-count], self.source):
            return 0
        return count if torch.equal(target[-count:], source[-count:]) else 0

    def stands_behind(self, context: Tensor) -> bool:
        """Whether the target is ``context`` and then the source, but for first tokens that are the context's as well."""
        first = len(self.source) - (len(self.target) - len(context))
        if not 0 <= first < len(self.source) or first > len(context):
            return False
        behind = torch.equal(self.target, torch.cat([context, self.source[first:]]))
        return behind and torch.equal(self.source[:first], context[:first])


@dataclass(eq=False)
class Stream:
    """What a patch of scope "all" remembers, to go on from: its tokens leaf by leaf, and its sequences.

    It ``goes_on`` if what earlier tokens give can stay: not in a fit, where a norm's scale is only near (or sizes are free), where
    positions are left out of the patch, which would move, or where padding on the left was taken away.
    """

    learned: Learned
    sequences: list[TokenSequence] = field(default_factory=list)
    goes_on: bool = True

    @staticmethod
    def of(solvers: list[LayerSweep], inputs: Mapping[str, Any], pairs: list[Any]) -> "Stream":
        """From a solved patch; ``pairs`` are its (source rows, target rows).  A fit has no ``solvers`` to go on from."""
        sequences = _sequences(inputs, *pairs)
        masks = [mask for role in ("target", "source") if (mask := inputs[role].get("attention_mask")) is not None]
        padded_left = bool(sequences) and any(not bool((mask[:, 0] != 0).all()) for mask in masks)
        goes_on = bool(solvers) and not padded_left and not only_near(solvers) and all(map(complete, sequences))
        return Stream(learned_by(solvers), sequences, goes_on)


def learned_by(solvers: list[LayerSweep]) -> Learned:
    """What the leaves know now of the tokens they serve."""
    return {(solver.layer.index, solver.call): dict(solver.run.served_after) for solver in solvers}


def complete(sequence: TokenSequence) -> bool:
    """Whether every position of the source has its pair."""
    return len(sequence.pairs) == len(sequence.source)


def batch_of(sequences: list[TokenSequence]) -> tuple[dict[str, Any], Positions]:
    """(the inputs of all sequences as one batch padded on the right, the source's rows)."""
    batch: dict[str, dict[str, Tensor]] = {}
    for role in ("target", "source"):
        ids = [getattr(s, role) for s in sequences]
        batch[role] = {"input_ids": pad_sequence(ids, batch_first=True)}
        if len({len(each) for each in ids}) > 1:
            mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
            batch[role] |= {"attention_mask": mask}
    most = max(len(s.pairs) for s in sequences)
    length = batch["source"]["input_ids"].shape[1]
    chosen = []
    for s in sequences:
        missing = most - len(s.pairs)
        if length - len(s.source) < missing:
            raise BadInput(
                "sequences that leave positions out cannot be put into one batch: pair every position, or all but the first"
            )
        padding = torch.arange(len(s.source), len(s.source) + missing)  # pairs of it count for nothing
        chosen.append(torch.cat([s.pairs, torch.stack([padding, 0 * padding], -1)]) if missing else s.pairs)
    found = torch.stack(chosen)
    sample = torch.cat([torch.full((len(s.pairs),), b) for b, s in enumerate(sequences)])
    rows = Positions(sample, torch.cat([s.pairs[:, 0] for s in sequences]), (len(sequences), length))
    return {**batch, "positions": (found[..., 0], found[..., 1])}, rows


def _sequences(inputs: Mapping[str, Any], rows: Positions, wanted: Positions) -> list[TokenSequence]:
    """The samples of a batch as sequences of their own, padding left out; [] for inputs that are not plain token ids."""
    found: list[TokenSequence] = []
    kept: dict[str, list[Tensor]] = {}
    for role in ("target", "source"):
        given = {k: v for k, v in inputs[role].items() if v is not None}
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or set(given) - {*PLAIN, "logits_to_keep"}:
            return []
        if ids.shape[1] != (rows if role == "source" else wanted).shape[1]:
            return []  # several states a position
        mask = given.get("attention_mask")
        kept[role] = [(m != 0).nonzero()[:, 0] for m in (torch.ones_like(ids) if mask is None else mask).cpu()]
    for b in range(len(kept["source"])):
        here, there = ({int(p): i for i, p in enumerate(kept[role][b])} for role in ("source", "target"))
        at = (rows.sample == b).nonzero()[:, 0].tolist()
        pairs = torch.tensor([(here[int(rows.position[i])], there[int(wanted.position[i])]) for i in at])
        pairs = pairs.reshape(-1, 2).long()  # a sample without pairs has numbers of no kind
        ids = [inputs[role]["input_ids"][b].cpu()[kept[role][b]] for role in ("target", "source")]
        found.append(TokenSequence(ids[0], ids[1], pairs))
    return found


Kind = Literal["module", "parameter", "dense", "none"]


@dataclass(frozen=True)
class Form:
    """How PEFT would reach one patched parameter: what a saved patch remembers for an export without the model.

    ``kind`` says by which list of the config; "none" comes with a reason ``why``.  ``shape`` is that of the stored
    parameter, ``swapped`` that lora_A holds its rows and lora_B its columns, ``key`` the module's name in an adapter file.
    """

    kind: Kind
    shape: tuple[int, ...]
    swapped: bool = False
    key: str = ""
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Form":
        """What ``to_dict`` gave."""
        fields: dict[str, Any] = data | {"shape": tuple(data["shape"])}
        return Form(**fields)


@dataclass(eq=False, repr=False)
class PatchRecord:
    """Every layer's patch, what the two runs gave, and the report.

    A patch loaded from disk has no runs; it remembers the model's name and how PEFT would reach each parameter
    (``forms``).
    """

    entries: tuple[Entry, ...]
    scope: str
    rows: Positions
    report: Report
    inputs: dict[str, Any]
    output: Result | None = None
    target_output: Result | None = None
    made_under: tuple[str, ...] = ()
    fingerprint: str | None = None
    model_name: str = ""
    joint: JointOptions | None = None
    moments: Moments | None = None
    merged: Any = None  # what the last merge did, a MergedError
    measured: Sensitivity | None = None
    stream: Stream | None = field(default=None, repr=False)
    extensions: list[Any] = field(default_factory=list, repr=False)
    forms: dict[str, Form] = field(default_factory=dict, repr=False)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _model: weakref.ref[nn.Module] | None = field(default=None, repr=False)
    _seen: Look = field(default=Look(), repr=False)
    _before_merge: Look = field(default=Look(), repr=False)
    _merged_state: Look = field(default=Look(), repr=False)
    _originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _merged_into: Any = field(default=None, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)  # taken behind the model's

    def __repr__(self) -> str:
        what = f"{len(self.report.layers)} layers, {self.report.tokens} tokens, {self.numbers:,} numbers, {self.report.dtype}"
        merged = ", merged" if self._merged_into is not None else ""
        return f"{type(self).__name__}(scope {self.scope!r}, {what}{merged})"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """By the parameter's name: in which metric its change is least."""
        return {} if self.moments is None else self.moments.metrics

    @property
    def logits(self) -> Tensor | None:
        """The patched logits (B, T, vocabulary) of the sweep itself (``last_hidden_state`` of models without logits).

        None for a patch that was loaded or extended.  Long runs keep their last hidden states in place of them: the logits are
        then computed anew by each look, and ``PatchError`` says so when the model is gone, or what stands behind its layers changed.
        """
        return None if self.output is None else self.output.logits()

    @property
    def target_logits(self) -> Tensor | None:
        """The target run's logits (B, P, vocabulary) at the paired positions, in each sample those of its P pairs in order.

        P is T where every source position has a pair, and 1 for scope "last": ``mp.target_logits[:, -1]`` is the last pair's in every
        scope.  Samples with fewer pairs (padding) begin with NaN.  None as for ``logits``; (B, n) of models with one output a sample.
        """
        return None if self.target_output is None else self.target_output.logits()

    def model(self) -> nn.Module:
        """The model this patch was made on.  Raises ``PatchError`` when it is gone, or was never in this process."""
        model = self._model() if self._model is not None else None
        if model is None:
            raise PatchError("the model that this patch was made on is gone: pass the model")
        return model

    def split(self, model: nn.Module | None = None) -> bool:
        """Whether ``model``, or the one that this patch was made on, is spread over several devices."""
        live = model if model is not None else self._model() if self._model is not None else None
        return live is not None and sharded(live)

    def mark(self) -> str:
        """The fingerprint of the weights that this patch is for, its own merge undone in thought."""
        if self.fingerprint:
            return self.fingerprint
        model = self.model()
        on_it = carried(model)
        if self._merged_into is model and on_it == (self.id,):
            return fingerprint(model, self._originals)
        refuse_carried(model, "saving")
        self.refuse_other_model(model)
        return known_fingerprint(model)

    def refuse_misuse(self, model: nn.Module) -> None:
        """Raise ``PatchError`` unless this patch can be put on ``model`` as it is now."""
        modules = modules_of(model)
        refuse_offloaded(model, modules)
        refuse_training(model, modules)
        if carried(model) != self.made_under:
            refuse_on_it(model, self.id, self.parameters, self.made_under)
        refuse_unlike(model, "patches", (self.inputs["source"], self.scope, sorted(self.parameters)))
        self.refuse_other_model(model)

    def refuse_other_model(self, model: nn.Module) -> None:
        """Raise ``PatchError`` unless ``model`` computes what this patch was made for: the same weights and settings."""
        same = self._model is not None and self._model() is model
        if changed := changes(self._seen if same else Look({}, self._seen.settings), look_at(model)):
            raise PatchError(
                f"{changed[0]} changed since this patch was made: make it again" if same else
                f"this patch was made for other weights or settings: {changed[0]}"
            )  # fmt: skip
        if not same and known_fingerprint(model) != self.mark():
            raise PatchError("this patch was made for other weights (the fingerprints differ)")
        for entry in self.entries if not same else ():  # a file may say anything
            entry.refuse_other_shape(model)
        if not same and (embedding := input_embedding(model)) is not None:
            for role in ("source", "target"):
                refuse_ids(self.inputs[role].get("input_ids", torch.zeros(1)), int(embedding.shape[0]), role)

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
