"""A damaged or hostile file in a model's folder: one line that names the folder, in training and sampling."""

import json

import pytest

import evaluate
import sample
import train_dpl
from checks import check_packable
from common.encode import encode_prompts
from conftest import CHATML, FIG, MUD, PAIRS, USER, lines
from hub import load_model, loading


@pytest.fixture
def edit(model):
    """A function that changes keys of one of the model's .json files, or replaces it by a text."""

    def edit(name, change):
        path = model / name
        text = json.dumps(json.loads(path.read_bytes()) | change) if isinstance(change, dict) else change
        path.write_text(text)

    return edit


@pytest.fixture
def both_refused(refused, model, data, tmp_path):
    """`refused` for train_dpl.py and sample.py on the model's folder; neither writes anything."""

    def run(*fragments, rows=data):
        out = ["--out_dir", tmp_path / "out" / "run", "--lora_rank", 2]
        refused(train_dpl, ["--model", model, "--data", rows, *out], *fragments)
        out = ["--out_file", tmp_path / "out" / "samples.jsonl", "--num_samples", 1, "--max_new_tokens", 1]
        refused(sample, ["--model", model, "--prompts", rows, *out], *fragments)
        assert not (tmp_path / "out").exists()

    return run


CONFIGS = {
    "a list": "[]",
    "null": "null",
    "nested too deep": "[" * 100_000,
    "a string for a size": {"hidden_size": "32"},
    "a string for a number": {"rms_norm_eps": "x"},
    "no number of layers": {"num_hidden_layers": None},
    "layers that fill the memory": {"num_hidden_layers": 10**9},
    "no heads": {"num_attention_heads": 0},
    "no key heads": {"num_key_value_heads": 0},
    "heads of size 0": {"head_dim": 0},
    "heads of an odd size": {"head_dim": 7},
    "a size that no integer holds": {"hidden_size": 10**30},
    "a padding token beyond the vocabulary": {"pad_token_id": 10**9},
    "labels that are a number": {"id2label": 5},
    "a list of types": {"model_type": ["llama"]},
    "a dtype that torch lacks": {"dtype": "float3"},
    "a configuration of text that is none": {"text_config": {"vocab_size": 5}},
    "quantization that is a string": {"quantization_config": "x"},
    "kernels of a package that is not there": {"attn_implementation": "no-such/kernel"},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_config(both_refused, edit, model, change):
    edit("config.json", change)
    both_refused(f"--model {model}: cannot be loaded: ")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000], ids=["a list", "null", "nested too deep"])
def test_other_file(both_refused, edit, model, name, text):
    edit(name, text)
    both_refused(f"--model {model}: cannot be loaded: ")


def test_model_without_layers(refused, edit, model, data, tmp_path):
    edit("config.json", {"num_hidden_layers": 0})
    flags = ["--model", model, "--data", data, "--out_dir", tmp_path / "run", "--lora_rank", 2]
    refused(train_dpl, flags, "--lora_rank: this model has no linear layer to adapt")


def test_fault_that_only_a_forward_pass_shows(refused, tiny_model_folder, data, tmp_path, monkeypatch):
    """Whatever a model's own code raises, check_packable finds it before the first step."""
    model, _ = load_model(tiny_model_folder)
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: 1 // 0)
    flags = ["--model", tiny_model_folder, "--data", data, "--out_dir", tmp_path / "run"]
    refused(train_dpl, flags, f"--model {tiny_model_folder}: LlamaForCausalLM cannot be packed: integer div")
    monkeypatch.setattr(type(model.model), "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        check_packable(model, "here")


def interrupt(*_, **__):
    """Ctrl-C."""
    raise KeyboardInterrupt


def test_an_interrupt_is_no_fault_of_a_file(chat_tokenizer, monkeypatch):
    with pytest.raises(KeyboardInterrupt), loading("--model here"):
        interrupt()
    monkeypatch.setattr(chat_tokenizer, "apply_chat_template", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode_prompts([[USER]], chat_tokenizer)


TEMPLATES = {
    "division by zero": "{{ 1 / 0 }}",
    "overflow": "{{ '%99999999999999999999d' % 1 }}",
    "too long a range": "{% for i in range(10**9) %}{% endfor %}",
    "endless recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "nested beyond what Python compiles": "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "half a surrogate pair": '{{ "\ud800" }}',
    "of another type": "{{ messages[0].content + 1 }}",
    "an unknown encoding": "{{ 'a'.encode('nope') }}",
    "its own complaint": "{{ raise_exception('no system message') }}",
    "syntax": "{% if %}",
}


@pytest.mark.parametrize("start", TEMPLATES.values(), ids=TEMPLATES)
def test_chat_template(both_refused, edit, tmp_path, start):
    edit("tokenizer_config.json", {"chat_template": start + CHATML})
    rows = tmp_path / "chat.jsonl"
    rows.write_bytes(lines({"prompt": [USER], "chosen": [FIG], "rejected": [MUD]}))
    both_refused(f"{rows}: ", "the chat template refuses the messages: ", rows=rows)


def test_named_templates_without_a_default(both_refused, edit, tmp_path):
    edit("tokenizer_config.json", {"chat_template": [{"name": "rag", "template": CHATML}]})
    rows = tmp_path / "chat.jsonl"
    rows.write_bytes(lines({"prompt": [USER], "chosen": [FIG], "rejected": [MUD]}))
    both_refused("the chat template refuses the messages: ", "rag", rows=rows)


@pytest.mark.parametrize("end", ["x", [[1]], {}, True, 10**30, 1.5, [2, None]])
def test_end_tokens_of_the_generation_config(refused, edit, model, data, tmp_path, end):
    edit("generation_config.json", {"eos_token_id": end})
    flags = ["--model", model, "--prompts", data, "--out_file", tmp_path / "out.jsonl"]
    refused(sample, flags, f"--model {model}: generation_config.json: eos_token_id {end!r}")


@pytest.mark.parametrize(
    ("name", "change", "fragment"),
    [
        ("config.json", {"num_attention_heads": 0}, "cannot be loaded: "),
        (
            "config.json",
            {"num_hidden_layers": 10**9},
            "cannot be loaded: its configuration has 1,000,000,000",
        ),
        (
            "config.json",
            {"rms_norm_eps": float("nan")},
            "the vector of ' A grey cat likes the fig.' (and of 4 more texts) is zero",
        ),
        ("config.json", {"model_type": "t5", "architectures": ["T5Model"]}, "cannot be loaded: "),
        ("tokenizer_config.json", {"model_max_length": "x"}, "cannot be loaded: "),
        ("tokenizer_config.json", {"model_max_length": -5}, "cannot be loaded: "),
    ],
)
def test_embedder(refused, edit, model, tmp_path, name, change, fragment):
    edit(name, change)
    samples = tmp_path / "samples.jsonl"
    texts = [pair[key] for pair in PAIRS for key in ("chosen", "rejected")] + ["The fig.", "Zoë"]
    samples.write_bytes(lines(*({"prompt": "a", "completion": text} for text in texts)))
    flags = ["diversity", "--samples", samples, "--embedder", model]
    refused(evaluate, flags, f"--embedder {model}: ", fragment)
