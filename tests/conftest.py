"""Fixtures: tokenizers, a random model, a finished run, and what runs a script to see it refused."""

import json
import os
import shutil
import sys

import pytest

# One thread a process, here and in the processes that tests start: pytest -n 2 uses both cores with it, and
# sums in the same order give the same floats.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tolerances are float32's; bench/gpu.py checks what needs a GPU

import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

import evaluate
import train_dpl
from common.flags import run_command
from core.hub import load_reward_model
from scripts import call
from tiny import CHATML, PAIRS, lines, train_tokenizer

torch.set_num_threads(1)
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.fixture(scope="session", params=["bytes", "prepend", "first"])
def tokenizer(request):
    """Each kind of tokenizer, without a chat template."""
    return train_tokenizer(request.param)


@pytest.fixture(scope="session", params=["bytes", "prepend", "first"])
def chat_tokenizer(request):
    """Each kind of tokenizer with a ChatML template, whose turns end with <|im_end|> and a newline."""
    tokenizer = train_tokenizer(request.param)
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """Folder of a random two-layer Llama with the byte-level tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny_model"), train_tokenizer("bytes")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_folder(tiny_model_folder, tmp_path_factory):
    """Folder of a random reward model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("reward")
    model, tokenizer = load_reward_model(str(tiny_model_folder))
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    tokenizer.chat_template = CHATML
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished_run(tiny_model_folder, tmp_path_factory):
    """Folder of a short finished run, an adapter of rank 2."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "pairs.jsonl").write_bytes(lines(*PAIRS))
    flags = {"model": tiny_model_folder, "data": folder / "pairs.jsonl", "out_dir": folder / "run"}
    call(train_dpl, **flags, lora_rank=2, max_steps=2, warmup_steps=1, alpha=0.2)
    return folder / "run"


@pytest.fixture
def model(tiny_model_folder, tmp_path):
    """A copy of the tiny model, to damage."""
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    """A file of good pairs."""
    path = tmp_path / "good.jsonl"
    path.write_bytes(lines(*PAIRS))
    return path


@pytest.fixture
def refused(monkeypatch, capsys):
    """A function that runs a script in this process and checks that it ends in one good line."""

    def run(script, arguments, *fragments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_command(script.main)
        error = capsys.readouterr().err
        assert exit.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
        for fragment in fragments:
            assert str(fragment) in error

    return run


@pytest.fixture
def evaluated(tmp_path, capsys):
    """A function that runs evaluate.py; returns what it wrote to --out_file, and what it printed."""

    def run(command, *words, **flags):
        call(evaluate, command, *words, out_file=tmp_path / "out.json", **flags)
        return json.loads((tmp_path / "out.json").read_text()), capsys.readouterr()

    return run
