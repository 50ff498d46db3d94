"""Values at the nodes of an expression: computed on demand, or observed in a real run."""

from collections.abc import Mapping

from controllability.arrays import Array, tidy
from controllability.interfaces import Component, Layout, Params, Path


class Trace:
    """One run of ``block``: state (..., d) in, node values on demand.

    ``observed`` maps paths to outputs that the real run already computed; they are not computed again.

    >>> import numpy as np
    >>> from controllability.components import Times
    >>> trace = Trace(Times(2) >> Times(5), {}, np.ones(1))
    >>> trace.output((0,)), trace.output(())
    (array([2.]), array([10.]))
    """

    def __init__(
        self, block: Component, params: Params, state: Array, observed: Mapping[Path, Array] | None = None,
        layout: Layout | None = None,
    ) -> None:  # fmt: skip
        self.block, self.params, self.state = block, params, state
        self.layout = Layout.of(block) if layout is None else layout
        self.observed = dict(observed or {})
        self._outputs: dict[Path, Array] = dict(self.observed)
        self._inputs: dict[Path, Array] = {}
        self._bound: dict[Path, Params] = {}

    def observe_input(self, path: Path, value: Array) -> None:
        """Tell the trace what a real run fed into the node at ``path``."""
        self._inputs[path] = value

    def observe_output(self, path: Path, value: Array) -> None:
        """Tell the trace what a real run computed at ``path``."""
        self._outputs[path] = value

    def input(self, path: Path) -> Array:
        """The input of the node at ``path``."""
        if path in self._inputs:
            return self._inputs[path]
        if not path:
            return self.state
        source = self.layout.source[path]
        if source is not None:
            return self.output(source)
        parent, index = path[:-1], path[-1]
        given = self.input(parent)
        return self.layout.nodes[parent].child_input(index, given, lambda i: self.output((*parent, i)))

    def output(self, path: Path) -> Array:
        """The output of the node at ``path``."""
        if path not in self._outputs:
            self._outputs[path] = self._compute(path)
        return self._outputs[path]

    def known_output(self, path: Path) -> Array | None:
        """The output of the node at ``path`` if it was observed or computed already."""
        return self._outputs.get(path)

    def _compute(self, path: Path) -> Array:
        component = self.layout.nodes[path]
        if path in self.layout.leaves:
            return tidy(self.leaf(path, component))
        value = component.assemble(self.params_inside(path), lambda i: self.output((*path, i)))
        return value if component.outlet is not None else tidy(value)

    def bind(self, path: Path, values: Params) -> None:
        """Tell the trace what a real run bound at ``path`` (the experts that a mixture chose)."""
        self._bound[path] = dict(values)

    def bound(self, path: Path) -> Params:
        """What the component at ``path`` names for its parts."""
        if path not in self._bound:
            component = self.layout.nodes[path]
            self._bound[path] = component.bindings(self.params, lambda i: self.output((*path, i)))
        return self._bound[path]

    def params_inside(self, path: Path) -> Params:
        """The parameters as the parts of the component at ``path`` see them: with what it binds."""
        known = self.params_at(path)
        return {**known, **self.bound(path)} if any(at == path for at, _ in self.layout.binding) else known

    def params_at(self, path: Path) -> Params:
        """The parameters as the component at ``path`` sees them: with what those around it name for it."""
        params = self.params
        for at in self.layout.around(path) if self.layout.binding else ():
            params = {**params, **self.bound(at)}
        return params

    def leaf(self, path: Path, component: Component) -> Array:
        """The output of a leaf at its input."""
        return component(self.params_at(path), self.input(path))
