"""A fit gone on with by gradient steps: what it lowers, what it keeps, and what it refuses."""

import pytest
import torch
from family_models import build
from helpers import hook_count, snapshot, unchanged
from plain_tokenizer import Plain, words
from test_strengths import ASKED, FACTS, OTHERWISE, load, moments

import controllability as ct
from controllability.compiling.compile_context import compile_context
from controllability.compiling.metric_sweep import _felt, _whitened
from controllability.compiling.strengths import Strength

GENTLE = {"ridge": 30.0, "damping": 0.1, "last": 1.0}


def made(**more):
    return compile_context(*load(), FACTS, ASKED, OTHERWISE, strength=Strength(**(GENTLE | more)), moments=moments())


def price(patch):
    """Σ tr(ΔW C ΔWᵀ)/tr(W C Wᵀ)."""
    return sum(
        float(_whitened(patch, e)[0].square().sum()) / _felt(load()[0], patch, e.param.name) for e in patch.entries
    )


def test_steps_lower_the_queries_and_the_held_out_ones():
    """More than a smaller λ does for as much drift."""
    before, hooks = snapshot(load()[0]), hook_count(load()[0])  # transformers leaves some of its own for hidden states
    plain, refined, stronger = made(), made(refine=12), made(ridge=3.0)
    assert refined.results["queries"].kl < 0.5 * plain.results["queries"].kl
    assert refined.results["heldout"].kl < plain.results["heldout"].kl
    assert refined.results["heldout"].kl < stronger.results["heldout"].kl or (
        refined.results["unrelated"].kl < stronger.results["unrelated"].kl
    )
    assert refined.solution.patch.report.fit["refined"] == 12
    assert unchanged(load()[0], before)
    assert hook_count(load()[0]) == hooks


def test_what_a_change_reads_stays():
    """The right factors span what they spanned; in the new coordinates the change is what it was, and its price a square."""
    patch, refined = made().solution.patch, made(refine=2).solution.patch
    for old, new in zip(patch.entries, refined.entries, strict=True):
        left, right = _whitened(patch, old)
        dense = old.delta.left.reshape(-1, old.delta.left.shape[-1]).mT @ old.delta.right.reshape(-1, right.shape[-1])
        assert torch.allclose(left.mT @ right, dense, atol=1e-5 * float(dense.abs().max()))
        C = patch.metrics[old.param.name].second.float()
        C = C * (len(C) / C.diagonal().sum()) + 0.03 * torch.eye(len(C))
        assert torch.allclose(right @ C @ right.mT, torch.eye(len(right)), atol=1e-3)
        rows = new.delta.right.reshape(-1, right.shape[-1])
        assert torch.linalg.matrix_rank(torch.cat([right, rows]), rtol=1e-4) == len(right)


def test_a_refined_patch_is_saved_merged_and_taken_out(tmp_path):
    model = load()[0]
    before, found = snapshot(model), made(refine=2)
    patch = found.solution.patch
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        with patch.applied(model):
            wanted = model(ids).logits
        patch.save(tmp_path / "p", model)
        loaded = ct.load_patch(tmp_path / "p")
        loaded.merge(model)
        assert torch.allclose(model(ids).logits, wanted, atol=1e-3)
        loaded.unmerge(model)
    assert unchanged(model, before)


@pytest.mark.parametrize("refine", [-1, 1.5, True, "2"])
def test_steps_are_counted(refine):
    with pytest.raises(ct.BadInput, match="whole number of steps"):
        Strength(**GENTLE, refine=refine)


def test_maps_that_are_no_plain_matrices_are_refused():
    model = build("mixtral", torch.float32)
    before, ids = snapshot(model), list(range(6, 18))
    with pytest.raises(ct.BadInput, match="refine serves changes of plain matrices"):
        compile_context(model, Plain(), words(ids), [words(ids[:3])], strength=Strength(30.0, 0.1, refine=1))
    assert unchanged(model, before)
