"""LoRA by hand: PEFT's outputs, gradients and files, and the reference policy exactly, at any time."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from common.files import InputError
from core.lora import LoRALinear, add_lora, load_lora, lora_disabled, lora_layers, merge_lora, save_lora
from tiny import ALPHA, CLOSE, CONFIGS, IDS, RANK, adapt, logits, make


@pytest.fixture(params=["llama", "gpt2"])
def base(request):
    return make(CONFIGS[request.param])


def adapt_with_peft(base, ours):
    """A copy of `base` with PEFT's adapter, holding the weights of ours."""
    fan_in_fan_out = isinstance(base, GPT2LMHeadModel)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        fan_in_fan_out=fan_in_fan_out,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(copy.deepcopy(base), config)
    for name, layer in lora_layers(ours):
        for part in ("lora_A", "lora_B"):
            peft_parameter(model, name, part).data.copy_(getattr(layer, part))
    return model.eval()


def peft_parameter(model, name, part):
    return model.get_parameter(f"base_model.model.{name}.{part}.default.weight")


def test_outputs_and_gradients_equal_peft(base):
    ours = adapt(base)
    theirs = adapt_with_peft(base, ours)
    assert (logits(ours) - logits(base)).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)

    for model in (ours, theirs):
        model(IDS, labels=IDS).loss.backward()
    layers = dict(lora_layers(ours))
    assert 2 * len(layers) == sum(p.requires_grad for p in theirs.parameters())  # the same layers are adapted
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            grad = getattr(layer, part).grad
            assert grad.abs().max() > 1e-4  # ten times the tolerance, so that zeros would not pass
            torch.testing.assert_close(grad, peft_parameter(theirs, name, part).grad, **CLOSE)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("gpt2", None),
        ("llama", None),
        ("llama", ["q_proj", "v_proj"]),
        ("llama", ["model.layers.1.mlp.down_proj"]),
    ],
)
def test_peft_loads_what_save_lora_wrote(tmp_path, recwarn, family, targets):
    base = make(CONFIGS[family])
    ours = adapt(base, targets)
    save_lora(ours, tmp_path, "base")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]  # PEFT mends it, with a warning


def test_load_lora_loads_what_peft_wrote(base, tmp_path):
    theirs = adapt_with_peft(base, adapt(base))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)  # "auto" would ask the hub
    ours = load_lora(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)


def test_load_lora_needs_no_name_of_the_base(tmp_path):
    base = make(CONFIGS["llama"])
    ours = adapt(base)
    save_lora(ours, tmp_path, "base")
    edit_config(tmp_path, base_model_name_or_path=None)  # what PEFT writes for a model made in memory
    torch.testing.assert_close(logits(load_lora(base, tmp_path)), logits(ours), **CLOSE)


def test_save_and_load_give_back_every_weight(base, tmp_path):
    ours = adapt(base, dropout=0.25)
    save_lora(ours, tmp_path, "some/base")
    again = load_lora(copy.deepcopy(base), tmp_path)
    assert again.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for (_, one), (_, other) in zip(lora_layers(ours), lora_layers(again), strict=True):
        assert (one.scale, one.dropout) == (other.scale, other.dropout)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    )


def test_step_zero_is_the_reference_exactly(base):
    model = add_lora(copy.deepcopy(base), RANK, ALPHA)
    assert torch.equal(logits(model), logits(base))
    assert all(
        layer.lora_A.abs().max() > 0 for _, layer in lora_layers(model)
    )  # else nothing would ever train


def test_lora_disabled_is_the_base_and_ends_with_the_block(base):
    model = adapt(base)
    adapted = logits(model)
    with lora_disabled(model):
        assert torch.equal(logits(model), logits(base))
    assert torch.equal(logits(model), adapted)
    with pytest.raises(RuntimeError), lora_disabled(model):
        raise RuntimeError
    assert torch.equal(logits(model), adapted)


def test_merge_keeps_the_logits_and_leaves_plain_layers(base):
    model = adapt(base)
    adapted = logits(model)
    merge_lora(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    torch.testing.assert_close(logits(model), adapted, **CLOSE)


def test_only_the_adapter_is_trained(base):
    model = adapt(base)
    model(IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        is_adapter = name.endswith(("lora_A", "lora_B"))
        assert p.requires_grad == is_adapter, name
        assert (p.grad is not None) == is_adapter, name


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("llama", None, 3 * 7),  # q, k, v, o, gate, up, down
        ("gpt2", None, 3 * 4),  # c_attn, c_proj twice, c_fc
        ("llama", ["q_proj", "o_proj"], 3 * 2),
        ("gpt2", ["c_proj"], 3 * 2),  # one in the attention, one in the MLP
        ("llama", ["model.layers.1.self_attn.q_proj"], 1),
        ("gpt2", ["transformer.h.0.mlp.c_fc", "c_attn"], 1 + 3),
    ],
)
def test_which_layers_are_adapted(family, targets, expected):
    names = [name for name, _ in lora_layers(add_lora(make(CONFIGS[family]), RANK, ALPHA, targets=targets))]
    assert len(names) == expected
    assert "lm_head" not in names
    assert targets is None or all(name in targets or name.split(".")[-1] in targets for name in names)


# "proj" is part of a name, not a name; of the head only the weight is read, so an adapter there would be idle
@pytest.mark.parametrize("target", ["proj", "no_such_layer", "model.layers.9.self_attn.q_proj", "lm_head"])
def test_unknown_targets_are_refused_with_the_layers_there_are(target):
    with pytest.raises(InputError, match=f"{target}.*q_proj"):
        add_lora(make(CONFIGS["llama"]), RANK, ALPHA, targets=["q_proj", target])


@settings(deadline=None, max_examples=50)
@given(
    kind=st.sampled_from([nn.Linear, Conv1D]),
    rank=st.integers(1, 8),
    alpha=st.floats(0.5, 64),
    in_size=st.integers(1, 12),
    out_size=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_merged_weight_minus_base_is_alpha_over_rank_times_b_a(kind, rank, alpha, in_size, out_size, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(in_size, out_size) if kind is nn.Linear else Conv1D(out_size, in_size)
    before = linear.weight.detach().clone()
    model = add_lora(nn.Sequential(linear), rank, alpha)
    a, b = model[0].lora_A, nn.init.normal_(model[0].lora_B)
    expected = (alpha / rank * b.double() @ a.double()).detach()
    after = merge_lora(model)[0].weight
    moved = (after.double() - before.double()).detach()
    # float32 rounds the weight, and each of the rank's terms, at its own size, whatever the size of their sum
    scale = float(before.abs().max() + (alpha / rank * b.abs() @ a.abs()).max().detach())
    torch.testing.assert_close(
        moved, expected if kind is nn.Linear else expected.T, atol=2e-6 * scale, rtol=0
    )


def test_dropout_s_gradient_is_that_of_the_mask_it_drew():
    """Also after the generator has moved on."""
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(16, 8), RANK, ALPHA, 0.5).train(), torch.randn(5, 16, requires_grad=True)
    nn.init.normal_(layer.lora_B)
    layer.base.requires_grad_(False)
    weights = (x, layer.lora_A, layer.lora_B)
    torch.manual_seed(1)
    out = layer(x)
    torch.rand(100)
    found = torch.autograd.grad(out.square().sum(), weights)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    expected = layer.base(x) + ALPHA / RANK * (dropped @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(out, expected, **CLOSE)
    for ours, theirs in zip(found, torch.autograd.grad(expected.square().sum(), weights), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_dropout_stores_one_byte_for_each_element_of_a_layer_s_input():
    """Bytes kept for the backward pass, each storage counted once, beyond those without dropout."""
    stored = {}
    for dropout in (0.0, 0.5):
        model = adapt(make(CONFIGS["llama"]), dropout=dropout)
        for _, layer in lora_layers(model):
            layer.train()
        storages, weights = {}, {weight.data_ptr() for weight in model.parameters()}

        def keep(x, storages=storages, weights=weights):
            if x.data_ptr() not in weights:
                storages[x.untyped_storage().data_ptr()] = x, x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logits = model(IDS).logits
        stored[dropout] = sum(size for _, size in storages.values())
        assert logits.requires_grad
    inputs = IDS.numel() * sum(layer.lora_A.shape[1] for _, layer in lora_layers(model))
    assert stored[0.5] - stored[0.0] <= inputs


def test_dropout_falls_on_the_adapter_and_only_while_its_layer_trains():
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    model = add_lora(nn.Sequential(nn.Linear(16, 8)), RANK, ALPHA, dropout=0.5)
    layer = model[0]
    nn.init.normal_(layer.lora_B)
    term = ALPHA / RANK * x @ layer.lora_A.T @ layer.lora_B.T
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base(x) + term, **CLOSE)
    layer.train()
    assert (layer(x) - layer.base(x) - term).abs().max() > 0.1
    nn.init.zeros_(layer.lora_B)  # the base's own input is never dropped: at step 0 training is the reference
    assert torch.equal(layer(x), layer.base(x))


def test_adapting_a_model_in_eval_mode_leaves_it_there(base, tmp_path):
    save_lora(adapt(base, dropout=0.5), tmp_path, "base")
    model = load_lora(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(model), logits(model))  # else dropout is on in an eval() model


def test_bfloat16_base_keeps_a_float32_adapter():
    torch.manual_seed(0)
    model = add_lora(nn.Sequential(nn.Linear(8, 4, dtype=torch.bfloat16)), RANK, ALPHA)
    layer, x = model[0], torch.randn(3, 8, dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_B)
    y = layer(x)
    assert (layer.lora_A.dtype, layer.lora_B.dtype, y.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32
    assert merge_lora(model)[0].weight.dtype == torch.bfloat16
    # bfloat16 has 8 bits: values of size 4 through two roundings
    torch.testing.assert_close(model(x), y, atol=0.1, rtol=0.05)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_model_without_an_adapter_is_not_saved_as_one(base, tmp_path):
    with pytest.raises(ValueError, match="no LoRA"):
        save_lora(base, tmp_path, "base")
    assert not list(tmp_path.iterdir())
