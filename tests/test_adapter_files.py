"""Adapters elsewhere: what vLLM and TRL read, and merge.py for whatever reads no adapters."""

import copy
import json
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from trl import DPOConfig, DPOTrainer

import merge
from core.hub import load_model
from core.lora import add_lora, find_base, lora_layers, save_lora
from core.pairs import load_pairs
from merge import write_merged
from sample import sample
from scripts import call, train
from tiny import ALPHA, CLOSE, CONFIGS, IDS, PAIRS, RANK, adapt, logits, make


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_vllm_finds_what_it_asks_for(family, tmp_path):
    """vLLM's rules: parse_fine_tuned_lora_name, LoRAModel.from_local_checkpoint, PEFTHelper (vllm/lora)."""
    base = make(CONFIGS[family])
    save_lora(adapt(base), tmp_path, "base")
    linear = {name: m for name, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    suffixes = {name.rsplit(".", 1)[-1] for name in linear}
    shapes = {}
    for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        module, part = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", key).groups()
        assert module.rsplit(".", 1)[-1] in suffixes  # a module that vLLM can adapt
        shapes.setdefault(module, {})[part] = tuple(tensor.shape)
    for module, parts in shapes.items():
        weight = linear[module].weight
        rows, columns = weight.T.shape if isinstance(linear[module], Conv1D) else weight.shape
        assert parts == {"lora_A": (RANK, columns), "lora_B": (rows, RANK)}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (RANK, ALPHA, "none")
    assert sorted(config["target_modules"]) == sorted(shapes)
    assert not any(config.get(key) for key in ("modules_to_save", "use_dora", "use_rslora"))


def test_trl_goes_on_from_an_adapter(tiny_model_folder, tmp_path):
    base, tokenizer = load_model(tiny_model_folder)
    model = adapt(base)
    save_lora(model, tmp_path, tiny_model_folder)
    flags = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "learning_rate": 0.1}
    trainer = DPOTrainer(
        model=PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), **flags),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    assert (logits(model) - logits(base)).abs().max() > 1e-3
    torch.testing.assert_close(logits(trainer.model), logits(model), **CLOSE)
    trainer.train()
    assert (logits(trainer.model) - logits(model)).abs().max() > 1e-3


@torch.no_grad()
def mean_logp(model, pairs):
    """Mean log-probability of the chosen completions, by one forward of transformers or PEFT for each."""
    total = 0.0
    for prompt, chosen, _ in pairs:
        logp = model(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total += logp.gather(1, torch.tensor(chosen)[:, None]).sum().item() / len(pairs)
    return total


def test_training_on_an_adapter_writes_one_adapter_of_the_base(tiny_model_folder, tmp_path, data):
    """SFT, then DPL twice: PEFT computes what was trained, from the base and the last folder alone."""
    base, tokenizer = load_model(tiny_model_folder)
    first = adapt(base, ["q_proj", "up_proj"])  # alpha / rank is 2
    save_lora(first, tmp_path / "sft", tiny_model_folder)
    tokenizer.save_pretrained(tmp_path / "sft")
    pairs, model = load_pairs(data, tokenizer, 64), tmp_path / "sft"
    before, rank = mean_logp(first, pairs), RANK
    for name, r, targets in (("dpl", 3, ["v_proj", "up_proj"]), ("again", 2, ["v_proj", "down_proj"])):
        flags = {"model": model, "data": data, "eval_data": data, "out_dir": tmp_path / name, "lora_rank": r}
        flags |= {"lora_alpha": 5, "alpha": 0.2, "max_steps": 3, "warmup_steps": 0, "lr": 0.03}
        rows = train("train_dpl.py", **flags, lora_targets=targets)
        model, rank = tmp_path / name, rank + r
        # the reference is the policy before, with all adapters so far
        assert rows[0]["eval_logp_chosen"] == pytest.approx(before, abs=1e-4)
        assert rows[0]["eval_kl"] == pytest.approx(0, abs=1e-5)
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), model).eval()
        before = mean_logp(theirs, pairs)
        assert rows[-1]["eval_logp_chosen"] == pytest.approx(before, abs=1e-4)
        assert abs(before - rows[0]["eval_logp_chosen"]) > 0.1
        torch.testing.assert_close(logits(load_model(model)[0]), logits(theirs), **CLOSE)
        config = json.loads((model / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["r"]) == (str(tiny_model_folder), rank)
        # the new columns of A are the run's own, as they are; their scale is 5 / r
        assert config["lora_alpha"] / rank == pytest.approx(5 / r)


@pytest.mark.parametrize("script", ["train_dpl.py", "train_reward.py"])
def test_all_weights_train_on_an_adapter(script, tiny_model_folder, tmp_path, data):
    flags = {"data": data, "max_steps": 2, "warmup_steps": 0, "lr": 1e-3}
    train(script, **flags, model=tiny_model_folder, out_dir=tmp_path / "adapter")
    train(script, **flags, model=tmp_path / "adapter", out_dir=tmp_path / "all", lora_rank=0)
    before, after = (
        load_file(tiny_model_folder / "model.safetensors"),
        load_file(tmp_path / "all/model.safetensors"),
    )
    shared = before.keys() & after.keys()
    assert len(shared) > 10 and not any(torch.equal(before[name], after[name]) for name in shared)


def test_an_adapter_stays_beside_a_bfloat16_base(write):
    """Merged, an update of less than half a unit of a weight's last digit would be lost."""
    base = make(CONFIGS["llama"])
    model = adapt(base)
    for _, layer in lora_layers(model):
        layer.lora_B.data *= 1e-3
    folder = write(base.bfloat16(), model)
    loaded, _ = load_model(folder, dtype=torch.bfloat16)
    for (name, ours), (_, theirs) in zip(lora_layers(loaded), lora_layers(model), strict=True):
        assert torch.equal(ours.base.weight, theirs.base.weight.bfloat16()), name
        torch.testing.assert_close(ours.delta(), theirs.delta())
    peft = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    torch.testing.assert_close(logits(loaded), logits(peft), atol=0.05, rtol=0.05)
    [completion] = sample(loaded, [5, 7], 1, 4, None, seed=0)
    assert len(completion.tokens) == 4
    # an adapter of an adapter: the first is merged
    add = adapt(load_model(folder)[0])
    save_lora(add, folder.parent / "second", folder)
    both, _ = load_model(folder.parent / "second", dtype=torch.bfloat16)
    assert any(True for _ in lora_layers(both)) and both.merged_lora


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(tiny_model_folder, tmp_path):
    base, tokenizer = load_model(tiny_model_folder)
    theirs = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    assert load_model(tmp_path)[1].get_vocab() == tokenizer.get_vocab()


# ---- merge.py


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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_merged_folder_computes_what_the_adapter_does(family, write, tmp_path):
    base = make(CONFIGS[family])
    model = adapt(base)
    adapter, out = write(base, model), tmp_path / "merged"
    call(merge, adapter, out)
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
    base = make(CONFIGS["llama"])
    model = adapt(base)
    write_merged(write(base.bfloat16(), model), tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged", dtype=None)
    assert merged.dtype == torch.bfloat16
    layer = dict(lora_layers(model))["model.layers.0.mlp.up_proj"]
    rounded_once = (base.model.layers[0].mlp.up_proj.weight.float() + layer.delta()).bfloat16()
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, rounded_once)


def test_a_reward_model_keeps_its_head(write, tmp_path):
    """Its configuration gets a padding token, which transformers needs for more than one text."""
    base = make(copy.deepcopy(CONFIGS["llama"]))
    base.config.pad_token_id = None
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1).eval()
    model.config.pad_token_id = 0
    for _, layer in lora_layers(add_lora(model, 4, 8)):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    write_merged(write(base, model), tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, **CLOSE)


def test_a_generation_config_that_transformers_warns_of_is_kept(tiny_model_folder, write, tmp_path):
    """Vicuna's and Llama 2's set a temperature without do_sample; transformers before 5.24 writes none."""
    base, sampling = make(CONFIGS["llama"]), {"temperature": 0.9, "top_p": 0.6}
    adapter = write(base, adapt(base))
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(sampling))
    write_merged(adapter, tmp_path / "merged")
    kept = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert sampling.items() <= kept.items() and not kept.get("do_sample")


def test_only_a_merged_model_is_replaced_and_only_if_asked(write, refused, tmp_path):
    base = make(CONFIGS["llama"])
    adapter, out = write(base, adapt(base)), tmp_path / "merged"
    call(merge, adapter, out)
    weights = (out / "model.safetensors").read_bytes()
    (out / "config.json").write_text("{}")
    refused(merge, [adapter, out], out, "--overwrite replaces it")
    assert (out / "config.json").read_text() == "{}"
    call(merge, adapter, out, "--overwrite")
    assert (out / "config.json").read_text() != "{}"
    assert (out / "model.safetensors").read_bytes() == weights
    refused(merge, [adapter, adapter, "--overwrite"], adapter, "no merged model")
    base = find_base(adapter)[0]
    refused(merge, [adapter, base, "--overwrite"], "holds what is merged; name another folder")
    assert (adapter / "adapter_model.safetensors").is_file()
