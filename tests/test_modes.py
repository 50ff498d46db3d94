"""What a caller's modes, hooks, readers of weights and training must not do to a patch, or are refused for."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import types

import pytest
import torch
from helpers import error, hook_count, runs, snapshot, tiny_gemma, unchanged
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import controllability as ct
from controllability.errors import ControllabilityWarning


def tiny_mixtral(**more):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    more = {
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    } | more
    return MixtralForCausalLM(MixtralConfig(**sizes, **more)).eval()


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "gradients": torch.enable_grad, "no gradients": torch.no_grad, "inference": torch.inference_mode,
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16), "deterministic": deterministic,
    "float64 by default": lambda: default_dtype(torch.float64), "another device by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}  # fmt: skip


def everything(model, target, source):
    """Bits of a patch and numbers of all that is measured with it."""
    last = ct.patch_model(model, target, source, scope="last")
    found = [last.logits, *(ct.patch_model(model, target, source, scope=s).logits for s in ("each", "all"))]
    numbers = [last.sensitivity.ratio]
    for corrected in (False, True):
        last.merge(model, corrected=corrected)
        numbers += [last.merged.relative_error, last.merged_error(model).relative_error]
        last.unmerge(model)
    done = ct.generate(model, target["input_ids"], max_new_tokens=3, eos_token_id=None)
    return [t.detach().clone() for t in found], [*numbers, done.max_logit_error, done.sequences.tolist()]


@pytest.mark.parametrize("make", [tiny_gemma, tiny_mixtral, lambda: tiny_gemma(dtype=torch.bfloat16)])
def test_what_is_computed_does_not_depend_on_the_callers_modes(make):
    inputs = runs(context=9, query=3)
    wanted, numbers = everything(make(), *inputs)
    for name, mode in MODES.items() if make is tiny_gemma else list(MODES.items())[-3:]:
        model = make()
        with mode():
            found, seen = everything(model, *inputs)
        assert seen == numbers, name
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), name
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_device().type == "cpu"


@pytest.mark.parametrize("make", [tiny_gemma, tiny_mixtral])
def test_a_patch_serves_under_autocast_up_to_its_rounding(make):
    model = make()
    target, source = runs(context=9, query=3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mp = ct.patch_model(model, target, source)
        want, base = model(**target).logits[:, -3:].float(), model(**source).logits.float()
        with mp.applied(model):
            found = model(**source).logits.float()
    assert error(found, want) < 0.05 < 0.2 < error(base, want)
    assert mp.report.dtype == "float32"


def test_tolerances_follow_the_numbers_that_a_model_computes_in():
    """A model whose own forward computes in bfloat16: its parameters are float32."""
    model = tiny_gemma()
    plain = model.model.forward

    def forward(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(*args, **kwargs)

    model.model.forward = forward
    target, source = runs(context=9, query=3)
    mp = ct.patch_model(model, target, source)
    assert error(mp.logits, mp.target_logits) < 0.05


def test_construct_does_not_depend_on_autocast():
    import architectures

    block = architectures.block("gemma3")
    params, v, w = ct.sample(block, kind="torch")
    wanted = ct.prove(block).construct(params, v, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ct.prove(block).construct(params, v, w)
    assert all(torch.equal(found[n].dense(), wanted[n].dense()) for n in wanted)


# ---------------------------------------------------------------------------------------- who reads weights


def fused(self, x):
    up = functional.gelu(functional.linear(x, self.gate_proj.weight), approximate="tanh") * functional.linear(
        x, self.up_proj.weight
    )
    return functional.linear(up, self.down_proj.weight)


def fuse(model):
    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(fused, layer.mlp)


def test_a_fused_forward_is_refused_by_name_before_patching_and_after(gemma):
    target, source = runs(context=9, query=3)
    mp = ct.patch_model(gemma, target, source, scope="last")
    before = snapshot(gemma)

    def run():
        fuse(gemma)
        try:
            return gemma(**source).logits[:, -1]
        finally:
            for layer in gemma.model.layers:
                del layer.mlp.forward

    with torch.no_grad():
        with (
            mp.applied(gemma),
            pytest.raises(ct.PatchError, match=r"layer 0 .* ran, and model.layers.0.mlp.gate_proj was not"),
        ):
            run()
        assert error(run(), mp.target_logits[:, -1]) > 0.1
        with mp.applied(gemma, as_weights=True):
            assert error(run(), mp.target_logits[:, -1]) < 1e-5
    for model in (gemma, tiny_gemma()):  # read before it was fused, and never read before
        fuse(model)
        with pytest.raises(ct.PatchError, match=r"model.layers.0.mlp.gate_proj was not called"):
            ct.patch_model(model, target, source)
    assert unchanged(gemma, before)
    assert hook_count(gemma) == 0


def test_a_forward_that_goes_past_the_layers_is_refused(gemma):
    target, source = runs(context=9, query=3)
    mp = ct.patch_model(gemma, target, source)
    gone = types.SimpleNamespace(last_hidden_state=torch.zeros(1, 3, 32), past_key_values=None)
    with torch.no_grad(), mp.applied(gemma), pytest.raises(ct.PatchError, match="nor any other patched layer"):
        gemma.model.forward = lambda **_: gone
        gemma(**source)


def test_the_logits_of_long_runs_can_be_looked_at_while_the_patch_is_applied():
    """They are made by the model's own head behind a stand-in for its base model: that goes past the layers on purpose."""
    from controllability.models.reading import heads

    target, source = runs(context=9, query=3)
    few, heads.FEW = heads.FEW, 1
    try:
        model = tiny_gemma()
        mp = ct.patch_model(model, target, source)
        assert mp.output.head is not None
        with torch.no_grad(), mp.applied(model):
            assert error(mp.logits, model(**source).logits) < 1e-5
    finally:
        heads.FEW = few


def test_a_users_hook_sees_the_patched_output_whenever_it_was_registered(gemma):
    target, source = runs(context=9, query=3)
    mp = ct.patch_model(gemma, target, source, scope="last")
    seen = {}
    down = gemma.model.layers[0].mlp.down_proj

    def note(name):
        return lambda _, __, output: seen.__setitem__(name, output.clone())

    down.register_forward_hook(note("first"))
    down.register_forward_hook(note("second"))
    hooks = list(down._forward_hooks.values())
    with torch.no_grad():
        with mp.applied(gemma):
            down.register_forward_hook(note("inside"))
            gemma(**source)
            applied = dict(seen)
        mp.merge(gemma)
        gemma(**source)
        merged = seen["first"]
        mp.unmerge(gemma)
        gemma(**source)
    assert all(error(value, merged) < 1e-5 for value in applied.values())
    assert error(seen["first"], merged) > 0.1
    assert list(down._forward_hooks.values())[:2] == hooks, "their order is what it was"


def test_global_hooks_get_a_warning(gemma):
    target, source = runs(context=9, query=3)
    mp = ct.patch_model(gemma, target, source)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.warns(ControllabilityWarning, match="before its patch"), mp.applied(gemma):
            pass
    finally:
        handle.remove()


READERS = {
    "state_dict": lambda m, d: m.state_dict(), "of a part": lambda m, d: m.model.layers[0].mlp.state_dict(),
    "save_pretrained": lambda m, d: m.save_pretrained(d), "of the base": lambda m, d: m.model.save_pretrained(d),
    "copy": lambda m, d: copy.deepcopy(m.model), "copy of the layers": lambda m, d: copy.deepcopy(m.model.layers),
    "copy of a norm": lambda m, d: copy.deepcopy(m.model.layers[1].post_feedforward_layernorm),
    "pickle": lambda m, d: pickle.dumps(m.model), "torch.save": lambda m, d: torch.save(m.model.layers[0].mlp, io.BytesIO()),
    "cast": lambda m, d: m.to(torch.bfloat16), "cast of a part": lambda m, d: m.model.layers[0].half(),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("make", [tiny_gemma, tiny_mixtral])
def test_what_reads_weights_while_a_patch_is_applied_is_refused(make, reader, tmp_path):
    model = make()
    if make is tiny_mixtral and reader == "copy of a norm":
        pytest.skip("Mixtral has no such norm")
    target, source = runs(context=9, query=3)
    mp = ct.patch_model(model, target, source)
    before = snapshot(model)
    with torch.no_grad(), mp.applied(model):
        with pytest.raises(ct.PatchError, match="a patch is applied at the moment"):
            READERS[reader](model, tmp_path)
        assert not [p for p in tmp_path.iterdir() if p.stat().st_size], "nothing was written"
        assert model.to(torch.float32) is model, "what changes nothing is let through"
        assert error(model(**source).logits, mp.target_logits) < 1e-5
    assert unchanged(model, before)
    assert not {"state_dict", "save_pretrained", "_apply"} & set(vars(model))
    model.model.state_dict()


def test_files_and_copies_of_a_model_with_the_patch_as_weights_have_the_patch(gemma, tmp_path):
    target, source = runs(context=9, query=3)
    mp = ct.patch_model(gemma, target, source, scope="last")
    before = snapshot(gemma)
    with torch.no_grad():
        with mp.applied(gemma, as_weights=True):
            gemma.save_pretrained(tmp_path)
            twin = copy.deepcopy(gemma.model)
            states = gemma.model(**source).last_hidden_state
        assert (
            error(twin(**source).last_hidden_state, states)
            < 1e-6
            < error(gemma.model(**source).last_hidden_state, states)
        )
        back = type(gemma).from_pretrained(tmp_path).eval()
        assert error(back(**source).logits[:, -1], mp.target_logits[:, -1]) < 1e-5
    assert unchanged(gemma, before)
    each = ct.patch_model(gemma, *runs(context=9, query=3))
    with pytest.raises(ct.PatchError, match="use scope='last'"), each.applied(gemma, as_weights=True):
        pass
    with mp.applied(gemma):
        pass  # the lock and the model are free again


# ------------------------------------------------------------------------------------- training and gradients


@pytest.mark.parametrize("make", [tiny_gemma, tiny_mixtral])
@pytest.mark.parametrize("entered", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_are_those_of_the_model_with_the_patch_in_its_weights(make, entered):
    model = make()
    target, source = runs(context=9, query=3)
    mp = ct.patch_model(model, target, source, scope="last")
    embeds = model.get_input_embeddings()(source["input_ids"]).detach()

    def gradients():
        x = embeds.clone().requires_grad_()
        model.zero_grad()
        with torch.enable_grad():
            model(inputs_embeds=x, position_ids=source["position_ids"]).logits.pow(2).sum().backward()
        return {"input": x.grad} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    with contextlib.ExitStack() as stack:
        with entered():
            stack.enter_context(mp.applied(model))
            if entered is torch.inference_mode:
                model(**source)  # what the first run makes ready serves the next one
        found = gradients()
    with mp.applied(model, as_weights=True):
        wanted = gradients()
    assert set(wanted) <= set(found)
    size = max(float(value.abs().max()) for name, value in wanted.items() if name != "input")
    for name, value in wanted.items():
        assert float((found[name] - value).abs().max()) < 1e-5 * size, name
    moved = mp.parameters & set(wanted)
    assert all(
        float((plain[name] - wanted[name]).abs().max()) > 1e-3 * float(wanted[name].abs().max()) for name in moved
    )


def test_training_mode_is_refused_at_every_use():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, resid_pdrop=0.5
    )
    model = GPT2LMHeadModel(config).eval()
    target, source = runs(context=9, query=3)
    mp = ct.patch_model(model, target, source, scope="last")
    model.train()
    for use in (
        lambda: mp.applied(model).__enter__(),
        lambda: mp.merge(model),
        lambda: mp.applied(model, True).__enter__(),
    ):
        with pytest.raises(ct.BadInput, match="the model is in training mode"):
            use()
    model.eval()
    with torch.no_grad(), mp.applied(model):
        model.train()
        with pytest.raises(ct.PatchError, match=r"transformer.h.0 is in training mode"):
            model(**source)
        model.eval()
        model.transformer.h[1].attn.resid_dropout.train()
        with pytest.raises(ct.PatchError, match=r"transformer.h.1.attn.resid_dropout is in training mode"):
            model(**source)
        model.eval()
        assert error(model(**source).logits[:, -1], mp.target_logits[:, -1]) < 1e-5
    assert hook_count(model) == 0
    mp.merge(model)
    model.train()
    with pytest.raises(ct.BadInput, match="the model is in training mode"):
        mp.merged_error(model)
    model.eval()
    assert mp.merged_error(model).relative_error < 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_refused(gemma, reentrant):
    target, source = runs(context=9, query=3)
    mp = ct.patch_model(gemma, target, source, scope="last")
    x = gemma.get_input_embeddings()(source["input_ids"]).detach().requires_grad_()

    def run(x):
        return gemma(inputs_embeds=x, position_ids=source["position_ids"]).logits.sum()

    with mp.applied(gemma), pytest.raises(ct.PatchError, match="activation checkpointing"):
        checkpoint(run, x, use_reentrant=reentrant)
    checkpoint(run, x, use_reentrant=reentrant).backward()  # without a patch it is nobody's business
