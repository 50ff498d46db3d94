"""How two patches of one model differ, parameter by parameter, without building a dense ΔW."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from controllability.arrays.one_line import OneLine
from controllability.deltas import Delta, ExpertLowRank, LowRank, Shift
from controllability.errors import BadInput, PatchError
from controllability.models.patches.applier import Entry
from controllability.models.patches.record import PatchRecord
from controllability.models.reading.fingerprints import Look, changes


@dataclass(frozen=True)
class ParameterDifference:
    """One parameter in both patches; the lists have one number a patch (token or sample).

    ``norm_a`` and ``norm_b`` are Frobenius norms, ``difference`` is ‖ΔA − ΔB‖, ``cosine`` ⟨ΔA, ΔB⟩/(‖ΔA‖‖ΔB‖), None
    where one of them is zero.  ``difference`` and ``cosine`` are empty where the patches belong to other tokens.
    """

    parameter: str
    layer: int
    norm_a: list[float]
    norm_b: list[float]
    difference: list[float]
    cosine: list[float | None]

    @property
    def relative(self) -> float:
        """The largest of the differences, each relative to the larger of its two norms; 0 where both are zero."""
        sizes = zip(self.difference, _spread(self.norm_a, self.norm_b), _spread(self.norm_b, self.norm_a), strict=True)
        return max((d / max(a, b) for d, a, b in sizes if d), default=0.0)


@dataclass(frozen=True, repr=False)
class Difference(OneLine):
    """What ``diff`` found.  ``only_a`` and ``only_b`` are parameters that one patch moves and the other leaves alone.

    ``compared`` says which patches were held against which: "each" (row by row), "one" (the single one of one side
    against all of the other) or "norms" (they belong to other tokens: only their sizes are given).
    """

    parameters: list[ParameterDifference]
    only_a: list[str]
    only_b: list[str]
    compared: str
    about: str

    @property
    def largest(self) -> ParameterDifference | None:
        """The parameter whose change differs most, relative to its size; None where nothing was compared."""
        found = [p for p in self.parameters if p.difference]
        return max(found, key=lambda p: p.relative, default=None)

    @property
    def identical(self) -> bool:
        """Whether both patches are the same changes of the same parameters, bit for bit."""
        same = self.compared != "norms" and not any(d for p in self.parameters for d in p.difference)
        return same and not self.only_a and not self.only_b

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        largest = self.largest
        return asdict(self) | {"identical": self.identical, "largest": largest.parameter if largest else None}

    def __str__(self) -> str:
        rows = [["parameter", "‖ΔA‖", "‖ΔB‖", "‖ΔA − ΔB‖", "cosine"]]
        for p in self.parameters:
            cosines = [c for c in p.cosine if c is not None]
            rows.append([
                p.parameter, f"{max(p.norm_a):.3g}", f"{max(p.norm_b):.3g}",
                f"{max(p.difference):.3g}" if p.difference else "–", f"{min(cosines):.4f}" if cosines else "–",
            ])  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [self.about]
        for row in rows if self.parameters else ():
            cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells))
        lines += [f"only in {side}: {n}" for side, names in (("A", self.only_a), ("B", self.only_b)) for n in names]
        if self.largest and not self.identical:
            lines.append(f"differs most: {self.largest.parameter} ({self.largest.relative:.2g} of its size)")
        lines += ["identical"] if self.identical else []
        return "\n".join(lines)


def diff(a: PatchRecord, b: PatchRecord) -> Difference:
    """How two patches of one model differ: ‖ΔA‖, ‖ΔB‖, ‖ΔA − ΔB‖ and their cosine for each parameter, in float64.

    Patches of the same source positions are compared row by row; a single one (scope "last" or "all") with each of the other's.
    Raises ``PatchError`` for patches of different weights, ``BadInput`` for what is no patch of a model.

    >>> # print(ct.diff(ct.load_patch("monday"), ct.load_patch("tuesday")))
    """
    for patch in (a, b):
        if not isinstance(patch, PatchRecord):
            raise BadInput(
                f"diff compares two patches of a model (ct.patch_model, ct.load_patch), got {type(patch).__name__}"
            )
    _refuse_other_models(a, b)
    compared, about = _pairing(a, b)
    entries_a, entries_b = ({(str(e.param), e.layer, e.call): e for e in patch.entries} for patch in (a, b))
    shared = [key for key in entries_a if key in entries_b]
    with torch.no_grad():
        found = [_compare(entries_a[key], entries_b[key], compared) for key in shared]
    return Difference(
        found, [_name(e) for k, e in entries_a.items() if k not in entries_b],
        [_name(e) for k, e in entries_b.items() if k not in entries_a], compared, about,
    )  # fmt: skip


def _refuse_other_models(a: PatchRecord, b: PatchRecord) -> None:
    if a.made_under != b.made_under:
        raise PatchError("the patches were made on top of different others: they are changes of different weights")
    if a.fingerprint is None and b.fingerprint is None and a.model() is b.model():
        in_turn = changes(a._seen, b._seen), changes(b._seen, a._seen)  # either may have been made first
        if a._seen.tensors.keys() == b._seen.tensors.keys() and [] in in_turn:
            return
        raise PatchError("the model changed between the two patches: they are changes of different weights")
    if other := changes(*(Look({}, patch._seen.settings) for patch in (a, b))):
        raise PatchError(f"the patches were made for different settings: {other[0]}")
    marks = [patch.mark() for patch in (a, b)]
    if marks[0] != marks[1]:
        raise PatchError("the patches were made for different weights (their fingerprints differ)")


def _pairing(a: PatchRecord, b: PatchRecord) -> tuple[str, str]:
    """Which rows are compared, and a line that says so."""
    counts = [1 if patch.scope == "all" else len(patch.rows.sample) for patch in (a, b)]
    equal = torch.equal(a.rows.sample, b.rows.sample) and torch.equal(a.rows.position, b.rows.position)
    same = counts[0] == counts[1] and equal
    sides = " and ".join(f"{n} ({p.scope})" for n, p in zip(counts, (a, b), strict=True))
    if same or max(counts) == 1:
        per = "" if max(counts) == 1 else f", {counts[0]} patches each; the worst of them"
        return "each", f"scope '{a.scope}' and '{b.scope}'{per}"
    if min(counts) == 1:
        return "one", f"patches held: {sides}; the single one is compared with each of the others; the worst of them"
    return "norms", f"patches held: {sides}, for other positions: only the largest norms are given"


def _name(entry: Entry) -> str:
    return f"{entry.param} (call {entry.call})" if entry.call else str(entry.param)


def _compare(a: Entry, b: Entry, compared: str) -> ParameterDifference:
    norms = [_norms(entry.delta).tolist() for entry in (a, b)]
    distance: list[float] = []
    cosine: list[float | None] = []
    if compared != "norms":
        gap, inner = _gap(a.delta, b.delta)
        distance = gap.tolist()
        for dot, x, y in zip(inner.tolist(), _spread(norms[0], norms[1]), _spread(norms[1], norms[0]), strict=True):
            cosine.append(max(-1.0, min(1.0, dot / x / y)) if x and y else None)
    return ParameterDifference(_name(a), a.layer, norms[0], norms[1], distance, cosine)


def _spread(values: Sequence[float], like: Sequence[float]) -> Sequence[float]:
    """A single number as often as there are others."""
    return [values[0]] * len(like) if len(values) == 1 else values


# ------------------------------------------------------------------------------- numbers, in float64


def _slots(delta: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """(left (N, k, rank, out), right (N, k, rank, in), expert (N, k)); a plain matrix has one slot, of expert 0."""
    left, right = (f.detach().cpu().double() for f in (delta.left, delta.right))
    if isinstance(delta, ExpertLowRank):
        index = delta.index.detach().cpu().reshape(-1, delta.index.shape[-1])
        return left.reshape(len(index), -1, *left.shape[-2:]), right.reshape(len(index), -1, *right.shape[-2:]), index
    left, right = left.reshape(-1, 1, *left.shape[-2:]), right.reshape(-1, 1, *right.shape[-2:])
    return left, right, torch.zeros(len(left), 1, dtype=torch.long)


def _norms(delta: Delta) -> Tensor:
    """Frobenius norm of each row (N,)."""
    if isinstance(delta, Shift):
        return _vectors(delta).norm(dim=-1)
    left, right, _ = _slots(delta)
    return _product_norm(left, right).norm(dim=-1)


def _vectors(delta: Shift) -> Tensor:
    return delta.value.detach().cpu().double().reshape(-1, delta.value.shape[-1])


def _product_norm(left: Tensor, right: Tensor) -> Tensor:
    """‖leftᵀ right‖ (…) by QR: no squares of the factors, so that small differences keep their digits."""
    triangles = [torch.linalg.qr(f.transpose(-1, -2), mode="r").R for f in (left, right)]
    return torch.linalg.matrix_norm(triangles[0] @ triangles[1].transpose(-1, -2))


def _gap(a: Delta, b: Delta) -> tuple[Tensor, Tensor]:
    """(‖ΔA − ΔB‖, ⟨ΔA, ΔB⟩) of each row (N,); a single row serves all of the other's."""
    if isinstance(a, Shift) or isinstance(b, Shift):
        assert isinstance(a, Shift) and isinstance(b, Shift)
        x, y = _vectors(a), _vectors(b)
        return (x - y).norm(dim=-1), (x * y).sum(-1)
    left_a, right_a, expert_a = _slots(a)
    left_b, right_b, expert_b = _slots(b)
    same = (expert_a[:, :, None] == expert_b[:, None, :]).double()  # (N, k_a, k_b)
    partner_left, partner_right = (torch.einsum("nab,nbri->nari", same, f) for f in (left_b, right_b))
    alone = _product_norm(left_b, right_b) * (1 - same.amax(1))  # experts that only b changes
    left_a, right_a = left_a.expand(len(same), *left_a.shape[1:]), right_a.expand(len(same), *right_a.shape[1:])
    joint = torch.cat([_product_norm(*_subtracted(left_a, right_a, partner_left, partner_right)), alone], -1)
    products = (left_a @ partner_left.transpose(-1, -2)) * (right_a @ partner_right.transpose(-1, -2))
    return joint.norm(dim=-1), products.sum((-3, -2, -1))


def _subtracted(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of leftᵀright − other_leftᵀother_right.  With equal ranks as (L − L')ᵀR + L'ᵀ(R − R'): 0 for equal factors."""
    if left.shape[-2] == other_left.shape[-2]:
        return torch.cat([left - other_left, other_left], -2), torch.cat([right, right - other_right], -2)
    return torch.cat([left, -other_left], -2), torch.cat([right, other_right], -2)
