"""The contract is the contract: outside components/ and interfaces/ nothing asks what class a component is.

Where it has to be asked stands in a table, with the classes and the reason; a line that is no longer needed fails too.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import isclass
from pathlib import Path

import pytest
from architecture import PACKAGES, ROOT, sources

import controllability as ct
from controllability import components
from controllability.arrays import Array
from controllability.checks.rebuilt_blocks import rebuilt
from controllability.checks.symbolic_block import generic
from controllability.components import Activation, Linear, residual
from controllability.interfaces import Component, Param, Params

CLASSES = {
    name for name, c in vars(components).items() if isclass(c) and (issubclass(c, Component) or name == "Routing")
}
STATED = ("controllability/components/", "controllability/interfaces/")  # where a class may know others of its kind

ROCQ = "a certificate writes out the formula of each component, independent of the component's own code"
EXCEPTIONS: dict[str, tuple[str, str]] = {  # file: (classes, reason)
    # each component in another language
    "controllability/rocq/certificate.py": ("Window", ROCQ),
    "controllability/rocq/composed_nodes.py": ("Product Sum", ROCQ),
    "controllability/rocq/formula.py": ("AboveMean Activation Bias Blend Clamp ExpertLinear Fixed Gate Glu Identity InverseRms Linear Mixed Mixture Normalize Product Scale Select Sequence Share SoftCap Sum Swish Times XIELU", ROCQ),
    "controllability/rocq/leaf_nodes.py": ("Bias ExpertLinear Linear Scale Taps", ROCQ),
    "controllability/rocq/mixture_nodes.py": ("ExpertLinear Mixture", ROCQ),
    "controllability/rocq/nodes.py": ("Sequence Window", ROCQ),
    "controllability/rocq/numbers.py": ("Activation Sequence SoftCap", ROCQ),
    "controllability/rocq/stream_formulas.py": ("Collapse Correction Joined NormalizeEach Remixed Spread Streams Taps Window", ROCQ),
    "controllability/rocq/stream_nodes.py": ("Collapse Correction Spread", ROCQ),
    "controllability/rocq/undone_nodes.py": ("Bias Gate Identity Product Scale SoftCap Streams Sum Times", ROCQ),
    # the symbolic machinery's own shapes: a block is executed with other parts, which are built from the old ones
    "controllability/checks/rebuilt_blocks.py": (
        "Activation Swish XIELU Linear ExpertLinear Scale Bias Mixture",
        "it says which activations no rational function computes, gives the steered leaves other sizes, and counts the experts that a routing needs",
    ),
    "controllability/checks/symbolic_block.py": (
        "Normalize NormalizeEach",
        "the ε of a norm that is steered through becomes a symbol, any other norm an undefined function",
    ),
    "controllability/checks/exact_block.py": ("Normalize", "a norm loses its root: the check computes it itself, in fractions"),
    "controllability/checks/symbolic_joint.py": ("Mixture", "tokens whose stacked vectors depend on each other are made from the mixture's own shares"),
    "controllability/checks/symbolic_rules.py": ("ExpertLinear", "the stored tensor of all experts has no entry that one symbol could say: it is checked at a small size of its own"),
    # rules: the parts that their statements name
    "controllability/rules/mixture.py": ("Mixture ExpertLinear", "Σ_j s_j W_j y_j is about a mixture, and W_j is its experts' own last map"),
    "controllability/rules/output_side.py": ("Times", "c·g is about a constant c, and O-through-bijection leaves that case to it"),
    "controllability/rules/theorems.py": ("Product Sum", "theorem 1 goes into branches that stand side by side, which the factors of a product do not; I-by-output is about what is no sum"),
    "controllability/rules/normalised.py": ("Normalize Scale", "m∘n∘g names them: its m is a scale, its n the RMS normalisation"),
    "controllability/models/sweep/effects.py": ("Scale", "a norm's patched scale is computed once, for any number of passes"),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- what is looked for


def asked(tree: ast.AST) -> set[str]:
    """The component classes that a file asks for: by ``isinstance``, a class pattern, a comparison, a table keyed by classes."""
    known = named(tree)
    return {name for node in ast.walk(tree) for part in questions(node) for name in classes_in(part, known)}


def questions(node: ast.AST) -> Iterator[ast.AST]:
    """The expressions in which a class would be asked for by this node."""
    match node:
        case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
            yield kinds
        case ast.Call(func=ast.Attribute(attr="register"), args=[kind, *_]):  # of functools.singledispatch
            yield kind
        case ast.MatchClass(cls=kind):
            yield kind
        case ast.Compare(left=left, comparators=others):
            yield from (left, *others)
        case ast.Dict(keys=keys):
            yield from filter(None, keys)


def classes_in(part: ast.AST, known: dict[str, set[str]]) -> set[str]:
    """The component classes that an expression names: alone, in a tuple, in a union; what it calls is no question."""
    match part:
        case ast.Name(id=name):
            return known.get(name, set())
        case ast.Attribute(value=ast.Name(id=module), attr=name) if module in known and not known[module]:
            return {name} & CLASSES
        case ast.Tuple(elts=inside) | ast.List(elts=inside) | ast.Set(elts=inside):
            return {name for one in inside for name in classes_in(one, known)}
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return classes_in(left, known) | classes_in(right, known)
        case ast.Starred(value=inside):
            return classes_in(inside, known)
    return set()


def named(tree: ast.AST) -> dict[str, set[str]]:
    """What a file calls component classes: imported names, and names for several of them; {} for a module of ours."""
    known: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
            if str(node.module).endswith(".lazy"):  # SymPy's own classes
                continue
            known |= {one.asname or one.name: {one.name} & CLASSES for one in node.names}
        if isinstance(node, ast.Import):
            ours = [one for one in node.names if one.name.partition(".")[0] in PACKAGES]
            known |= {one.asname or one.name.partition(".")[0]: set() for one in ours}
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)]) if found := classes_in(node.value, known):
                known[name] = found
    return known


def asking(root: Path) -> dict[str, set[str]]:
    """file -> the component classes that it asks for."""
    found: dict[str, set[str]] = {}
    for path in (path for package in PACKAGES for path in sources(root / package)):
        file = path.relative_to(root).as_posix()
        if not file.startswith(STATED) and (classes := asked(ast.parse(path.read_text(encoding="utf-8")))):
            found[file] = classes
    return found


# ------------------------------------------------------------------------------------------------------ this house


def test_nothing_else_asks_what_class_a_component_is():
    allowed = {file: set(classes.split()) for file, (classes, _) in EXCEPTIONS.items()}
    found = asking(ROOT)
    new = {f: sorted(c - allowed.get(f, set())) for f, c in found.items() if c - allowed.get(f, set())}
    assert new == {}, "ask for a fact of controllability/interfaces/component.py instead"
    old = {f: sorted(c - found.get(f, set())) for f, c in allowed.items() if c - found.get(f, set())}
    assert old == {}, "no longer asked: delete these from EXCEPTIONS"


def test_every_exception_has_a_reason():
    for file, (classes, reason) in EXCEPTIONS.items():
        assert set(classes.split()) <= CLASSES, file
        assert len(reason.split()) > 1, file


# ------------------------------------------------------------------------------------------------- made-up files

IMPORT = "from controllability.components import Linear, Scale\nfrom controllability.interfaces import Sequence\n"
ASKS = {
    "isinstance": "isinstance(x, Linear)",
    "of several": "isinstance(x, (Linear, Scale))",
    "a union": "isinstance(x, Linear | Scale)",
    "issubclass": "issubclass(c, Sequence)",
    "in a function": "def f(x):\n    assert isinstance(x.parts[0], Linear)",
    "a type": "type(x) is Linear",
    "a type of several": "type(x) not in (Linear, Scale)",
    "equal types": "Linear == type(x)",
    "a class pattern": "match x:\n    case Linear(weight=w):\n        pass",
    "a table": "{Sequence: 1, Linear: 2}[type(x)]",
    "a dispatch": "@f.register(Linear)\ndef _(x): ...",
    "another name": "from controllability.components.linear import Linear as L\nisinstance(x, L)",
    "a name for several": "KINDS = (Linear, Scale)\nisinstance(x, KINDS)",
    "through the package": "from controllability import components\nisinstance(x, components.Linear)",
    "through an alias": "import controllability.components as c\nisinstance(x, c.Linear)",
    "imported inside": "def f(x):\n    from controllability.components import Times\n    return isinstance(x, Times)",
}
FINE = {
    "it is built": "Linear(w) >> Scale(v)",
    "a rule says what it is about": "class R:\n    about = Linear | Sequence",
    "an annotation": "def f(x: Linear) -> Scale: ...",
    "a fact": "x.normalises and x.scales",
    "a class of SymPy": "import sympy\nisinstance(x, sympy.Sum)",
    "a class of the same name": "from torch.nn import Bias\nisinstance(x, Bias)",
    "what is computed is compared": "Linear(w) == x",
}


@pytest.mark.parametrize("text", ASKS.values(), ids=ASKS)
def test_a_question_is_found(text):
    assert asked(ast.parse(IMPORT + text))


@pytest.mark.parametrize("text", FINE.values(), ids=FINE)
def test_what_is_no_question_passes(text):
    assert asked(ast.parse(IMPORT + text)) == set()


# ------------------------------------------------------------------------------------- a combinator of one's own


@dataclass(frozen=True)
class Again(Component):
    """second(first(x) + x): its output is that of its last part, and yet it is no sequence."""

    first: Component
    second: Component

    def __call__(self, params: Params, x: Array) -> Array:
        return self.second(params, self.first(params, x) + x)

    def children(self) -> tuple[Component, ...]:
        return self.first, self.second

    def source_of(self, index: int) -> int | None:
        return index - 1 if index else None

    def child_input(self, index: int, x: Array, output: Callable[[int], Array]) -> Array:
        return output(0) + x if index else x

    @property
    def outlet(self) -> int:
        return 1

    def describe(self) -> str:
        return "again"


def again() -> Component:
    up, down = (Linear(Param(name, ("d", "d"))) for name in ("up", "down"))
    return Again(up >> Activation("silu"), down)


def test_what_is_no_sequence_is_not_cut():
    """No rule is about it: it is refused in its own name, and not taken apart as a sequence would be."""
    with pytest.raises(ct.NotControllable) as refused:
        ct.prove(residual(again()))
    assert refused.value.culprit == "again"


def test_checks_reach_into_it():
    proof = ct.prove(residual(again() >> Linear(Param("last", ("d", "d")))), via="output")
    inner = rebuilt(proof.block, generic(proof)).children()[1].children()[0]
    assert isinstance(inner, Again)
    assert inner.first.children()[1] == Activation("phi_silu", symbol=True)
    assert {row["status"] for row in proof.check("symbolic")} == {"passed"}
