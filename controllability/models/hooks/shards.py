"""Tensor-parallel models: what a module reads and gives on one device, as the slice of the whole that it is.

transformers stores such a weight as a ``DTensor`` and computes with plain local tensors.  A listener is told ``DTensor``\\ s, so
torch itself sends what an inner product over split features needs: ‖y‖² of a token, or the Gram matrix of several.
Source: theory, section 9.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.placement_types import Placement


class Layout:
    """How the features of what a module reads and gives are split: by the rows or the columns of its weight."""

    def __init__(self, module: nn.Module) -> None:
        weight = next((p for p in module._parameters.values() if isinstance(p, DTensor)), None)
        self.mesh = weight.device_mesh if weight is not None else None
        self.reads = self._split(weight, -1)
        self.gives = self._split(weight, 0)

    @staticmethod
    def _split(weight: DTensor | None, axis: int) -> tuple[Placement, ...]:
        if weight is None:
            return ()
        wanted = axis % weight.ndim
        return tuple(Shard(-1) if p.is_shard(wanted) else Replicate() for p in weight.placements)

    def whole(self, value: Tensor, placements: tuple[Placement, ...]) -> Tensor:
        """A local tensor as the slice that it is; one that every device holds whole stays plain."""
        if self.mesh is None or all(p.is_replicate() for p in placements):
            return value
        return DTensor.from_local(value, self.mesh, [Shard(value.ndim - 1) if p.is_shard() else p for p in placements])

    def local(self, value: Tensor, placements: tuple[Placement, ...]) -> Tensor:
        """What this device goes on with."""
        if not isinstance(value, DTensor):
            return value
        return value.redistribute(placements=[Shard(value.ndim - 1) if p.is_shard() else p for p in placements]).to_local()


def sharded(model: nn.Module) -> bool:
    """Whether any parameter of the model is split over devices."""
    return any(isinstance(p, DTensor) for p in model.parameters())


_WITHIN = [0]  # how many contexts are open: torch's own forgets the outer one at the end of the inner


@contextmanager
def plain_is_replicated(split: bool) -> Iterator[None]:
    """Within this context, if anything is ``split``, a plain tensor beside a ``DTensor`` counts as one that every device holds whole."""
    with implicit_replication() if split and not _WITHIN[0] else nullcontext():
        _WITHIN[0] += split
        try:
            yield
        finally:
            _WITHIN[0] -= split


def once(action: Callable[[], None], split: bool) -> None:
    """Let one process do what is ``split`` over several; the others wait, and end with its error where it fails."""
    if not split:
        return action()
    told: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            told = [error]
    dist.broadcast_object_list(told, 0)
    if told[0] is not None:
        raise told[0]
