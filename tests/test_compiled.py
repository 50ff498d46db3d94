"""Compiled models: hooks that torch would ignore are run, and what was compiled is kept."""

from __future__ import annotations

import copy
import shutil
import threading

import pytest
import torch
from helpers import error, hook_count, runs, snapshot, tiny_gemma, unchanged

import controllability as ct
from controllability.models.hooks.carried_patches import carried

HOW = ["torch.compile", "model.compile", "layer", "layer replaced", "forward"]
ROUNDING = 5e-6


class Backend:
    """Compiles nothing and counts how often it is asked to."""

    def __init__(self):
        self.asked = self.run = 0

    def __call__(self, graph, _):
        self.asked += 1

        def run(*args):
            self.run += 1
            return graph.forward(*args)

        return run


def small(**options):
    return tiny_gemma(layers=1, d=16, h=24, **options)


def compiled(model, how, backend):
    """What is to be called: a wrapper, or the model itself with something compiled in it."""
    layers = model.model.layers
    if how == "torch.compile":
        return torch.compile(model, backend=backend)
    if how == "model.compile":
        model.compile(backend=backend)
    elif how == "layer":
        layers[0].compile(backend=backend)
    elif how == "layer replaced":
        layers[0] = torch.compile(layers[0], backend=backend)
    else:
        model.forward = torch.compile(model.forward, backend=backend)
    return model


@pytest.fixture
def gemma():
    return small()


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", HOW)
def test_a_compiled_model_computes_with_the_patch(how):
    """Patched: the target's logits.  Before and after: the same bits, from the code that was compiled before."""
    backend = Backend()
    target, source = runs(context=9, query=4)
    subject = compiled(small(), how, backend)
    with torch.no_grad():
        wanted = small()(**target).logits[:, -4:]  # the same weights, nothing compiled
        before = subject(**source).logits
        asked, state = backend.asked, snapshot(subject)
        mp = ct.patch_model(subject, target, source)
        ran = backend.run
        with mp.applied(subject) as given:
            assert given is subject
            patched = subject(**source).logits
        assert backend.run == ran, "compiled code ran in the context: its hooks are ignored"
        after = subject(**source).logits
    assert asked > 0
    assert error(patched, wanted) < ROUNDING < 0.1 < error(before, wanted)
    assert torch.equal(before, after)
    assert backend.run > ran, "what was compiled does not run any more"
    assert backend.asked == asked, "compiled anew"
    assert unchanged(subject, state)
    assert hook_count(subject) == 0
    assert carried(subject) == ()


def test_without_that_the_patch_would_be_ignored():
    """Why: with the compiler in its place, hooks on a compiled model are not run; leaving the context says so."""
    target, source = runs(context=9, query=4)
    model = small()
    subject = torch.compile(model, backend=Backend())
    mp = ct.patch_model(model, target, source)
    with torch.no_grad():
        before = subject(**source).logits
        default = torch.compiler.set_stance("default")
        with pytest.raises(ct.PatchError, match="the patch had no effect"), mp.applied(model), default:
            assert torch.equal(subject(**source).logits, before)
        with mp.applied(model):
            assert error(subject(**source).logits, mp.target_logits) < ROUNDING


def test_a_wrapper_that_the_package_has_not_seen_is_patched_too():
    """The patch is made and applied on the model itself, and its compiled copy is called."""
    target, source = runs(context=9, query=4)
    model = small()
    subject = torch.compile(model, backend=Backend())
    with torch.no_grad():
        before = subject(**source).logits
        mp = ct.patch_model(model, target, source)
        with mp.applied(model):
            patched = subject(**source).logits
        assert error(patched, mp.target_logits) < ROUNDING < error(before, mp.target_logits)
        assert torch.equal(subject(**source).logits, before)


def test_compiling_while_a_patch_is_applied_keeps_nothing_of_it():
    target, source = runs(context=9, query=4)
    model = small()
    mp = ct.patch_model(model, target, source)
    with torch.no_grad():
        before = model(**source).logits
        with mp.applied(model):
            subject = compiled(model, "layer", Backend())
            assert error(subject(**source).logits, mp.target_logits) < ROUNDING
        assert error(subject(**source).logits, before) < ROUNDING < error(before, mp.target_logits)


def test_the_model_and_its_wrapper_are_one():
    """A patch may be made on one and applied to the other; it is carried by both."""
    target, source = runs(context=9, query=4)
    model = small()
    subject = torch.compile(model, backend=Backend())
    mp = ct.patch_model(subject, target, source)
    with torch.no_grad(), mp.applied(model):
        assert carried(subject) == carried(model) == (mp.id,)
        assert error(model(**source).logits, mp.target_logits) < ROUNDING
        with pytest.raises(ct.PatchError, match="on the model already"), mp.applied(subject):
            pass
        with pytest.raises(ct.PatchError, match="a patch is applied at the moment"):
            copy.deepcopy(subject)


def test_a_compiled_model_that_is_merged_into_computes_with_the_patch(gemma):
    """Weights are inputs of the compiled code: merging needs nothing compiled anew."""
    target, source = runs(context=9, query=1)
    backend = Backend()
    subject = compiled(gemma, "layer", backend)
    with torch.no_grad():
        before = subject(**source).logits
        mp, asked = ct.patch_model(subject, target, source), backend.asked
        mp.merge(subject)
        merged = subject(**source).logits
        mp.unmerge(subject)
        assert error(merged, mp.target_logits) < ROUNDING < error(before, mp.target_logits)
        assert torch.equal(subject(**source).logits, before)
    assert backend.asked == asked


def test_a_model_compiled_after_merging_computes_with_the_patch(gemma):
    target, source = runs(context=9, query=1)
    mp = ct.patch_model(gemma, target, source)
    mp.merge(gemma)
    subject = torch.compile(gemma, backend="eager")
    with torch.no_grad():
        assert error(subject(**source).logits, mp.target_logits) < ROUNDING
    mp.unmerge(gemma)


def test_an_exception_gives_the_compiler_back(gemma):
    target, source = runs(context=9, query=4)
    backend = Backend()
    subject = compiled(gemma, "layer", backend)
    mp = ct.patch_model(subject, target, source)
    with pytest.raises(RuntimeError, match="mine"), mp.applied(subject):
        raise RuntimeError("mine")
    with torch.no_grad():
        subject(**source)
    assert backend.run > 0


def test_the_stance_that_was_set_before_comes_back(gemma):
    target, source = runs(context=9, query=4)
    backend = Backend()
    subject = compiled(gemma, "torch.compile", backend)
    mp = ct.patch_model(subject, target, source)
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        with mp.applied(subject):
            subject(**source)
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            subject(**source)


def test_contexts_of_two_models_that_end_crosswise(gemma):
    """The compiler comes back when the last context is left, in whichever order threads leave theirs."""
    target, source = runs(context=9, query=4)
    other, backend = small(seed=1), Backend()
    subject = compiled(other, "layer", backend)
    first, second = ct.patch_model(gemma, target, source), ct.patch_model(subject, target, source)
    entered, left, wrong = threading.Event(), threading.Event(), []

    def elsewhere():
        with first.applied(gemma):
            entered.set()
            left.wait(60)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert entered.wait(60)
    with torch.no_grad(), second.applied(subject):
        left.set()
        thread.join()
        wrong.append(error(subject(**source).logits, second.target_logits))
    assert wrong[0] < ROUNDING
    assert backend.run == 0
    with torch.no_grad():
        subject(**source)
    assert backend.run > 0


def test_inside_of_a_compiled_function_patches_are_refused(gemma):
    target, source = runs(context=9, query=4)
    mp = ct.patch_model(gemma, target, source)
    before = snapshot(gemma)

    @torch.compile(backend="eager")
    def patched(ids):
        with mp.applied(gemma):
            return gemma(ids).logits

    with pytest.raises(ct.PatchError, match=r"inside a function that torch.compile compiles"):
        patched(source["input_ids"])
    assert unchanged(gemma, before)
    assert carried(gemma) == ()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_with_the_default_backend(gemma):
    target, source = runs(context=9, query=4)
    subject = torch.compile(gemma)
    with torch.no_grad():
        before = subject(**source).logits
        mp = ct.patch_model(subject, target, source)
        with mp.applied(subject):
            patched = subject(**source).logits
        assert error(patched, mp.target_logits) < ROUNDING < error(before, mp.target_logits)
        assert torch.equal(subject(**source).logits, before)
