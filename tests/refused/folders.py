"""Rows of test_refused.py: a damaged or hostile file in a model's, an adapter's or an embedder's folder."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

from common.files import ROOT
from tiny import CHATML, FIG, MUD, PAIR, PAIRS, USER, lines

ROWS = {}
CHAT = {"pairs.jsonl": lines({"prompt": [USER], "chosen": [FIG], "rejected": [MUD]})}
DEEP = "[" * 100_000


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_tensors(change, rename=lambda name: name):
    """A function that changes the tensors of a file, and their names; those of no name are left out."""

    def edit(path):
        tensors = {rename(name): change(tensor) for name, tensor in load_file(path).items()}
        save_file({name: tensor for name, tensor in tensors.items() if name}, path, {"format": "pt"})

    return edit


# ---- models

CONFIGS = {
    "a list": "[]",
    "null": "null",
    "nested too deep": DEEP,
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
FILES = {f"config.json, {name}": {"model/config.json": change} for name, change in CONFIGS.items()}
for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
    for name, text in (("a list", "[]"), ("null", "null"), ("nested too deep", DEEP)):
        FILES[f"{file}, {name}"] = {f"model/{file}": text}
for file in ("model.safetensors", "config.json", "tokenizer.json"):
    FILES[f"{file}, cut short"] = {f"model/{file}": cut_in_half}
for name, files in FILES.items():
    ROWS[name] = ("train_dpl, sample", "", files, "--model model: cannot be loaded: ")

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
REFUSES = "the chat template refuses the messages: "
for name, start in TEMPLATES.items():
    files = CHAT | {"model/tokenizer_config.json": {"chat_template": start + CHATML}}
    ROWS[f"template: {name}"] = ("train_dpl, sample", "", files, "pairs.jsonl: ", REFUSES)
named = {"model/tokenizer_config.json": {"chat_template": [{"name": "rag", "template": CHATML}]}}
ROWS["template: named, without a default"] = ("train_dpl, sample", "", CHAT | named, REFUSES, "rag")
NO_TEMPLATE = ("pairs.jsonl: ", "tokenizer has no chat template")
ROWS["messages without a template"] = ("train_dpl, sample", "", CHAT, *NO_TEMPLATE)
turns = {"pairs.jsonl": lines({"messages": [USER, FIG]})}
ROWS["messages without a template, train_sft"] = ("train_sft", "", turns, *NO_TEMPLATE)

for end in ("x", [[1]], {}, True, 10**30, 1.5, [2, None]):
    files = {"model/generation_config.json": {"eos_token_id": end}}
    fragment = f"--model model: generation_config.json: eos_token_id {end!r}"
    ROWS[f"end token {end}"] = ("sample", "", files, fragment)

QUANTIZED = [
    ("bitsandbytes", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    ("bitsandbytes", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 128}),
    ("awq", {"quant_method": "awq", "bits": 4}),
    ("compressed-tensors", {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    ("fp8", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
]
for number, (kind, config) in enumerate(QUANTIZED):
    files = {"model/config.json": {"quantization_config": config}}
    fragment = f"--model model: its weights are quantized ({kind}); give the unq"
    ROWS[f"quantized {number}, {kind}"] = ("train_dpl", "", files, fragment)


def add_token(path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(path)


def write_config_of_70_billion(path):
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    LlamaConfig(**shape, num_attention_heads=64, num_key_value_heads=8).save_pretrained(path)


NAN = {"model/model.safetensors": edit_tensors(lambda tensor: tensor * float("nan"))}
LARGE, WITHOUT = {"large": write_config_of_70_billion}, "GB without activations, and each process has"
ROWS |= {
    "no layers": (
        "train_dpl", "", {"model/config.json": {"num_hidden_layers": 0}},
        "--lora_rank: this model has no linear layer to adapt",
    ),
    "pickled weights": (
        "train_dpl", "", {"model/model.safetensors": lambda path: path.rename(path.with_suffix(".bin"))},
        "--model model: no *.safetensors weights there",
    ),
    "fewer weights than the config wants": (
        "train_dpl", "", {"model/config.json": {"num_hidden_layers": 3}},
        "--model model: ", "weights are missing or misshapen, first model.layers.2.",
    ),
    "weights that are no numbers": ("train_dpl", "", NAN, "--model model: ", "nan"),
    "weights that are no numbers, sample": (
        "sample", "--overwrite", NAN | {"out/x.jsonl": "old\n"}, "are NaN",
    ),
    "fewer positions than a row": (
        "train_dpl", "",
        {"model/config.json": {"max_position_embeddings": 8}}
        | {"pairs.jsonl": lines({**PAIR, "chosen": " The fig, the fig, the fig, the fig."})},
        "--max_length 512: more positions than",
    ),
    "fewer positions than a text": (
        "train_rl", f"--data {ROOT}/data/society/story.jsonl --max_new_tokens 64",
        {"model/config.json": {"max_position_embeddings": 16}},
        "--max_new_tokens 64: more positions than",
    ),
    "a token that the model lacks": (
        "train_dpl", "", {"model": add_token, "pairs.jsonl": lines(PAIR, {**PAIR, "prompt": "<new>"})},
        "--model model: ", "token",
    ),
    "70 billion weights": (
        "train_dpl", "--model large --lora_rank 0", LARGE, "large: training needs about 1104", WITHOUT,
    ),
    "70 billion weights, an adapter": (
        "train_dpl", "--model large --lora_rank 16", LARGE, "large: training needs about 276", WITHOUT,
    ),
}  # fmt: skip

# ---- adapters


def circle(path):
    """Two adapters, of which each names the other as its base."""
    shutil.copytree(path, path.parent / "other")
    for one, base in (("run", "other"), ("other", "run")):
        file = path.parent / one / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_bytes()) | {"base_model_name_or_path": base}))


def base(name):
    return {"adapter_config.json": {"base_model_name_or_path": name}}


def config(**keys):
    return {"adapter_config.json": keys}


def tensors(change=lambda tensor: tensor, rename=lambda name: name):
    return {"adapter_model.safetensors": edit_tensors(change, rename)}


NOT_LORA = "adapter_config.json: not a LoRA adapter's configuration"
NOT_PLAIN = "adapter_config.json: only plain LoRA adapters are read"
FLOATS = "only floats of 16, 32 or 64 bits"
RANK = "adapter_config.json: r must be a positive whole number"
CIRCLE = ("--model ", "names no other model")
TENSORS = "adapter_model.safetensors: "
ADAPTERS = {
    "a config cut short": ({"adapter_config.json": cut_in_half}, NOT_LORA),
    "a config that is a list": ({"adapter_config.json": "[]"}, NOT_LORA),
    "a config nested too deep": ({"adapter_config.json": DEEP}, NOT_LORA, "nested too deeply"),
    "no config": ({"adapter_config.json": lambda path: path.unlink()}, "the run is unfinished"),
    "another kind": ({"adapter_config.json": '{"peft_type": "IA3"}'}, NOT_PLAIN),
    "PiSSA, which changes the base": (config(init_lora_weights="pissa"), NOT_PLAIN),
    "DoRA": (config(use_dora=True), NOT_PLAIN),
    "rsLoRA": (config(use_rslora=True), NOT_PLAIN),
    "a revision of its base": (config(revision="step1000"), "revision 'step1000' of the base"),
    "ranks by layer": (config(rank_pattern={"q_proj": 2}), NOT_PLAIN),
    "another rank": (config(r=3), TENSORS, "lora_A.weight is (2, 64), but its configuration has r 3"),
    "rank 0": (config(r=0), RANK),
    "a rank in words": (config(r="two"), RANK),
    "a rank that is true": (config(r=True), RANK),
    "a rank that no integer holds": (
        config(r=10**19),
        TENSORS,
        "but its configuration has r 10000000000000000000",
    ),
    "an endless alpha": (
        config(lora_alpha=float("inf")),
        "adapter_config.json: ",
        "lora_alpha a positive number",
    ),
    "alpha in words": (config(lora_alpha="8"), "lora_alpha a positive number"),
    "itself as its base": (base("run"), *CIRCLE),
    "a base that is not there": (base("moved"), "--model ", "moved: cannot be loaded"),
    "a base with a NUL": (base("a\0b"), *CIRCLE),
    "a base with half a surrogate": (base("\ud800"), NOT_LORA),
    "bases in a circle": ({"": circle}, *CIRCLE),
    "float8": (tensors(lambda x: x.to(torch.float8_e4m3fn)), TENSORS, f"float8_e4m3fn; {FLOATS}"),
    "complex numbers": (tensors(lambda x: x.to(torch.complex64)), TENSORS, f"complex64; {FLOATS}"),
    "weights cut short": ({"adapter_model.safetensors": cut_in_half}, TENSORS + "cannot be read"),
    "no weights": ({"adapter_model.safetensors": lambda path: path.unlink()}, TENSORS + "cannot be read"),
    "a layer too many": (tensors(rename=lambda name: name.replace("layers.1", "layers.7")), TENSORS),
    "another kind of tensor": (tensors(rename=lambda name: name.replace("lora_A", "lora_C")), TENSORS),
    "A without B": (tensors(rename=lambda name: name if "lora_A" in name else None), TENSORS),
    "names cut short": (tensors(rename=lambda name: name.replace("model.layers.0.self_attn.", "")), TENSORS),
}
for name, (files, *fragments) in ADAPTERS.items():
    files = {f"run/{path}".rstrip("/"): change for path, change in files.items()}
    ROWS[f"adapter: {name}"] = ("sample", "--model run", files, "run", *fragments)
ROWS["merge, no adapter"] = ("merge", "model merged", {}, "adapter_config.json")
ROWS["merge, an adapter cut short"] = (
    "merge", "run merged", {"run/adapter_model.safetensors": b"cut short"}, "adapter_model.safetensors",
)  # fmt: skip
ROWS["merge, into nothing"] = ("merge", "run", {}, "out")
ROWS["merge, into an adapter"] = ("merge", "run run --overwrite", {}, "run", "no merged model")
ROWS["a reward model is no policy"] = ("sample", "--model reward", {}, "weights are missing", "lm_head")

# ---- embedders

texts = [pair[key] for pair in PAIRS for key in ("chosen", "rejected")] + ["The fig.", "Zoë"]
SAMPLES = {"samples.jsonl": lines(*({"prompt": "a", "completion": text} for text in texts))}
LAYERS = "cannot be loaded: its configuration has 1,000,000,000"
ZERO = "the vector of ' A grey cat likes the fig.' (and of 4 more texts) is zero"
for file, change, fragment in (
    ("config.json", {"num_attention_heads": 0}, "cannot be loaded: "),
    ("config.json", {"num_hidden_layers": 10**9}, LAYERS),
    ("config.json", {"rms_norm_eps": float("nan")}, ZERO),
    ("config.json", {"model_type": "t5", "architectures": ["T5Model"]}, "cannot be loaded: "),
    ("tokenizer_config.json", {"model_max_length": "x"}, "cannot be loaded: "),
    ("tokenizer_config.json", {"model_max_length": -5}, "cannot be loaded: "),
):
    files = SAMPLES | {f"model/{file}": change}
    row = ("evaluate diversity", "--embedder model", files, "--embedder model: ", fragment)
    ROWS[f"embedder: {' '.join(change)} {next(iter(change.values()))}"] = row
