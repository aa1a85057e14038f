"""lora.py merge: the adapter's model without an adapter, as PEFT merges it, whole or not at all."""

import copy
import sys

import pytest
import torch
from peft import PeftModel
from test_lora import CLOSE, IDS, adapt, logits, make_base
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lora
from lora import add_lora, lora_layers, save_lora, write_merged
from model import load_model


@pytest.fixture
def write(tiny_model_folder, tmp_path):
    """A function that writes base and adapter as folders, with a tokenizer, and returns the adapter's."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)

    def write(base, model):
        base.save_pretrained(tmp_path / "base")
        save_lora(model, tmp_path / "adapter", tmp_path / "base")
        for name in ("base", "adapter"):
            tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / "adapter"

    return write


def merge(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["lora.py", "merge", *map(str, words)])
    lora.main()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_merged_folder_computes_what_the_adapter_does(family, write, tmp_path, monkeypatch):
    base = make_base(family)
    model = adapt(base)
    adapter, out = write(base, model), tmp_path / "merged"
    merge(monkeypatch, adapter, out)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert (logits(merged) - logits(base)).abs().max() > 0.1
    torch.testing.assert_close(logits(merged), logits(model), **CLOSE)
    peft = PeftModel.from_pretrained(copy.deepcopy(base), adapter).merge_and_unload()
    assert merged.state_dict().keys() == peft.state_dict().keys()
    for name, weight in peft.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], weight, **CLOSE)
    assert (
        AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(adapter).get_vocab()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_a_bfloat16_base_stays_one(write, tmp_path):
    base = make_base("llama")
    model = adapt(base)
    write_merged(write(base.bfloat16(), model), tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged", dtype=None)
    assert merged.dtype == torch.bfloat16
    layer = dict(lora_layers(model))["model.layers.0.mlp.up_proj"]
    rounded_once = (base.model.layers[0].mlp.up_proj.weight.float() + layer.delta()).bfloat16()
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, rounded_once)


def test_a_reward_model_keeps_its_head(write, tmp_path):
    base = make_base("llama")
    base.config.pad_token_id = 0
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1).eval()
    for _, layer in lora_layers(add_lora(model, 4, 8)):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    write_merged(write(base, model), tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, **CLOSE)


def test_only_a_merged_model_is_replaced_and_only_if_asked(write, refused, tmp_path, monkeypatch):
    base = make_base("llama")
    adapter, out = write(base, adapt(base)), tmp_path / "merged"
    merge(monkeypatch, adapter, out)
    weights = (out / "model.safetensors").read_bytes()
    (out / "config.json").write_text("{}")
    refused(lora, ["merge", adapter, out], out, "--overwrite replaces it")
    assert (out / "config.json").read_text() == "{}"
    merge(monkeypatch, adapter, out, "--overwrite")
    assert (out / "config.json").read_text() != "{}"
    assert (out / "model.safetensors").read_bytes() == weights
    refused(lora, ["merge", adapter, adapter, "--overwrite"], adapter, "no merged model")
    assert (adapter / "adapter_model.safetensors").is_file()


def test_what_is_no_adapter_is_refused_and_leaves_nothing(write, refused, tmp_path):
    base = make_base("llama")
    adapter = write(base, adapt(base))
    refused(lora, ["merge", tmp_path / "base", tmp_path / "merged"], "adapter_config.json")
    (adapter / "adapter_model.safetensors").write_bytes(b"cut short")
    refused(lora, ["merge", adapter, tmp_path / "merged"], "adapter_model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    refused(lora, ["merge", adapter], "out")
