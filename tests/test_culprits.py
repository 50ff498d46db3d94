"""The culprit of a refusal is minimal and the changes it offers have proofs, on random trees; refusals are quick."""

from __future__ import annotations

import re
import time
from collections import Counter

import numpy as np
import pytest
from refused_blocks import drawn, nodes, refused, tanh, up
from trees import D

import architectures
import controllability as ct
from controllability.components import ExpertLinear, Identity, Mixture, Select, Sequence, residual, rms_norm
from controllability.components.collapse import SelfWeighted
from controllability.interfaces import Place
from controllability.prover.explain import explained
from controllability.prover.remedies import Remedy
from controllability.prover.search import Prover
from controllability.rules import Failure


def ways(failure: Failure) -> list[list[tuple[Place, str]]]:
    """The premises that the failed rule asks for at a place: one list for each way in which it may apply."""
    place, rule = failure.place, failure.rule
    parts, count = place.parts(), len(place.parts())
    if rule in ("O-after-fixed", "I-before"):
        return [[(parts[-1], failure.side)]]
    if rule == "I-after":
        return [[(place.slice(0, count - 1), "input")]]
    if rule == "I-combine":
        return [[(part, "input") for part in parts]]
    if rule in ("O-sum", "O-factor"):
        return [[(part, "output")] for part in parts]
    if rule == "T-sum":
        return [[(part, "through")] for part in parts]
    if rule in ("I-mixture", "T-mixture"):
        return [[(parts[0], "input"), (parts[1], "input")]]
    if rule == "T-before":
        return [[(place.slice(1, count), "through")]]
    if rule in ("O-through-bijection", "O-times", "O-normalised"):
        return [[(place.slice(0, stop), failure.side)] for stop in range(1, count)]
    branches = [place] if isinstance(place.component, Sequence) else [p for p in parts if p.component.children()]
    found = [[(branch, "through")] for branch in branches if branch != place]
    for branch in branches:
        stop = len(branch.component.children())
        if isinstance(branch.component, Sequence):
            found += [[(branch.slice(0, i), "input"), (branch.slice(i, stop), "output")] for i in range(1, stop)]
    return found


def minimal(failure: Failure, prover: Prover) -> str:
    """How the place of a failure fails while everything below it passes; an AssertionError if it does not."""
    component = failure.place.component
    if failure.rule in ("O-mixture", "T-mixture") and not isinstance(component, Mixture):
        assert not isinstance(component, ExpertLinear) or failure.weight > 0  # frozen, or crowded by rows
        return "experts' last map"
    assert not prover.attempt(failure.place, failure.side).steps, "it passes"
    if not component.children() or (isinstance(component, SelfWeighted) and failure.side != "input"):
        return "leaf"  # no rule puts together what its parts can do
    if not component.parameters() and all(isinstance(c, Identity) for c in component.children()):
        return "nothing to steer"
    if failure.rule == "O-mixture":
        assert isinstance(component.last, ExpertLinear)
        return "together"
    apart = any(all(prover.attempt(p, side).steps for p, side in way) for way in ways(failure))
    assert apart or uses_of_twice(failure) > 1, "a part fails as well"
    return "together"


def uses_of_twice(failure: Failure) -> int:
    """In how many parts the parameter stands that the failure calls used twice: in one alone it would be the smaller culprit."""
    named = re.search(r"parameter (\S+) is used twice", failure.reason)
    return sum(named[1] in map(str, part.component.parameters()) for part in failure.place.parts()) if named else 0


@pytest.mark.parametrize("seeds", [range(100), pytest.param(range(300), marks=pytest.mark.slow)], ids=len)
def test_culprits_are_minimal_and_remedies_prove_on_random_trees(seeds):
    counts: Counter[str] = Counter()
    for seed in seeds:
        grower, block, options = drawn(seed)
        try:
            ct.prove(block, **options)
            continue
        except ct.NotControllable as refusal_:
            error_ = refusal_
        prover = Prover(block, *options.values())
        failures = explained(prover.attempt(Place(block), "input").failures, block, prover)
        shown = f"seed {seed} {options}: {block.describe()}\n{error_}"
        try:
            counts[minimal(failures[0], prover)] += 1
        except AssertionError as wrong:
            raise AssertionError(f"{shown}\n{failures[0]}") from wrong
        assert error_.culprit == failures[0].place.describe()
        assert any(error_.culprit in part.describe() for part in nodes(block)), shown  # the user's own names
        counts["remedies"] += len(error_.remedies)
        for remedy in error_.remedies:
            counts[executed(remedy, grower.values, seed)] += 1
    assert counts["leaf"] >= len(seeds) / 5
    assert counts["together"] >= len(seeds) / 40
    assert counts["remedies"] >= len(seeds) / 3
    assert counts["patched"] >= len(seeds) / 5
    assert counts["patched"] + counts["condition"] == counts["remedies"]


def executed(remedy: Remedy, values: dict[str, np.ndarray], seed: int) -> str:
    """Whether the remedy's proof patches random numbers, or a side condition fails on them."""
    proof = ct.prove(remedy.block, **remedy.options)
    rng = np.random.default_rng(seed)
    params = dict(values)
    for p in sorted(remedy.block.parameters(), key=str):
        if p.name not in params:
            unknown = (D, D) if "weight" in p.name else (D,)  # a block of activations does not say how wide it is
            params[p.name] = rng.normal(size=p.shape or unknown)
    inputs = 1 + max((part.index for part in nodes(remedy.block) if isinstance(part, Select)), default=0)
    states = rng.normal(size=(2, inputs, 2, D))
    v, v_target = (tuple(run) if inputs > 1 else run[0] for run in states)
    try:
        patched = proof.construct(params, v, v_target).applied_to(params)
    except ct.SideConditionFailed:
        return "condition"
    difference = np.abs(remedy.block(patched, v) - remedy.block(params, v_target)).max()
    assert difference / (1 + np.abs(remedy.block(params, v_target)).max()) < 1e-5, f"seed {seed}: {remedy}"
    return "patched"


def test_the_judge_of_culprits_notices_one_that_is_too_large():
    block = residual(rms_norm("pre") >> up >> tanh)
    prover = Prover(block, "input-output", "auto", frozenset())
    branch = Place(block).parts()[1]
    with pytest.raises(AssertionError, match="a part fails as well"):
        minimal(Failure(branch, "O-after-fixed", "", "", side="output"), prover)
    with pytest.raises(AssertionError, match="it passes"):
        minimal(Failure(branch.slice(2, 3), "O-linear", "", "", side="output"), prover)


@pytest.mark.parametrize("name", ["deepseek_v3", "zaya", "beam", "cohere2_moe", "axk1"])
def test_the_largest_refusals_take_less_than_half_a_second(name):
    block = architectures.block(name)
    frozen = sorted(p.name for p in block.parameters())
    started = time.process_time()
    error_ = refused(block, frozen=frozen)
    assert time.process_time() - started < 0.5
    assert error_.remedies
