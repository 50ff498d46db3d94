"""Tensor-parallel models: what a module reads and gives on one device, as the slice of the whole that it is.

transformers stores such a weight as a ``DTensor`` and computes with plain local tensors.  A listener is told ``DTensor``\\ s, so
torch itself sends what an inner product over split features needs: ‖y‖² of a token, or the Gram matrix of several.
Source: theory, section 9.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.placement_types import Placement
from torch.utils._pytree import tree_leaves

from controllability.errors import BadInput
from controllability.version import __version__

Side = Literal["reads", "gives"]


class Layout:
    """How the features of what a weight reads and gives are split over devices; of a weight that is not split nothing is done.

    Where torch can compute with the slices a listener is told them as one ``DTensor``; packed matrices and experts' are gathered.
    """

    def __init__(self, weight: Tensor | None, transposed: bool = False, experts: bool = False) -> None:
        self.weight = weight if isinstance(weight, DTensor) else None
        self.experts = experts
        if experts and self.weight is not None and any(getattr(p, "dim", None) == 0 for p in self.weight.placements):
            raise BadInput(
                "the experts of this model are spread over devices (expert parallelism), and no device computes all that a token "
                "chose: load it with tensor parallelism alone. Nothing was changed"
            )
        self.axes = {"reads": -2, "gives": -1} if transposed else {"reads": -1, "gives": -2}

    @staticmethod
    def of(module: nn.Module) -> "Layout":
        """That of a module's matrix."""
        return Layout(next((p for p in module._parameters.values() if p is not None and p.ndim == 2), None))

    def _split(self, side: Side, value: Tensor) -> list[Placement]:
        """The placements of a value whose last axis is split as the weight's axis is."""
        assert self.weight is not None
        wanted, last = self.axes[side] % self.weight.ndim, value.ndim - 1
        splits: list[Any] = [p if getattr(p, "dim", None) == wanted else None for p in self.weight.placements]
        return [Replicate() if p is None else type(p)(last, **_packed(p)) for p in splits]

    def told(self, value: Tensor, side: Side) -> Tensor:
        """What this device holds of a value, as the slice of the whole, or the whole."""
        if self.weight is None:
            return value
        if value.shape[-1] == self.weight.shape[self.axes[side]]:  # not split, or a summand
            return DTensor.from_local(value, self._mesh, [Partial()]).full_tensor() if self._summand(side) else value
        split = self._split(side, value)
        slices = DTensor.from_local(value, self._mesh, split)
        return slices.full_tensor() if self.experts or any(map(_packed, split)) else slices

    def local(self, changed: Tensor, told: Tensor, value: Tensor) -> Tensor:
        """What this device goes on with in place of ``value``, which was ``told``: its slice, or its summand."""
        if self.weight is None:
            return changed
        if isinstance(changed, DTensor):
            changed = changed.redistribute(placements=self._split("gives", changed))
            return changed.to_local()
        if changed.shape[-1] != value.shape[-1]:
            split = self._split("gives", changed)
            return distribute_tensor(changed, self._mesh, split, src_data_rank=None).to_local()
        if self._summand("gives"):
            return value + (changed - told) if self._mesh.get_local_rank() == 0 else value
        return changed

    @property
    def _mesh(self) -> DeviceMesh:
        assert self.weight is not None
        return self.weight.device_mesh

    def _summand(self, side: Side) -> bool:
        """Whether an expert's output is a sum over devices that is yet to be taken."""
        assert self.weight is not None
        wanted = self.axes["reads"] % self.weight.ndim
        return (
            self.experts and side == "gives" and any(getattr(p, "dim", None) == wanted for p in self.weight.placements)
        )


def _packed(placement: Any) -> dict[str, int]:
    """How a packed matrix, several in one, is dealt out."""
    return {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}


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


def refuse_uneven(model: nn.Module) -> None:
    """Raise ``BadInput`` where more or fewer processes share a model than its attention heads can be dealt out to."""
    mesh, config = _mesh_of(model), getattr(model, "config", None)
    config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    found = [getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value")]
    heads = [count for count in found if isinstance(count, int)]
    together = math.gcd(*heads)
    if mesh is not None and heads and together % mesh.size():
        fits = [n for n in range(1, together + 1) if together % n == 0]
        raise BadInput(
            f"{mesh.size()} processes share this model, which has {' attention and '.join(map(str, heads))} "
            f"{'key' if len(heads) > 1 else 'attention'} heads: start it with a number that divides them "
            f"({', '.join(map(str, fits))}). Nothing was changed"
        )


def _mesh_of(model: nn.Module) -> DeviceMesh | None:
    return next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)


def refuse_unlike(model: nn.Module, what: str, given: Any) -> None:
    """Raise ``BadInput`` in every process of a split model where they were not all ``given`` the same, or run other versions.

    Costs one small message; nothing where the model is not split.
    """
    mesh = _mesh_of(model)
    if mesh is None:
        return
    digest = hashlib.sha256()
    for leaf in tree_leaves(given):
        shown = leaf.detach().cpu().reshape(-1).tolist() if isinstance(leaf, Tensor) else leaf
        digest.update(f"{type(leaf).__name__} {getattr(leaf, 'shape', '')} {shown}\n".encode())
    own = f"controllability {__version__}, torch {torch.__version__}", digest.hexdigest()
    found: list[Any] = [None] * mesh.size()
    dist.all_gather_object(found, own, group=mesh.get_group())
    for index, kind in enumerate(("versions", what)):
        others = [rank for rank, told in enumerate(found) if told[index] != found[0][index]]
        if others:
            seen = f": {found[0][0]} and {found[others[0]][0]}" if index == 0 else ""
            raise BadInput(
                f"the processes of this model have different {kind}{seen}: process {others[0]} is not as process 0; every one "
                "runs the same program on the same inputs. Nothing was changed"
            )


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
