"""Watching one layer of a live model: what enters its block, what each tap computes, what leaves.

Whatever shapes the modules use among themselves ((B, T, n), flattened, time first, one row a chosen
expert), a listener sees (B, T, …), and what it gives back goes on in the model's own shape.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from architectures.reading import Layer, Reading, Tap
from architectures.registry import StatePoint
from controllability.errors import ReadingError
from controllability.interfaces import Path, node
from controllability.models import transformers_parts
from controllability.models.hooks.expert_hooks import Stage, listen
from controllability.models.hooks.installation import HookStack, first_argument, first_tensor
from controllability.models.hooks.shards import Layout, plain_is_replicated
from controllability.models.hooks.telling_weight import TellingWeight


class LayerListener(Protocol):
    """What is told, call by call; states are (B, T, ·), chosen experts ascending in (B, T, k, ·).  Nothing is done by default."""

    def begins(self) -> None:
        """The layer is called."""

    def entering(self, index: int, value: Tensor) -> None:
        """Input ``index`` of the block is known."""

    def routed(self, path: Path, index: Tensor, shares: Tensor) -> None:
        """The mixture at ``path`` chose experts ``index`` with ``shares``, both (B, T, k)."""

    def computed(self, tap: Tap, x: Tensor, y: Tensor) -> Tensor | None:
        """``tap`` read ``x`` and gave ``y``; what is returned, if anything, takes its place."""

    def leaving(self, value: Tensor) -> None:
        """The block's output is known."""


class LayerHook:
    """Attaches to one layer and tells ``listener``, if there is one.  ``taps`` are those it wants to hear of."""

    def __init__(
        self, model: nn.Module, layer: Layer, listener: LayerListener | None, installation: HookStack,
        taps: Iterable[Tap] | None = None, states: bool = True, sequence_first: bool = False,
    ) -> None:  # fmt: skip
        self.layer, self.listener, self.sequence_first = layer, listener, sequence_first
        self.grid = (0, 0)
        own = (seen for seen in (*layer.inputs, layer.output) if seen.module == layer.name)
        self.stacked = next((seen.item for seen in own if seen.item is not None), None)  # which of its streams is meant
        self.runs: dict[int | None, int] = {}  # how often each state was shown, in this call of the layer
        module = model.get_submodule(layer.name)
        if getattr(module, "chunk_size_feed_forward", 0):  # the same computation, in one piece
            installation.assign(module, "chunk_size_feed_forward", 0)
        installation.before(module, self._begin)
        if states:
            for index, seen in enumerate(layer.inputs):
                self._at(installation, model, seen, index)
        wanted = tuple(layer.taps if taps is None else taps)
        for tap in wanted:
            if tap.kind in ("module", "weight", "output"):
                self._tap(installation, model, tap)
        for path in dict.fromkeys(t.mixture for t in wanted if t.mixture is not None):
            stages = [t for t in layer.taps if t.mixture == path]
            experts = model.get_submodule(layer.experts[path])
            listen(installation, module, experts, _Slots(self, path, stages, set(wanted), experts))
        if states:
            self._at(installation, model, layer.output)

    def _begin(self, x: Tensor) -> None:
        if self.listener is None:
            return
        self.runs = {}
        if isinstance(x, Tensor) and x.ndim in (3, 4):
            x = x if self.stacked is None else x[self.stacked]
            self.grid = (x.shape[1], x.shape[0]) if self.sequence_first else (x.shape[0], x.shape[1])
        self.listener.begins()

    def _at(self, installation: HookStack, model: nn.Module, seen: StatePoint, index: int | None = None) -> None:
        """Tell of a state: input ``index`` of the block, or its output."""

        def tell(value: Tensor) -> None:
            self.runs[index] = self.runs.get(index, 0) + 1
            if self.listener is None or self.runs[index] != seen.run:
                return
            with plain_is_replicated(split.weight is not None):
                state = split.told(self.fold(value), "reads" if seen.when == "before" else "gives")
                if index is None:
                    self.listener.leaving(state)
                else:
                    self.listener.entering(index, state)

        module, take = model.get_submodule(seen.module), seen.take
        split = Layout.of(module)
        if take is not None:
            installation.called(module, lambda given: tell(take(module, given)))
        elif seen.when == "before":
            installation.before(module, tell, seen.argument)
        else:
            name, item = seen.argument, seen.item
            shown = lambda out: getattr(out, name) if name else first_tensor(out) if item is None else out[item]  # noqa: E731
            installation.after(module, lambda x, out: tell(shown(out)))

    def _tap(self, installation: HookStack, model: nn.Module, tap: Tap) -> None:
        module = model.get_submodule(tap.module)
        read = _Windows(installation, module, node(self.layer.block, tap.inlet).positions)
        split = Layout.of(module)
        inside = any(tap.inlet[: len(m) + 1] == (*m, 1) for m in self.layer.experts)

        def told(x: Tensor, y: Tensor) -> Tensor | None:
            if self.listener is None:
                return None
            x, folded = read(self.fold(x)), self.fold(y)
            if inside:  # before the experts' own maps a token is one slot for all of them
                x, folded = x[:, :, None], folded[:, :, None]
            with plain_is_replicated(split.weight is not None):
                told = split.told(folded, "gives")
                changed = self.listener.computed(tap, split.told(x, "reads"), told)
                return None if changed is None else self.unfold(split.local(changed, told, folded), y)

        if tap.kind == "module":
            installation.after(module, lambda x, output: told(x, first_tensor(output)))
            return
        if tap.kind == "output":
            installation.after(module, lambda x, output: told(first_tensor(output), first_tensor(output)))
            return

        def listener(x: Tensor, y: Tensor) -> Tensor:
            changed = told(x, y)
            return y if changed is None else changed

        attribute = node(self.layer.block, tap.outlet).own_parameters()[0].name.rpartition(".")[2]
        stored = module._parameters[attribute]
        assert stored is not None
        installation.exchange(module, attribute, TellingWeight.of(stored, listener))

    def fold(self, x: Tensor, slots: bool = False) -> Tensor:
        """As the model has it -> (B, T, n), or (B, T, k, n) of chosen experts."""
        batch, length = self.grid
        shape = x.shape
        if len(shape) == 3 and not slots and batch and shape[:2] == self.grid and not self.sequence_first:
            return x  # as most models have it
        if not batch:
            raise ReadingError(
                f"layer {self.layer.name}: its modules run outside of its own call: they are shared with another layer"
            )
        if x.ndim == 4 and not slots and shape[:2] == self.grid:  # several streams: one state
            return x.flatten(2)
        features = shape[-2:] if slots else shape[-1:]
        leading = shape[: -len(features)]
        if leading == (batch, length) and not (self.sequence_first and batch != length):
            folded = x
        elif self.sequence_first and leading.numel() == batch * length:
            return x.reshape(length, batch, *features).transpose(0, 1)
        elif leading.numel() == batch * length:
            folded = x.reshape(batch, length, *features)
        else:
            raise ReadingError(
                f"layer {self.layer.name}: a module of the feed-forward half works on {tuple(x.shape)} where the "
                f"layer has {batch} samples of {length} positions: it is not local to a position, or works in chunks"
            )
        return folded.transpose(0, 1) if self.sequence_first and batch == length else folded

    def unfold(self, x: Tensor, like: Tensor) -> Tensor:
        """(B, T, …) -> the shape of ``like``."""
        if x.shape == like.shape and not self.sequence_first:
            return x
        return (x.transpose(0, 1) if self.sequence_first else x).reshape(like.shape)


class _Windows:
    """What a module that looks back reads at each position: the last ``count`` positions side by side, oldest first.

    What is in its cache comes before, padding counts as 0.
    """

    def __init__(self, installation: HookStack, module: nn.Module, count: int) -> None:
        self.count, self.before, self.mask = count, torch.empty(0), torch.empty(0)
        if count:
            installation.called(module, lambda given: self._remember(module, given))

    def _remember(self, module: Any, given: Mapping[str, Any]) -> None:
        x, cache, mask = first_argument((), dict(given)), transformers_parts.cache_of(given), given.get("conv_mask")
        state = transformers_parts.window_before(module, cache)
        self.before = x[:, :0] if state is None else state.transpose(1, 2)[:, 1 - self.count :].to(x.dtype, copy=True)
        self.mask = x.new_ones(x.shape[:2]) if mask is None else mask.to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.count:
            return x
        length = x.shape[1]
        x = torch.cat([self.before, x * self.mask[..., None]], 1)
        x = nn.functional.pad(x, (0, 0, self.count - 1, 0))[:, 1 - self.count - length :]
        return x.unfold(1, self.count, 1).transpose(2, 3).flatten(2)


class LayerHooks:
    """Hooks on every layer of a model, put on once: each run says who listens, if anybody does.

    A context manager; on exit the hooks are gone and every bit is what it was.
    """

    def __init__(self, model: nn.Module, reading: Reading) -> None:
        self.model, self.reading = model, reading
        self.installation = HookStack()
        self._watches: list[LayerHook] = []

    def __enter__(self) -> "LayerHooks":
        sequence_first = self.reading.architecture.sequence_first
        try:
            for layer in self.reading.layers:
                watch = LayerHook(self.model, layer, None, self.installation, sequence_first=sequence_first)
                self._watches.append(watch)
        except BaseException:
            self.installation.undo()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.installation.undo()

    def run(self, listeners: Sequence[LayerListener | None], inputs: Mapping[str, Any]) -> Any:
        """The model's output on ``inputs``; one listener a layer (None: nobody listens to it), or none at all."""
        for watch, listener in zip(self._watches, listeners, strict=bool(listeners)):
            watch.listener = listener
        try:
            return self.model(**inputs)
        finally:
            for watch in self._watches:
                watch.listener = None


class _Slots:
    """Turns what experts tell, (N, k, ·) in the router's order, into (B, T, k, ·) with experts ascending."""

    def __init__(self, watch: LayerHook, path: Path, stages: list[Tap], wanted: set[Tap], experts: nn.Module) -> None:
        stacked = {name: p for name, p in experts._parameters.items() if p is not None and p.ndim == 3}
        turned = bool(getattr(experts, "is_transposed", False))
        self.split = {
            kind: Layout(
                next((p for n, p in stacked.items() if (n == "down_proj") == (kind == "last")), None), turned, True
            )
            for kind in ("first", "last")
        }
        self.watch, self.path, self.wanted = watch, path, wanted
        self.taps = {kind: [t for t in stages if t.kind == kind] for kind in ("first", "last")}
        self.told = dict.fromkeys(self.taps, 0)
        self.there: tuple[Tensor, Tensor] | None = None  # where slot j of a token stands in the router's order
        self.back: tuple[Tensor, Tensor] | None = None

    def routed(self, index: Tensor, shares: Tensor) -> None:
        if self.watch.listener is None:
            return
        order = index.argsort(-1)
        tokens = torch.arange(len(order), device=order.device)[:, None]
        self.there, self.back = (tokens, order), (tokens, order.argsort(-1))
        self.told = dict.fromkeys(self.taps, 0)
        index, shares = index.gather(-1, order), shares.gather(-1, order)
        self.watch.listener.routed(self.path, self.watch.fold(index), self.watch.fold(shares))

    def computed(self, stage: Stage, x: Tensor, y: Tensor) -> Tensor:
        listener = self.watch.listener
        if listener is None:
            return y
        tap = self.taps[stage][self.told[stage]]
        self.told[stage] += 1
        if tap not in self.wanted:
            return y
        assert self.there is not None and self.back is not None
        there = self.there

        def told(a: Tensor) -> Tensor:
            return self.watch.fold(a if a.shape[1] == 1 else a[there], True)

        split = self.split[stage]
        whole = split.told(y, "gives")
        changed = listener.computed(tap, told(split.told(x, "reads")), told(whole))
        return y if changed is None else split.local(self.watch.unfold(changed, whole)[self.back], whole, y)
