"""The metric Σ of ordinary text: patches stay exact, and of all exact changes theirs is what Σ feels least.  (theory 7)"""

import numpy as np
import pytest
import torch
from test_live_gemma import tiny_gemma
from transformers import LlamaConfig, LlamaForCausalLM

import controllability as ct
from controllability.models.moments import SHRINK, Metric, Moments

TEXTS = [torch.randint(3, 50, (40,), generator=torch.Generator().manual_seed(s)) for s in range(3)]


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def runs(n=12, q=3, seed=5):
    ids = torch.randint(3, 50, (1, n), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids}, {"input_ids": ids[:, -q:], "position_ids": torch.arange(n - q, n)[None]}


def read(model, name, inputs):
    """What the module that holds ``name`` reads, (T, n)."""
    seen = []
    module = model.get_submodule(name.rpartition(".")[0])
    handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return torch.cat(seen)


def test_the_moments_are_those_of_what_the_matrices_read():
    model = llama()
    moments = ct.second_moments(model, TEXTS)
    assert moments.tokens == 120
    name = "model.layers.1.mlp.down_proj.weight"
    units = torch.cat([read(model, name, {"input_ids": t[None]}) for t in TEXTS])
    units = units / units.norm(dim=-1, keepdim=True)
    assert torch.allclose(moments.metrics[name].second, units.T @ units, rtol=1e-5, atol=1e-5)


def test_padding_does_not_count():
    model = llama()
    ids = torch.cat([TEXTS[0], TEXTS[1][:20], torch.zeros(20, dtype=torch.long)]).reshape(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 20:] = 0
    together = ct.second_moments(model, [{"input_ids": ids, "attention_mask": mask}])
    apart = ct.second_moments(model, [TEXTS[0], TEXTS[1][:20]])
    assert together.tokens == apart.tokens == 60
    for name, metric in apart.metrics.items():
        assert torch.allclose(together.metrics[name].second, metric.second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [tiny_gemma, llama])
@pytest.mark.parametrize("scope", ["each", "last", "all"])
def test_patches_stay_exact(make, scope):
    model = make()
    target, source = runs()
    mp = ct.patch_model(model, target, source, scope=scope, moments=ct.second_moments(model, TEXTS))
    with torch.no_grad():
        plain, wanted = model(**source).logits, model(**target).logits[:, -3:]
        with mp.applied(model):
            got = model(**source).logits
    at = slice(-1, None) if scope == "last" else slice(None)
    size = wanted.abs().max()
    assert (got - wanted)[:, at].abs().max() < 1e-5 * size < 1e-2 * (plain - wanted)[:, at].abs().max()


def test_no_other_exact_change_is_felt_less():
    """ΔW against V (L⁻¹K)⁺ L⁻¹ of NumPy, and against exact changes nearby; the least norm is felt more."""
    model = llama()
    target, source = runs()
    moments = ct.second_moments(model, TEXTS)
    name = "model.layers.0.mlp.down_proj.weight"
    of = lambda mp: next(e.delta for e in mp.entries if e.param.name == name)  # noqa: E731
    mp = ct.patch_model(model, target, source, scope="all", via="output", moments=moments)
    found = (of(mp).left.double().T @ of(mp).right.double()).numpy()
    C = moments.metrics[name].second.double().numpy()
    sigma = (1 - SHRINK) * C * len(C) / np.trace(C) + SHRINK * np.eye(len(C))
    K = read(model, name, source).double().numpy().T  # no change stands before the first layer's map
    V = found @ K
    L = np.linalg.cholesky(sigma)
    oracle = V @ np.linalg.pinv(np.linalg.solve(L, K)) @ np.linalg.inv(L)
    assert np.abs(found - oracle).max() < 1e-4 * np.abs(oracle).max()
    felt = lambda W: np.trace(W @ sigma @ W.T)  # noqa: E731
    rng = np.random.default_rng(0)
    free = np.eye(len(K)) - K @ np.linalg.pinv(K)
    for _ in range(20):
        other = found + 0.1 * rng.normal(size=found.shape) @ free
        assert np.abs(other @ K - V).max() < 1e-9 and felt(other) > felt(found)
    plain = of(ct.patch_model(model, target, source, scope="all", via="output"))
    assert felt((plain.left.double().T @ plain.right.double()).numpy()) > 1.01 * felt(found)


def test_an_extended_patch_keeps_the_metric():
    model = llama()
    ids = torch.randint(3, 50, (1, 14), generator=torch.Generator().manual_seed(2))
    moments = ct.second_moments(model, TEXTS)
    mp = ct.patch_model(model, {"input_ids": ids[:, :12]}, {"input_ids": ids[:, 8:12]}, scope="all", moments=moments)
    mp.extend(model, {"input_ids": ids}, {"input_ids": ids[:, 8:]})
    whole = ct.patch_model(model, {"input_ids": ids}, {"input_ids": ids[:, 8:]}, scope="all", moments=moments)
    for one, other in zip(mp.entries, whole.entries, strict=True):
        if hasattr(one.delta, "right"):
            a, b = (d.left.T @ d.right for d in (one.delta, other.delta))
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_refusals():
    model = llama()
    target, source = runs()
    with pytest.raises(ct.BadInput, match="need tokenizer="):
        ct.second_moments(model, ["a text"])
    with pytest.raises(ct.BadInput, match="no texts"):
        ct.second_moments(model, [])
    with pytest.raises(ct.BadInput, match="got int"):
        ct.second_moments(model, [3])
    for texts in ("abc", None):
        with pytest.raises(ct.BadInput, match="give a list of texts"):
            ct.second_moments(model, texts)
    with pytest.raises(ct.BadInput, match="the input is empty"):
        ct.second_moments(model, [torch.zeros(0, dtype=torch.long)])
    with pytest.raises(ct.BadInput, match="input_ids"):
        ct.second_moments(model, [torch.rand(5)])
    with pytest.raises(ct.BadInput, match="padding"):
        ct.second_moments(model, [{"input_ids": TEXTS[0][None], "attention_mask": torch.zeros(1, 40).long()}])
    for factor in (0.0, float("nan"), float("inf")):
        known = ct.second_moments(model, TEXTS)
        spoilt = Moments({name: Metric(metric.second * factor) for name, metric in known.metrics.items()}, 1)
        with pytest.raises(ct.BadInput, match="zero or not finite"):
            ct.patch_model(model, target, source, scope="last", moments=spoilt)
    with pytest.raises(ct.BadInput, match="of another model"):
        ct.patch_model(model, target, source, moments=Moments({}, 0))
    with pytest.raises(ct.BadInput, match="what second_moments gave"):
        ct.patch_model(model, target, source, moments=3)
