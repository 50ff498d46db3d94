"""A patch in parts: some of its layers, parameters and tokens, one ΔW as a matrix, all of them as a table.  (new)"""

import math
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor

from controllability.arrays.one_line import OneLine
from controllability.deltas import Delta, ExpertLowRank, LowRank, Shift
from controllability.errors import BadInput
from controllability.models.patches.applier import Entry
from controllability.models.patches.record import PatchRecord
from controllability.models.reading.positions import Positions, main_input
from controllability.models.sweep.report import LayerReport, Tokens
from controllability.rendering.figure import Heat, Panel
from controllability.rendering.study import Study

Record = TypeVar("Record", bound=PatchRecord)
Several = int | Iterable[int] | None


@dataclass(frozen=True, eq=False, repr=False)
class Change(OneLine):
    """The change of one parameter at one token: ``parameter``, its ``layer``, and ``delta`` without a token axis."""

    parameter: str
    layer: int
    delta: Delta

    @property
    def matrix(self) -> Tensor:
        """ΔW as stored: (out, in), (experts, out, in), or a vector (n,)."""
        return self.delta.dense()

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(left (rank, out), right (rank, in)) with ΔW = Σ_k left_k right_kᵀ, before those of experts (k,); None for a vector."""
        return (self.delta.left, self.delta.right) if isinstance(self.delta, LowRank) else None

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        one = self.delta.mapped(lambda held: held[None])
        return float(one.products(one)[0, 0].clamp_min(0).sqrt())

    @property
    def singular_values(self) -> Tensor:
        """Those that need not be 0, the largest first: as many as there are factors; of a vector its norm."""
        delta = self.delta
        if isinstance(delta, Shift):
            return torch.tensor([self.norm], dtype=delta.value.dtype)
        if not isinstance(delta, ExpertLowRank):
            return _singular_values(delta.left, delta.right)
        pairs = (
            (delta.left[here].flatten(0, 1), delta.right[here].flatten(0, 1))
            for here in (delta.index == e for e in delta.index.unique())
        )
        return torch.cat([_singular_values(*pair) for pair in pairs]).sort(descending=True).values


def _singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Of leftᵀ right, from (rank, out) and (rank, in)."""
    small, other = (torch.linalg.qr(f.mT.to(torch.promote_types(f.dtype, torch.float32))).R for f in (left, right))
    return torch.linalg.svdvals(small @ other.mT)


def select(patch: Record, layers: Several = None, parameters: Any = None, tokens: Several = None) -> Record:
    """The patch of some layers, parameters and source positions alone.  See ``ModelPatch.select``."""
    entries, kept = [*patch.entries], list(range(len(patch.rows.sample)))
    if layers is not None:
        known = sorted({entry.layer for entry in entries})
        asked = _numbers(layers, known, known[-1] + 1 if known else 0, "layers")
        entries = [entry for entry in entries if entry.layer in asked]
    if parameters is not None:
        entries = _named(entries, [parameters] if isinstance(parameters, str) else parameters)
    if tokens is not None:
        _refuse_no_token(patch, "tokens")
        where = _tokens(patch)
        asked = _numbers(tokens, sorted({*where}), _length(patch), "tokens")
        kept = [row for row, position in enumerate(where) if position in asked]
    return _part(patch, entries, kept)


def _part(patch: Record, entries: list[Entry], kept: list[int]) -> Record:
    rows, report, inputs = patch.rows, patch.report, patch.inputs
    if len(entries) < len(patch.entries) or len(kept) < len(rows.sample):
        inputs = inputs | {"target": {}}  # what is left promises no target: nothing may be corrected towards it
    if len(kept) < len(rows.sample):
        rows = Positions(rows.sample[kept], rows.position[kept], rows.shape, rows.before, rows.valid)
        entries = [replace(entry, delta=entry.delta.row(kept)) if _by_row(entry.delta) else entry for entry in entries]
    numbered = {(entry.layer, entry.call) for entry in entries}
    layers = [_of_rows(layer, kept) for number, layer in _layers(patch) if number in numbered]
    report = replace(
        report, layers=layers, tokens=len(kept), pairs=rows.named() if report.pairs else [], rounding=[],
        numbers=sum(e.delta.numbers for e in entries), dense_numbers=sum(e.delta.dense_numbers for e in entries),
    )  # fmt: skip
    return replace(
        patch, entries=tuple(entries), rows=rows, report=report, inputs=inputs, output=None, target_output=None, merged=None,
        measured=None, stream=None, extensions=[], id=uuid.uuid4().hex, _originals={}, _merged_into=None,
        _lock=threading.RLock(),
    )  # fmt: skip


def change(patch: PatchRecord, name: str, token: int | None = None, sample: int = 0, call: int = 0) -> Change:
    """The change of one parameter.  See ``ModelPatch.delta``."""
    entries = [entry for entry in _named([*patch.entries], [name]) if entry.call == call]
    if len(entries) != 1:
        found = ", ".join(str(entry.param) for entry in entries) or f"none in call {call}"
        raise BadInput(f"{name!r} names {len(entries)} changes ({found}): name one")
    (entry,) = entries
    if not _by_row(entry.delta):
        if token is not None:
            _refuse_no_token(patch, "token")
        return Change(str(entry.param), entry.layer, entry.delta)
    if patch.scope == "each":
        asked = _numbers(-1 if token is None else token, sorted({*_tokens(patch)}), _length(patch), "token")
        rows = [row for row, position in enumerate(_tokens(patch)) if position in asked]
    else:
        if token not in (None, -1):
            _refuse_no_token(patch, "token")
        rows = list(range(len(patch.rows.sample)))
    rows = [row for row in rows if int(patch.rows.sample[row]) == sample]
    if not rows:
        raise BadInput(f"this patch has no such token of sample {sample}: it has {patch.rows.shape[0]} samples")
    return Change(str(entry.param), entry.layer, entry.delta.row(rows[0]))


@dataclass(frozen=True, eq=False, repr=False)
class Parts(Study):
    """A patch as a table: one row for each parameter and token.  See ``ModelPatch.frame``."""

    patch: PatchRecord
    title = "The patch, parameter by parameter and token by token"

    def records(self) -> list[dict[str, Any]]:
        found = self.columns()
        return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]

    def columns(self) -> dict[str, list[Any]]:
        """The same by column, an entry a row."""
        reports, pairs, found = dict(_layers(self.patch)), self.patch.rows.named(), dict[str, list[Any]]()
        for entry in self.patch.entries:
            for name, values in _columns(entry, reports.get((entry.layer, entry.call)), pairs).items():
                found.setdefault(name, []).extend(values)
        return found

    def panels(self) -> Sequence[Panel]:
        sums: dict[tuple[int, str], float] = {}
        for row in self.records():
            where = row["layer"], "all" if row["token"] is None else f"{row['sample']}:{row['token']}"
            sums[where] = sums.get(where, 0.0) + row["norm"] ** 2
        layers, tokens = (list(dict.fromkeys(which)) for which in zip(*sums, strict=True))
        values = [[math.sqrt(sums.get((layer, token), 0.0)) for token in tokens] for layer in layers]
        return [Heat("‖ΔW‖ of a layer at a token (sample:position)", [f"layer {n}" for n in layers], tokens, values)]


def _columns(entry: Entry, layer: LayerReport | None, pairs: list[list[int]]) -> dict[str, list[Any]]:
    delta, name = entry.delta, str(entry.param)
    single = not _by_row(delta)
    rows, pairs = (delta.mapped(lambda held: held[None]), [[None, None]]) if single else (delta, pairs)  # type: ignore[list-item]
    count, sample = len(pairs), torch.tensor([pair[0] or 0 for pair in pairs])
    inner = rows.products(rows).double().cpu()
    same = (sample[:, None] == sample).double()
    same /= same.sum(-1, keepdim=True)  # each row's mean is over the tokens of its sample
    means = (same * inner).sum(-1), ((same @ inner) * same).sum(-1)
    norms = rows.norms().double().cpu()
    cosines = means[0] / (norms * means[1].clamp_min(0).sqrt())
    seen = None if layer is None else layer.tokens
    margins = [] if seen is None else [*zip(*seen.margins, strict=True)] or [()] * len(seen.route)
    margins = [tuple(v for one in margins for v in one)] if single else margins
    changes = ([] if seen is None else seen.changes.get(name, []))[:count]
    return {
        "layer": [entry.layer] * count, "call": [entry.call] * count, "parameter": [name] * count,
        "sample": [pair[0] for pair in pairs], "token": [pair[1] for pair in pairs],
        "rank": [None] * count if isinstance(delta, Shift) else _ranks(rows), "norm": norms.tolist(),
        "relative_norm": changes or [None] * count,
        "cosine_to_mean": [v if math.isfinite(v) else None for v in cosines.tolist()],
        "margin": [min((v for v in each if v is not None), default=None) for each in margins] or [None] * count,
        "route": [None] * count if seen is None else seen.route[:count],
    }  # fmt: skip


def _ranks(rows: Any) -> list[int]:
    """How many factors the ΔW of each row has that are not 0."""
    return (rows.left.any(-1) & rows.right.any(-1)).flatten(1).sum(1).tolist()


def _by_row(delta: Delta) -> bool:
    """Whether a delta has a row for each pair, and not one for all of them."""
    axes = 1 if isinstance(delta, Shift) else 3 if isinstance(delta, ExpertLowRank) else 2
    first: Any = delta.value if isinstance(delta, Shift) else delta.left
    return first.ndim == axes + 1


def _layers(patch: PatchRecord) -> Iterator[tuple[tuple[int, int], LayerReport]]:
    """(layer, call) and its report."""
    calls: dict[int, int] = {}
    for layer in patch.report.layers:
        yield (layer.index, calls.get(layer.index, 0)), layer
        calls[layer.index] = calls.get(layer.index, 0) + 1


def _of_rows(layer: LayerReport, kept: list[int]) -> LayerReport:
    seen, pick = layer.tokens, lambda values: [values[row] for row in kept]
    return replace(layer, tokens=Tokens(
        pick(seen.residual), pick(seen.route), pick(seen.amplification), {n: pick(v) for n, v in seen.condition.items()},
        [pick(v) for v in seen.margins], {n: pick(v) for n, v in seen.changes.items()},
    ))  # fmt: skip


def _length(patch: PatchRecord) -> int:
    """How many positions the source has; a model of several streams has as many rows for each."""
    name = main_input(patch.inputs["source"])
    return int(patch.inputs["source"][name].shape[1]) if name else patch.rows.shape[1]


def _tokens(patch: PatchRecord) -> list[int]:
    return (patch.rows.position % _length(patch)).tolist()


def _refuse_no_token(patch: PatchRecord, what: str) -> None:
    if patch.scope != "each":
        raise BadInput(
            f"{what}: a patch of scope {patch.scope!r} is one set of weights for all tokens and has none for a token alone; make it "
            "with scope='each', or leave the token out"
        )


def _numbers(asked: Any, known: list[int], length: int, what: str) -> set[int]:
    """The numbers asked for, negative ones counted from ``length`` back.  Raises ``BadInput`` for one that is not ``known``."""
    try:
        given: list[Any] = [asked] if isinstance(asked, int) else [*asked]
    except TypeError:
        raise BadInput(f"{what}: give whole numbers, got {asked!r}") from None
    if wrong := [n for n in given if not isinstance(n, int) or isinstance(n, bool)]:
        raise BadInput(f"{what}: give whole numbers, got {wrong[0]!r}")
    found = {n + length if n < 0 else n for n in given}
    if strange := sorted(n for n in found if n not in known) or ([] if found else ["none"]):
        shown = ", ".join(map(str, known[:20])) + (" …" if len(known) > 20 else "")
        raise BadInput(f"{what}: this patch has no {strange[0]}; it has {shown or 'none'}")
    return found


def _named(entries: list[Entry], patterns: Any) -> list[Entry]:
    """The entries whose parameter one of the names, or patterns with ``*``, is.  Raises ``BadInput`` for one that fits none."""
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise BadInput(f"parameters: give names, or patterns such as '*.down_proj.weight', got {patterns!r:.80}")
    fits = lambda entry, name: name in (str(entry.param), entry.param.name) or fnmatchcase(entry.param.name, name)  # noqa: E731
    for pattern in patterns:
        if not any(fits(entry, pattern) for entry in entries):
            some = ", ".join(dict.fromkeys(entry.param.name for entry in entries[:4])) or "none"
            raise BadInput(f"this patch changes no parameter {pattern!r}; it changes {some}{' …' * (len(entries) > 4)}")
    return [entry for entry in entries if any(fits(entry, pattern) for pattern in patterns)]
