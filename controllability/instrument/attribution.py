"""What each chunk of a context changed in the weights: increments along an order, their shares, and interventions beside them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from controllability.deltas import Delta, ExpertLowRank, LowRank, Shift
from controllability.errors import BadInput
from controllability.instrument.chunks import Rule, read
from controllability.instrument.interventions import LEFT_OUT, Interventions, intervene
from controllability.instrument.orders import orders_of, path
from controllability.instrument.states import Kept, Options, Solved, State, context_logprobs, solve_states
from controllability.models.hooks.carried_patches import uncompiled
from controllability.models.hooks.own_modes import own_modes
from controllability.models.patches.parts import Change
from controllability.models.reading.model_facts import position_limit, text_config
from controllability.models.reading.token_text import word
from controllability.models.sweep.target_run import Progress, silent
from controllability.rendering.figure import Heat, Lines, Panel
from controllability.rendering.study import Study, coloured
from controllability.rendering.tables import html_table, number

ALL = "all layers"
FEW = 9  # so many columns of layers, with that of all, does a table have


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Study):
    """A patch as the sum of its chunks' increments, at one token of the query.

    ``chunks`` (n) tell their characters and tokens; ``order`` is what was asked for and ``orders`` the O orders that were run; ``answer`` the
    text whose log-probability is taken.  For P ``parameters``, each in one of ``layers`` (P): ``shares`` (O, P, n), float64, ⟨ΔW_i − ΔW_{i−1}, ΔW⟩/‖ΔW‖², which sum to
    1 over the chunks (NaN where ΔW is 0); ``norms`` (O, P, n) of the increments, ``whole`` (P) those of ΔW.  ``logprobs`` (O, n + 1): of the answer along the path; for
    order "backward" without a patch, behind the chunks that are still in the source.  ``interventions`` is None where none were asked for.
    ``notes`` say what could not be done as planned; ``tokens`` how many were run for the patches (``plain``: by one run over context and query).
    """

    query: str
    answer: str
    order: str
    orders: list[Kept]
    shares: Tensor
    norms: Tensor
    whole: Tensor
    logprobs: Tensor
    solved: Solved
    paths: list[list[State]]
    interventions: Interventions | None = None

    chunks = property(lambda self: self.solved.reading.chunks)
    parameters = property(lambda self: tuple(self.solved.deltas))
    layers = property(lambda self: tuple(self.solved.layers[name] for name in self.solved.deltas))
    notes = property(lambda self: [*self.solved.notes])
    tokens = property(lambda self: self.solved.tokens)
    plain = property(lambda self: len(self.solved.reading.ids) + len(self.solved.reading.then))

    def matrices(self, layer: int | None = None) -> list[str]:
        """The patched matrices of a layer (None: of all); its vectors where it has none.

        Else vectors are left out of what is said of a layer: how much a norm's scale moves is up to the route.
        """
        if layer is not None and layer not in self.layers:
            raise BadInput(f"layer {layer}: there are {', '.join(map(str, dict.fromkeys(self.layers)))}")
        own = [name for name in self.parameters if layer in (None, self.solved.layers[name])]
        return [name for name in own if isinstance(self.solved.deltas[name], LowRank)] or own

    def score(self, layer: int | None = None) -> Tensor:
        """(n,): the chunks' shares of a layer's matrices as one vector (None: of those of all layers), averaged over the orders."""
        return self._scores(layer).mean(0)

    def spread(self, layer: int | None = None) -> Tensor:
        """(n,): the standard deviation of the same over the orders; 0 for one order, which says nothing of others."""
        return self._scores(layer).std(0, correction=0)

    def _scores(self, layer: int | None) -> Tensor:
        rows = [row for row, name in enumerate(self.parameters) if name in self.matrices(layer)]
        weights = (self.whole[rows] ** 2)[:, None]
        return (self.shares[:, rows].nan_to_num() * weights).sum(1) / weights.sum()

    def by_layer(self) -> dict[str, list[float]]:
        """The scores of all layers together, and of each."""
        return {ALL: self.score().tolist()} | {f"layer {n}": self.score(n).tolist() for n in dict.fromkeys(self.layers)}

    def increment(self, chunk: int, parameter: str, order: int = 0) -> Change:
        """ΔW_i − ΔW_{i−1} of a chunk in one order: twice the rank of a ΔW.  Raises ``BadInput`` for what there is not."""
        self._refuse_unknown(parameter)
        if not 0 <= chunk < len(self.chunks) or not 0 <= order < len(self.orders):
            raise BadInput(
                f"there are chunks 0 to {len(self.chunks) - 1} and orders 0 to {len(self.orders) - 1}, got {chunk} and {order}"
            )
        place = self.orders[order].index(chunk)
        both = self.solved.rows(self.paths[order][place : place + 2], parameter)
        return Change(parameter, self.solved.layers[parameter], increments(both).row(0))

    def patch(self, parameter: str) -> Change:
        """The whole ΔW of a parameter."""
        self._refuse_unknown(parameter)
        return Change(parameter, self.solved.layers[parameter], self.solved.rows(self.paths[0][-1:], parameter).row(0))

    def _refuse_unknown(self, parameter: str) -> None:
        if parameter not in self.parameters:
            raise BadInput(
                f"there is no parameter {parameter!r} among those patched: {', '.join(self.parameters[:4])} …"
            )

    @cached_property
    def residual(self) -> float:
        """The largest ‖Σ increments − ΔW‖/‖ΔW‖ over the parameters and orders, of the matrices themselves, in float64."""
        worst = 0.0
        for parameter in self.parameters:
            whole = self.patch(parameter).matrix
            for side in self.paths:
                steps = increments(self.solved.rows(side, parameter))
                if isinstance(steps, Shift):
                    total = steps.value.sum(0)
                else:  # one product of all their factors
                    total = steps.mapped(lambda held: held.flatten(0, 1)).dense()
                worst = max(
                    worst, float((total - whole).norm() / whole.norm().clamp_min(torch.finfo(whole.dtype).tiny))
                )
        return worst

    def records(self) -> list[dict[str, Any]]:
        """One record for each order, parameter and chunk."""
        return [
            {
                "order": o, "layer": self.layers[p], "parameter": name, "chunk": i, "start": chunk.start, "stop": chunk.stop,
                "norm": float(self.norms[o, p, i]), "share": float(self.shares[o, p, i]) if bool(self.whole[p] > 0) else None,
            }
            for o in range(len(self.orders)) for p, name in enumerate(self.parameters) for i, chunk in enumerate(self.chunks)
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: chunks with their scores by layer, orders, paths, interventions."""
        scores = self.by_layer()
        return {
            "answer": self.answer, "order": self.order, "orders": self.orders, "residual": self.residual,
            "chunks": [
                {"text": c.text, "start": c.start, "stop": c.stop, "tokens": [c.tokens.start, c.tokens.stop],
                 "shares": {name: of[i] for name, of in scores.items()}, "spread": float(self.spread()[i])}
                for i, c in enumerate(self.chunks)
            ],
            "logprobs": self.logprobs.tolist(), "interventions": None if self.interventions is None else self.interventions.to_dict(),
            "notes": [*self.notes], "tokens": self.tokens, "plain": self.plain,
        }  # fmt: skip

    def table(self) -> list[list[str]]:
        """A row a chunk, the heading first: its share of all layers, the spread, the fall of log p without it, its share of each of few layers."""
        scores, falls = self.by_layer(), self.interventions.leave_one_out if self.interventions else None
        columns = {"share": scores[ALL], "± over orders": self.spread().tolist()}
        columns |= {"log p falls without it": falls} if falls else {}
        columns |= scores if len(scores) <= FEW else {}
        columns.pop(ALL, None)
        cells = zip(*columns.values(), strict=True)
        rows = [[" ".join(c.text.split()), *map(number, row)] for c, row in zip(self.chunks, cells, strict=True)]
        return [["chunk", *columns], *rows]

    def below(self) -> str:
        """What is to be said of the whole."""
        start, end = self.logprobs[:, 0].mean(), self.logprobs[:, -1].mean()
        start, end = (end, start) if self.order == "backward" else (start, end)
        told = [
            f"answer {self.answer!r}: log p {start:.2f} without the context, {end:.2f} with it; increments sum to the patch up to {self.residual:.1g}",
            f"order {self.order} ({len(self.orders)} run): a description along it; another order gives other shares",
        ]
        if self.interventions:
            lds = self.interventions.lds
            best = max([*lds][1:-1], key=lambda who: lds[who] or -1)
            seen = ", ".join(f"{who} {number(lds[who])}" for who in (ALL, best, LEFT_OUT))
            told.append(f"rank correlation with {len(self.interventions.kept)} random ablations: {seen}")
        return "\n".join([*told, *self.notes])

    @property
    def title(self) -> str:  # type: ignore[override]
        """What the context did, to which query."""
        return f"What the context did to: {self.query.strip()}"

    def panels(self) -> Sequence[Panel]:
        scores = self.by_layer()
        names = [f"{i}: {c.text.strip():.24}" for i, c in enumerate(self.chunks)]
        lines = {f"order {o}": of for o, of in enumerate(self.logprobs[:8].tolist())}
        along = Lines("log p of the answer along the path", "chunks absorbed", "log p", range(len(names) + 1), lines)
        return [Heat("share of each layer's ΔW", [*scores], names, [*scores.values()]), along]

    def parts(self) -> list[str]:
        left = self.interventions.leave_one_out if self.interventions else [None] * len(self.chunks)
        told = [
            f"largest ‖increment‖: {number(float(self.norms[0, :, i].max()))}"
            + (f"\nlog p falls without it: {number(fall)}" if left else "")
            for i, fall in enumerate(left)
        ]
        text = coloured([c.text for c in self.chunks], self.by_layer(), told)
        return [text, html_table("Shares", self.table(), self.below())]


def attribute(
    model: nn.Module, tokenizer: Any, context: str, query: str, chunks: Rule = "sentence", order: Any = "forward",
    answer: str | None = None, permutations: int | None = None, seed: int = 0, ablations: int = 32, token: int = -1,
    via: str = "input-output", route: str = "secular", place: str | None = None, progress: Progress = silent,
) -> Attribution:  # fmt: skip
    """The patch that stands for a context as a sum of increments, one a chunk, with each one's share.

    ``chunks`` is "sentence", "line", "token", the texts themselves (which make up the context), or a function that gives them.  ``order``: "forward" (the
    patch of each beginning of the context), "backward" (the chunks leave the source from the front, while the target has all [arXiv 2507.16003]), a permutation (chunks
    are absorbed in that order; in the context they keep their places), or "all": every order of up to 4 chunks, ``permutations`` drawn with ``seed`` beyond (8).
    ``answer`` None is the contextual model's likeliest token.  ``token`` is the one of the query whose patch is taken.  ``ablations`` is
    how many random ones stand beside it, with leave-one-out (each runs a context by itself; 0: neither).  ``route`` is "secular" because its scale does not
    change where the context changes nothing; ``via`` and ``place`` are as in ``patch_model``.

    An order is a description and no cause: hold the shares against the interventions.  The model is left as it was.
    Raises ``BadInput``, and what ``patch_model`` raises.  Source: theory 10 (new).

    >>> import controllability as ct
    >>> model, tokenizer = ct.load_model("embedded")
    >>> found = ct.attribute(model, tokenizer, "Mia lives in Oslo . Leo lives in Rome .", "Where does Leo live ?")
    >>> found.answer, int(found.score(layer=2).argmax())
    ('Rome', 1)
    """
    if not isinstance(ablations, int) or isinstance(ablations, bool) or ablations < 0:
        raise BadInput(f"ablations must be a whole number from 0 on, got {ablations!r}")
    model = uncompiled(model)
    reading = read(tokenizer, context, query, chunks, answer, position_limit(text_config(model)))
    orders, backward = orders_of(order, len(reading.chunks), permutations, seed), order == "backward"
    paths = [path(each, backward) for each in orders]
    with own_modes(model):
        options = Options(via, route, place, token, progress)
        solved = solve_states(model, reading, (state for each in paths for state in each), options)
        sides = [[state[0] if backward else state[1] for state in each] for each in paths]
        lacking = [*dict.fromkeys(kept for side in sides for kept in side if kept not in solved.logprobs)]
        solved.logprobs |= zip(lacking, context_logprobs(model, solved.reading, lacking, place, progress), strict=True)
        logprobs = torch.tensor([[solved.logprobs[kept] for kept in side] for side in sides], dtype=torch.float64)
        said, what = (
            answer or word(tokenizer, solved.reading.answer[0]),
            order if isinstance(order, str) else "as given",
        )
        seen = Attribution(query, said, what, orders, *_numbers(solved, paths, orders), logprobs, solved, paths)
        if not ablations:
            return seen
        whole = solved.logprobs[tuple(range(len(reading.chunks)))]
        beside = intervene(model, solved.reading, seen.by_layer(), whole, ablations, seed, place, progress)
    return replace(seen, interventions=beside)


def _numbers(solved: Solved, paths: list[list[State]], orders: list[Kept]) -> tuple[Tensor, Tensor, Tensor]:
    """Shares and norms of the increments (O, P, n), and the norms of the whole (P)."""
    shares, norms, whole = [], [], []
    for side, order in zip(paths, orders, strict=True):
        at = torch.tensor(order).argsort()  # from places in the order to chunks
        for name in solved.deltas:
            rows = solved.rows(side, name)
            inner = rows.products(rows.row([-1]))[:, 0]
            whole.append(inner[-1].clamp_min(0).sqrt())
            shares.append((inner.diff() / inner[-1])[at])
            norms.append(sizes(increments(rows))[at])
    grid = len(orders), len(solved.deltas), -1
    return torch.stack(shares).reshape(grid), torch.stack(norms).reshape(grid), torch.stack(whole[: len(solved.deltas)])


def increments(rows: Delta) -> Delta:
    """ΔW_{i+1} − ΔW_i for rows ΔW_0 … ΔW_n: n rows, of twice the rank (of twice the experts)."""
    if isinstance(rows, Shift):
        return Shift(rows.value.diff(dim=0))
    later, earlier = rows.row(slice(1, None)), rows.row(slice(0, -1))
    axis = -3 if isinstance(rows, ExpertLowRank) else -2
    left, right = torch.cat([later.left, -earlier.left], axis), torch.cat([later.right, earlier.right], axis)
    more = {"index": torch.cat([later.index, earlier.index], -1)} if isinstance(rows, ExpertLowRank) else {}  # type: ignore[union-attr]
    return replace(rows, left=left, right=right, **more)


def sizes(rows: Delta) -> Tensor:
    """The Frobenius norm of each, also where an expert stands among the factors twice."""
    each = rows.mapped(lambda held: held[:, None])
    return each.products(each)[:, 0, 0].clamp_min(0).sqrt()
