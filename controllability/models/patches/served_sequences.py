"""The token sequences that a patch of scope all serves, and what is known of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from controllability.errors import BadInput
from controllability.interfaces import Path
from controllability.models.reading.positions import Positions
from controllability.models.sweep.cached_pass import BothPasts
from controllability.models.sweep.fallbacks import only_near
from controllability.models.sweep.layer_sweep import LayerSweep
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
