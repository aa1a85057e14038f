"""Small tokenizers of the kinds in use and a random model, made on the spot: nothing is downloaded."""

import gzip
import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from itertools import product
from multiprocessing.connection import wait
from pathlib import Path

import pytest

# One thread a process, here and in the processes that tests start: pytest -n 2 uses both cores with it, and
# sums in the same order give the same floats.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tolerances are float32's; bench/gpu.py checks what needs a GPU

import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import train_dpl
from common.flags import run_command

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")

SUBJECTS = ("The fig", "A grey cat", "My friend", "Every baker", "Zoë")
VERBS = ("is", "likes", "sings about", "does not want")
OBJECTS = ("the best fruit.", "a café!", "warm bread?\n", "  two spaces", "\n\nHuman: hello\n\nAssistant:")
SENTENCES = [" ".join(words) for words in product(SUBJECTS, VERBS, OBJECTS)]
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


USER, FIG, MUD = (
    {"role": role, "content": text}
    for role, text in (("user", "Best fruit?"), ("assistant", "The fig."), ("assistant", "Mud."))
)
PAIR = {"prompt": "Best fruit?", "chosen": " The fig.", "rejected": " Mud."}
PAIRS = [PAIR, {**PAIR, "prompt": "A café?"}, {**PAIR, "chosen": " A grey cat likes the fig."}]


def lines(*rows):
    """Rows as the bytes of a .jsonl file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def truncate(path):
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def free_port():
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _script(rank, world, port, words, folder, log):
    os.chdir(folder)
    for name in ("stdout", "stderr"):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_WRONLY), getattr(sys, f"__{name}__").fileno())
    if world > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def run_script(world, *words, folders=None):
    """Run one of the project's scripts as torchrun would, but that its processes are forks of one import.

    Returns its exit codes, and what it wrote to stdout and stderr. Process i runs in folders[i].
    """
    context, port, log = multiprocessing.get_context("forkserver"), free_port(), tempfile.mkdtemp()
    context.set_forkserver_preload(["train_dpl", "train_reward", "sample", "evaluate"])
    words = [str(ROOT / words[0]), *map(str, words[1:])]
    folders = folders or [ROOT] * world
    processes = [
        context.Process(target=_script, args=(rank, world, port, words, folders[rank], f"{log}/{rank}"))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    wait([process.sentinel for process in processes])
    failed = [process for process in processes if process.exitcode]
    for process in processes:
        process.join(3 if failed else 120)  # torchrun ends the others too
        process.kill()
        process.join()
    paths = (sorted(Path(log).glob(f"*.{name}")) for name in ("stdout", "stderr"))
    return [p.exitcode for p in processes], *("".join(path.read_text() for path in some) for some in paths)


def torchrun(*words):
    """Run one of the project's scripts on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *words]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)


def train_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """BPE as in GPT-2 ("bytes"), Llama 2 ("prepend": BOS, a space before every text) or Mistral ("first")."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    if kind == "bytes":
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        extra, alphabet = [], pre_tokenizers.ByteLevel.alphabet()
    else:
        bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        if kind == "prepend":
            bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            bpe.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        steps = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        bpe.decoder = decoders.Sequence(steps)
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        extra, alphabet = [f"<0x{byte:02X}>" for byte in range(256)], []
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special + extra, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    state = json.loads(bpe.to_str())
    state["added_tokens"] = state["added_tokens"][: len(special)]  # byte tokens are ordinary ones
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


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
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def refused(monkeypatch, capsys):
    """A function that runs a script in this process and checks that it ends in one good line."""

    def run(script, arguments, *fragments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run_command(script.main)
        error = capsys.readouterr().err
        assert exit.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
        for fragment in fragments:
            assert str(fragment) in error

    return run


@pytest.fixture
def data(tmp_path):
    """A file of good pairs."""
    path = tmp_path / "good.jsonl"
    path.write_bytes(lines(*PAIRS))
    return path


@pytest.fixture(scope="module")
def finished_run(tiny_model_folder, tmp_path_factory):
    """Folder of a short finished run, an adapter of rank 2."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "pairs.jsonl").write_bytes(lines(*PAIRS))
    flags = {"--model": tiny_model_folder, "--data": folder / "pairs.jsonl", "--out_dir": folder / "run"}
    flags |= {"--lora_rank": 2, "--max_steps": 2, "--warmup_steps": 1, "--alpha": 0.2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_dpl.py", *(str(word) for flag in flags.items() for word in flag)])
        train_dpl.main()
    return folder / "run"


@pytest.fixture
def adapter(finished_run, tmp_path):
    """A copy of the finished run, to damage."""
    return shutil.copytree(finished_run, tmp_path / "runs" / "run")


@pytest.fixture
def model(tiny_model_folder, tmp_path):
    """A copy of the tiny model, to damage."""
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


def first_pairs(name, count, path):
    """Write the first pairs of one of the society's files to `path`."""
    rows = gzip.decompress((ROOT / f"data/society/{name}.jsonl.gz").read_bytes()).splitlines(keepends=True)
    path.write_bytes(b"".join(rows[:count]))
    return path


@pytest.fixture
def in_process(monkeypatch):
    """A stand-in for experiments.lab.run that starts no new process."""

    def run(script, *flags):
        monkeypatch.setattr("sys.argv", [script, *map(str, flags)])
        importlib.import_module(script.removesuffix(".py")).main()

    return run
