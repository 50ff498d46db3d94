"""What a sweep found out, layer by layer and token by token: plain data, ready for JSON and tables."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from controllability.arrays.one_line import OneLine
from controllability.models.sweep.records import LayerRecord
from controllability.rendering.tables import aligned, html_table, number

FRAGILE = 20.0  # ratio above which a patch is exact where it was made and fragile elsewhere
ROUNDINGS = 4.0  # unit roundoffs by which one layer's state is off, in a run that rounds otherwise


@dataclass(frozen=True)
class Sensitivity:
    """The relative change of the logits at the patched positions over that of all states, with the patch and without.

    Every entry of the input and of every layer's state is disturbed at once, by the same small relative amount and
    independently: what another kernel, a cache, a merge or a coarser dtype does.  ``note`` says why there are no numbers.
    """

    patched: float | None
    plain: float | None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How much more the patched model magnifies than the plain one."""
        return self.patched / self.plain if self.patched is not None and self.plain else None

    @property
    def fragile(self) -> bool:
        """Whether the patch is exact here and fragile elsewhere."""
        return self.ratio is not None and self.ratio > FRAGILE

    def expected(self, dtype: torch.dtype) -> float | None:
        """The relative error of the logits to expect of a run that rounds to ``dtype`` in its own way."""
        return None if self.patched is None else self.patched * ROUNDINGS * torch.finfo(dtype).eps / 2

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: ``patched``, ``plain``, ``ratio``, and ``note`` where there is one."""
        numbers = {"patched": self.patched, "plain": self.plain, "ratio": self.ratio}
        return numbers | ({"note": self.note} if self.note else {})

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Sensitivity":
        """What ``to_dict`` gave."""
        return Sensitivity(**{name: data[name] for name in asdict(Sensitivity(None, None)) if name in data})

    def __str__(self) -> str:
        if self.patched is None:
            return f"sensitivity: not measured ({self.note})"
        told = f"sensitivity: a small disturbance grows {self.patched:.2g} times with the patch, {self.plain:.2g} times without"
        return told + ("; exact here, fragile elsewhere" if self.fragile else "")


@dataclass(frozen=True, repr=False)
class Tokens(OneLine):
    """One layer's numbers for every pair, in the order of ``mp.rows``: lists of length N.

    ``residual``: max |difference| / max |target| of the layer's output at this token.  ``route``: the one this token
    took.  ``amplification``: by how much the norm after the patched map magnifies a rounding error of that
    map, relative to the largest entries of both (None without such a norm).  ``condition``, a parameter each: by how much a
    relative rounding error of a map's two summands, its own output and what the patch adds, is
    magnified in their sum; 1 where nothing cancels.  ``margins`` are in the order of the layer's; ``changes``
    are relative changes, a parameter each.
    """

    residual: list[float]
    route: list[str]
    amplification: list[float | None]
    condition: dict[str, list[float | None]]
    margins: list[list[float | None]]
    changes: dict[str, list[float | None]]


@dataclass(frozen=True, repr=False)
class LayerReport(OneLine):
    """One layer: residual of its output, margins of its side conditions, size of each patch, route taken.

    Each number is the worst over ``tokens``, which holds them one by one; ``residual`` is relative to
    the largest entry of all of them.
    """

    index: int
    residual: float
    route: str
    why: str
    amplification: float | None
    condition: float | None
    derivation: int
    margins: list[dict[str, Any]]
    relative_changes: dict[str, float | None]
    tokens: Tokens

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LayerReport":
        """What ``dataclasses.asdict`` made of one."""
        return cls(**{**data, "tokens": Tokens(**data["tokens"])})


class Layers(Sequence[LayerReport]):
    """The layers' reports, each written when it is first read: the sweep does not wait for them.

    ``norms`` are the Frobenius norms of the stored parameters.
    """

    def __init__(self, records: Iterable[LayerRecord], norms: dict[str, float]) -> None:
        self.records, self._norms = list(records), norms
        self._written: dict[int, LayerReport] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index not in self._written:
            self._written[index] = layer_report(self.records[index], self._norms)
        return self._written[index]

    def __repr__(self) -> str:
        return f"Layers({len(self)})"


@dataclass(frozen=True, repr=False)
class Report(OneLine):
    """A whole patch: options, layers, sizes.  ``residual`` is the largest of the layers'.

    ``pairs`` are (sample, position) of the source, one for each entry of the layers' tokens.  ``rounding`` says what
    the last ``merge`` into the weights cost, parameter by parameter.  ``fit`` is None where every layer's target is
    promised, else {"ridge": λ, "rank": the largest rank of a ΔW, or None}: least squares, which promise no target.  ``place`` is the
    half of a layer that was patched, ``level`` says where the model is then equal to its target: behind "every layer", or at the
    "logits" only.
    """

    scope: str
    via: str
    route: str
    dtype: str
    tokens: int
    numbers: int
    dense_numbers: int
    seconds: float
    layers: Sequence[LayerReport]
    pairs: list[list[int]] = field(default_factory=list)
    rounding: "list[Rounding]" = field(default_factory=list)
    fit: dict[str, Any] | None = None
    place: str = "feed-forward"
    level: str = "every layer"
    probe: Callable[[], Sensitivity] | None = field(default=None, repr=False, compare=False)

    @property
    def sensitivity(self) -> Sensitivity | None:
        """How much a small disturbance grows, with the patch and without; measured when it is first asked for."""
        return None if self.probe is None else self.probe()

    @property
    def residual(self) -> float:
        """The largest relative error of a layer's output at the paired positions."""
        return max((layer.residual for layer in self.layers), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("layers", "rounding", "probe")}
        found = {"layers": [asdict(x) for x in self.layers], "rounding": [asdict(x) for x in self.rounding]}
        sensitivity = self.sensitivity
        found |= {"residual": self.residual, "sensitivity": None if sensitivity is None else sensitivity.to_dict()}
        return plain | found

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Report":
        """What ``to_dict`` made of one; raises ``KeyError`` or ``TypeError`` for anything else."""
        data = {"place": "feed-forward", "level": "every layer"} | data  # what was written before there were others
        known = {f.name: data[f.name] for f in fields(cls) if f.name != "probe"}
        known["layers"] = [LayerReport.from_dict(layer) for layer in data["layers"]]
        known["rounding"] = [Rounding(**each) for each in data["rounding"]]
        if told := data.get("sensitivity"):
            known["probe"] = lambda: Sensitivity.from_dict(told)
        return cls(**known)

    def rows(self) -> list[list[str]]:
        """The table of the layers, its heading first: the worst token of each."""
        rows = [["layer", *COLUMNS]]
        for x in self.layers:
            margins = [m["margin"] for m in x.margins]
            cells = _cells(x.residual, x.route, x.amplification, x.condition, margins, x.relative_changes)
            rows.append([str(x.index), *cells])
        return rows

    def __str__(self) -> str:
        """The layers as a table: the worst token of each.  What holds of all of them stands below."""
        return f"{aligned(self.rows())}\n{self.below()}"

    def _repr_html_(self) -> str:
        return html_table(f"scope {self.scope}, {self.tokens} tokens, {self.dtype}", self.rows(), self.below())

    def table(self) -> str:
        """Every layer and token as a table for people; ``layers[i].tokens`` has the numbers."""
        rows = []
        for layer in self.layers:
            seen = layer.tokens
            for i, residual in enumerate(seen.residual):
                pair = f"{self.pairs[i][0]}:{self.pairs[i][1]}" if self.pairs else str(i)
                changes = {name: v[i] for name, v in seen.changes.items()}
                worst, margins = largest(v[i] for v in seen.condition.values()), [m[i] for m in seen.margins]
                numbers = residual, seen.route[i], seen.amplification[i], worst, margins, changes
                rows.append([str(layer.index), pair, *_cells(*numbers)])
        return f"{aligned([['layer', 'sample:position', *COLUMNS], *rows])}\n{self.below()}"

    def below(self) -> str:
        """What the columns say, and what is to be said of the patch as a whole."""
        told = EXPLAINED + (AT_THE_LOGITS if self.level == "logits" else "")
        told += "" if self.sensitivity is None else f"\n{self.sensitivity}"
        if self.fit is None:
            return told
        asked = [f"{name} {value:g}" for name, value in self.fit.items() if value]
        return told + (
            f"\na fit by least squares ({', '.join(asked)}), not exact: a layer's output misses its target by up to "
            f"{number(self.residual)} of the largest target"
        )


_NORM = re.compile(r"norm|\bln", re.IGNORECASE)
COLUMNS = ["residual", "route", "amplifies", "smallest margin", "‖ΔW‖/‖W‖", "max|Δm|/|m|"]
EXPLAINED = (
    "residual: how far a layer's output is from its target, relative to the largest entry"
    "\namplifies: how many times a rounding error of the patched map grows on its way out of the layer"
    "\nsmallest margin: how far the nearest side condition is from failing; 0 is failure"
    "\n‖ΔW‖/‖W‖, max|Δm|/|m|: the largest relative change of a map's weight, and of one entry of a norm's scale"
)
AT_THE_LOGITS = "\nexact at the logits: of several residual streams what the head reads is the target's, the streams themselves are not"


def _cells(residual: float, route: str, amplification: Any, condition: Any, margins: Any, changes: Any) -> list[str]:
    """One row of the table; the amplification is the condition where no norm follows."""
    least = min((v for v in margins if v is not None), default=None)
    maps, scales = (largest(v for k, v in changes.items() if bool(_NORM.search(k)) is norm) for norm in (False, True))
    numbers = condition if amplification is None else amplification, least, maps, scales
    return [number(residual), route, *map(number, numbers)]


def layer_report(record: LayerRecord, norms: dict[str, float]) -> LayerReport:
    """Plain numbers of what was kept of one layer."""
    residual, count = record.residuals(), len(record.error)
    changes = {name: record.change(name, norms) for name in record.leaves}
    condition = {name: values for name, leaf in record.leaves.items() if (values := leaf.condition()) is not None}
    margins = [_per_token(values, count) for _, _, values in record.margins]
    amplification = record.amplification()
    return LayerReport(
        record.index, record.residual(), record.route(),
        "; ".join(taken.why() for taken in record.routes) or "the only way here", largest(amplification),
        largest(v for values in condition.values() for v in values), record.derivation, _merged(record.margins, margins),
        {name: largest(values) for name, values in changes.items()},
        Tokens(residual, [record.route()] * count, amplification, condition, margins, changes),
    )  # fmt: skip


def _per_token(values: Any, count: int) -> list[float | None]:
    """The margins of a condition, the smallest of each token; None where it is vacuous."""
    if values is None:
        return [None] * count
    values = values.reshape(1, -1).expand(count, -1) if values.numel() < count else values.reshape(count, -1)
    return [None if math.isinf(v) else v for v in values.double().amin(-1).tolist()]


def _merged(named: list[tuple[str, str, Any]], margins: list[list[float | None]]) -> list[dict[str, Any]]:
    return [
        {"statement": s, "where": w, "margin": min((v for v in values if v is not None), default=None)}
        for (s, w, _), values in zip(named, margins, strict=True)
    ]


def largest(values: Iterable[float | None]) -> float | None:
    """The largest of the numbers among ``values``; None if there is none."""
    return max((v for v in values if v is not None), default=None)


@dataclass(frozen=True)
class Rounding:
    """One merged parameter.  E is what was stored less W + ΔW, z the input that the patch was solved for.

    ``relative``: ‖E‖ / ‖ΔW‖, above 1 where rounding moves the weights more than the patch does.  ``missed``: max |E z| /
    max |(W + ΔW) z|, what the map misses at its token (the largest over the chosen experts); None for vectors and
    for deltas of more than one input.  Both are 0 where nothing wider than the stored dtype could tell.
    """

    parameter: str
    relative: float
    missed: float | None
