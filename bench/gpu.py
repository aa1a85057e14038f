"""What only a GPU can show: first that the results are right, then how fast. A report, written as it goes.

    python3 bench/gpu.py                                # about ten minutes; adds to out/gpu.md
    python3 bench/gpu.py --parts attention training     # some of it; the parts are, in order of risk:

    attention          FlexAttention in bfloat16, forward and backward: Mistral's heads, short rows
    training           FSDP, resuming: losses of training against those on the CPU
    7B training        LoRA: tokens/s, share of the peak, memory, the host's time against the GPU's
    other attention    other heads, groups of them, windows, caps
    architectures      packed rows against a plain forward for each text: log-probabilities and gradients
    other training     other ways of training: bfloat16, dense masks, checkpointed activations
    checks             bfloat16 models pass check_packable
    7B sampling        tokens/s of sample.py and of generate, as a share of what memory traffic allows

It needs torch and transformers, and no network: models have random weights, and training is on the embedded
society. A case that fails, hangs or crashes is reported, the others still run, and the exit code is 1. What
was written to stderr is in out/gpu.stderr. Without a GPU, every case runs in a small form on the CPU, in
float32, and only its errors and ratios mean anything.
"""

import functools
import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import numpy as np
import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from machine import CUDA, DEVICE, DTYPE, clock, clocks, guard, rates

from common.flags import Flags, flag, parse, run_command
from common.logs import flops_per_token, peak_memory
from core.attention import block_mask, dense, dense_masks, flex
from core.checks import own_values, packing_gap, probe_pairs
from core.lora import add_lora, lora_layers
from core.model import pair_stats, wrap_layers
from core.pairs import Pair, pack
from sample import sample_completions

SIZES = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
ARCHITECTURES = {
    "mistral": {"sliding_window": 7},
    "gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "llama": {},
    "qwen3": {},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "gpt2": {"vocab_size": 512, "n_embd": 128, "n_layer": 3, "n_head": 8},
}
SEVEN_B = {"vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
SEVEN_B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768}
LIMIT = 180 if CUDA else 900  # seconds for a case
STEPS = 10 if CUDA else 4  # of training


def make_pairs(tokens: int, rng: np.random.Generator, vocabulary: int) -> list[Pair]:
    """Pairs that pack() lays into a row of `tokens` tokens: one for every 600, of three equal parts."""
    count = max(1, tokens // 600)
    draw = lambda size: rng.integers(3, vocabulary, size).tolist()  # noqa: E731
    pairs = []
    for index in range(count):
        size = tokens // count + (tokens % count if index == 0 else 0)
        pairs.append(Pair(draw(size - 2 * (size // 3)), draw(size // 3 + 1), draw(size // 3 + 1)))
    return pairs


def make_model(kind: str, sizes: dict[str, Any], dtype: torch.dtype, scale: float = 1.0) -> PreTrainedModel:
    """A random model on the device; a scale above 1 moves attention away from uniform."""
    torch.manual_seed(0)
    with torch.device(DEVICE), torch.no_grad():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=dtype).eval()
        for weight in model.parameters():
            weight.mul_(scale)
    return model


def largest_error(ours: Tensor, exact: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return ((ours.float() - exact.float()).abs().max() / exact.float().abs().max()).item()


# ---- right results: each case returns a line of the report, or raises


def attention_errors(
    tokens: int, size: int, group: int, window: int | None = None, softcap: float | None = None
) -> dict[str, float]:
    """Largest errors against dense attention in float32. (FlexAttention has no backward on the CPU.)"""
    torch.manual_seed(0)
    row = pack(make_pairs(tokens, np.random.default_rng(0), 512)).to(DEVICE)
    shapes = [(1, heads, tokens, size) for heads in (2 * group, 2, 2)]
    qkv = [torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=CUDA) for shape in shapes]
    wide = [x.detach().float().requires_grad_(CUDA) for x in qkv]
    exact = dense(*wide, row.lengths, dense_masks(row, window), size**-0.5, softcap)
    ours = flex(*qkv, block_mask(row, window), size**-0.5, softcap)
    errors = {"forward": largest_error(ours, exact)}
    if CUDA:
        weight = torch.randn_like(exact)
        wanted = torch.autograd.grad((exact * weight).sum(), wide)
        found = torch.autograd.grad((ours.float() * weight).sum(), qkv)
        errors |= {f"d{x}": largest_error(*pair) for x, *pair in zip("qkv", found, wanted, strict=True)}
    return errors


def attention(lengths: Sequence[int], size: int, group: int, **limits: float) -> str:
    """Rows of these lengths in turn: as in training, one graph is compiled for the first, then one for any.

    On the CPU two short rows, not compiled.
    """
    lengths = lengths if CUDA else [min(tokens, 129) for tokens in lengths[:2]]
    graphs, worst, failures = counters["stats"]["unique_graphs"], defaultdict(float), []
    for tokens in lengths:
        try:
            for name, error in attention_errors(tokens, size, group, **limits).items():
                worst[name] = max(worst[name], error)
                # bfloat16 has 8 bits, and a gradient adds up rounded products
                assert error < (0.03 if CUDA else 1e-5), f"{name} differs by {error:.2%}"
        except Exception as error:  # other lengths take other kernels
            traceback.print_exc()
            failures.append(f"{tokens} tokens: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
    if failures:
        raise AssertionError(f"{len(failures)} of {len(lengths)} lengths: {'; '.join(failures)}")
    errors = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    rows, graphs = ", ".join(map(str, lengths)), counters["stats"]["unique_graphs"] - graphs
    return f"{errors} of the largest value at most, {graphs} graphs; rows of {rows} tokens"


def train(out: Path, command: Sequence[str], on_gpu: bool, steps: int) -> np.ndarray:
    """The losses of a script's steps on the first 512 pairs of the society, in a process of its own."""
    data = out.parent / "pairs.jsonl"
    with gzip.open(ROOT / "data/society/train.jsonl.gz", "rt") as rows:
        data.write_text("".join(itertools.islice(rows, 512)))
    words = ["@recipes/society.txt", "--data", data, "--out_dir", out, "--resume", "--max_steps", steps]
    words += ["--log_every", 1, "--warmup_steps", 1, "--schedule", "constant"]
    env = os.environ | ({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})
    if "fsdp" in command:  # as torchrun would start the only process; port 0 is any free one
        env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    script, *flags = command
    words = [sys.executable, script, *map(str, words), *flags]
    subprocess.run(words, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL, timeout=LIMIT / 2)
    return np.array([json.loads(row)["loss"] for row in (out / "metrics.jsonl").read_text().splitlines()])


@functools.cache
def cpu_losses(*command: str) -> np.ndarray:
    """What a plain run in float32 on the CPU computes."""
    with tempfile.TemporaryDirectory() as folder:
        return train(Path(folder, "run"), command, False, STEPS)


def training(command: Sequence[str], flags: Sequence[str], resumed: bool = False) -> str:
    """Largest difference of a loss from those of a plain run on the CPU, over the steps."""
    wanted = cpu_losses(*command)
    with tempfile.TemporaryDirectory() as folder:
        out, command = Path(folder, "run"), (*command, *flags)
        if resumed:
            train(out, command, CUDA, STEPS // 2)
        gap = abs(train(out, command, CUDA, STEPS) - wanted).max()
    line = f"largest difference of a loss from the CPU's: {gap:.1e}"
    # on the CPU, other sizes of micro-batches move a loss by up to 1e-5, and bfloat16 by 5e-3
    assert gap < (0.02 if "bfloat16" in flags else 1e-3), line
    return line


def architecture(kind: str, dtype: torch.dtype) -> str:
    """Packed rows against one plain forward for each text: log-probabilities and all weights' gradients."""
    model = make_model(kind, ({} if kind == "gpt2" else SIZES) | ARCHITECTURES[kind], dtype, 2.0)
    pairs = make_pairs(200, np.random.default_rng(1), 512) * 2
    signs = torch.tensor([1.0, -1.0], device=DEVICE).repeat(len(pairs))  # chosen minus rejected

    def gradient(values: Tensor) -> Tensor:
        parts = torch.autograd.grad((values * signs).sum(), list(model.parameters()))
        return torch.cat([part.flatten() for part in parts]).float()

    plain, packed = own_values(model, pairs), pair_stats(model, pack(pairs)).logp.flatten()
    wanted, found = gradient(plain), gradient(packed)
    gap, share = (packed - plain).abs().max().item(), ((found - wanted).norm() / wanted.norm()).item()
    line = f"texts differ by {gap:.1e} nats, the gradient by {share:.1e} of its norm"
    # on the CPU: 2e-4 and 3e-6, in bfloat16 0.03 and 0.014; a window off by one token moves 0.9 and 0.5
    exact = dtype == torch.float32
    assert gap < (0.01 if exact else 0.3) and share < (1e-4 if exact else 0.07), line
    return line


def packable() -> str:
    """How far bfloat16 moves check_packable's log-probabilities, over draws of its token ids."""
    large = {"hidden_size": 1024, "num_hidden_layers": 12, "head_dim": 64, "vocab_size": 32768}
    model = make_model("llama", SIZES | (large if CUDA else {}), torch.bfloat16, 1.5)
    draws = np.random.default_rng(0).integers(3, model.config.vocab_size, (100 if CUDA else 5, 12)).tolist()
    gaps = [packing_gap(model, probe_pairs(ids)) for ids in draws]
    line = f"{len(gaps)} draws: mean {np.mean(gaps):.2g} nats, largest {np.max(gaps):.2g}; the limit is 2"
    assert np.max(gaps) < 2, line
    return line


# ---- speed


def train_7b(dropout: float, compile: bool, tokens: int) -> str:
    """Forward and backward of LoRA, r = 16, on rows of about `tokens` tokens, each of another length.

    If the host is done long before the GPU, the GPU is the bound. But the host also waits when the queue to
    the GPU is full, so compare with the row of 64 tokens: nearly all of its time is the host's.
    """
    model = make_model("llama", SEVEN_B if CUDA else SIZES, DTYPE)
    add_lora(model, 16, 16, dropout)
    for _, layer in lora_layers(model):
        layer.train()
    rng = np.random.default_rng(0)
    rows = [make_pairs(tokens - i, rng, model.config.vocab_size) for i in range(5)]

    def step(pairs: list[Pair]) -> None:
        logp = pair_stats(model, pack(pairs)).logp
        (logp[:, 1] - logp[:, 0]).sum().backward()
        model.zero_grad()

    try:
        step(rows[0])
        wrap_layers(model.model.layers, compile, False)
        for pairs in rows[:2]:  # compiled for the first length, then for any
            step(pairs)
    except torch.OutOfMemoryError:
        if tokens <= 8192:
            raise
        return "out of memory"
    graphs = counters["stats"]["unique_graphs"]
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    returned, seconds = min((clocks(partial(step, pairs)) for pairs in rows[2:]), key=lambda times: times[1])
    memory, compiled = peak_memory(DEVICE), counters["stats"]["unique_graphs"] - graphs
    share = flops_per_token(model) * tokens / seconds / rates()[0]
    line = f"{tokens / seconds:,.0f} tokens/s, {share:.0%} of a large product's rate, {memory:.1f} GB; "
    line += f"the host is done after {1e3 * returned:.0f} of {1e3 * seconds:.0f} ms; "
    return f"{line}{compiled} compilations after the second step"


@torch.no_grad()
def sample_7b(contender: str, samples: int) -> str:
    """Tokens a second from one prompt, by a fresh model: contenders change the models that they run."""
    model = make_model("llama", SEVEN_B if CUDA else SIZES, DTYPE)
    prompt, new = (512, 128) if CUDA else (32, 8)
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), device=DEVICE)

    def run() -> None:
        if contender == GENERATE:
            flags = {"max_new_tokens": new, "min_new_tokens": new, "num_return_sequences": samples}
            flags |= {"do_sample": True, "top_k": 0, "pad_token_id": 0, "cache_implementation": "static"}
            model.generate(ids, attention_mask=torch.ones_like(ids), **flags)
            return
        compile = contender.endswith("--compile")
        list(sample_completions(model, ids.tolist(), [[0]], samples, new, None, samples, compile=compile))

    rate = samples * new / min(clock(run) for _ in range(3))  # the first is the slowest
    config = model.config
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    step = (weights + token * (prompt + samples * new / 2)) * model.dtype.itemsize  # bytes read
    return f"{rate:,.0f} tokens/s, {rate / (samples * rates()[1] / step):.0%} of the memory bound"


# ---- the report

ADAPTER, REWARD = ("train_dpl.py",), ("train_reward.py",)
ALL = ("train_dpl.py", "--lora_rank", "0", "--lr", "1e-3")
FLOAT32, BFLOAT16, FSDP = ("--dtype", "float32"), ("--dtype", "bfloat16"), ("--parallel", "fsdp")
GENERATE = "generate with a static cache" + (", which compiles itself" if CUDA else "")
SHORT = (18, 33, 64, 100, 127)  # FlexAttention has another kernel below 128, for decoding

PARTS: dict[str, dict[str, Callable[[], str]]] = {
    "attention": {
        "heads of 128, groups of 4": partial(attention, (129, *SHORT, 128, 2047, 5000), 128, 4),
        "groups of 8": partial(attention, SHORT, 64, 8),
    },
    "training": {
        "all weights, FSDP": partial(training, ALL, FLOAT32 + FSDP),
        "adapter, resumed": partial(training, ADAPTER, FLOAT32, resumed=True),
        "adapter, bfloat16, FSDP": partial(training, ADAPTER, BFLOAT16 + FSDP),
        "reward model, bfloat16": partial(training, REWARD, BFLOAT16),
    },
    "7B training": {
        f"{tokens:,} tokens, dropout {dropout}{more}": partial(train_7b, dropout, bool(more), tokens)
        for tokens in ((2048, 8192, 64, 16384) if CUDA else (256,))
        for dropout, more in ((0.05, ""), (0.05, ", --compile"), (0, ""))
    },
    "other attention": {
        **{f"groups of {group}": partial(attention, SHORT, 64, group) for group in (2, 1)},
        "groups of 7": partial(attention, (1000,), 64, 7),
        "a window": partial(attention, (127, 1000, 2047), 64, 4, window=100),
        "a cap": partial(attention, (1000,), 64, 2, softcap=20.0),
        "a window and a cap": partial(attention, (1000,), 64, 2, window=100, softcap=20.0),
        **{f"heads of {size}": partial(attention, (1000,), size, 4) for size in (80, 96, 256)},
    },
    "architectures": {
        f"{kind}, {str(dtype)[6:]}": partial(architecture, kind, dtype)
        for dtype in dict.fromkeys((DTYPE, torch.float32))
        for kind in ARCHITECTURES
    },
    "other training": {
        "adapter, bfloat16": partial(training, ADAPTER, BFLOAT16),
        "all weights, bfloat16": partial(training, ALL, BFLOAT16),
        "adapter, dense masks": partial(training, ADAPTER, (*FLOAT32, "--attention", "dense")),
        "adapter, checkpointed": partial(training, ADAPTER, (*FLOAT32, "--checkpoint_activations")),
        "adapter, --compile, FSDP": partial(training, ADAPTER, (*FLOAT32, *FSDP, "--compile")),
        "all weights, bfloat16, FSDP": partial(training, ALL, BFLOAT16 + FSDP),
    },
    "checks": {"a wide model": packable},
    "7B sampling": {
        f"{samples} samples, {contender}": partial(sample_7b, contender, samples)
        for samples in ((1, 128) if CUDA else (1, 4))
        # with a static cache generate compiles itself, on CUDA, and replays CUDA graphs
        for contender in ("sample.py", GENERATE, "sample.py --compile")
    },
}
if not CUDA:  # slow there, or no other way of computing
    for cases in PARTS.values():
        for name in [n for n in cases if any(word in n for word in ("bfloat16", "dense", "--compile"))]:
            del cases[name]


@dataclass
class GpuConfig(Flags):
    """Flags of bench/gpu.py."""

    out_file: str = flag("out/gpu.md", "The report is appended to it.")
    parts: list[str] | None = flag(None, "Only these parts.", tuple(PARTS))


def header() -> str:
    """The machine and the versions."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which(query[0]) else ""
    device = torch.cuda.get_device_name() if CUDA else "no GPU: small forms on the CPU"
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}, {str(DTYPE)[6:]}"
    return f"{device}, driver {(found.split() or ['unknown'])[0]}, {libraries}"


def main() -> None:
    """Run the parts in order of risk and write the report."""
    config = parse(GpuConfig, __doc__)
    path, failed = Path(config.out_file), []
    path.parent.mkdir(parents=True, exist_ok=True)
    call = guard(path.with_suffix(".stderr"), LIMIT)
    with path.open("a") as file:

        def say(text: str) -> None:
            print(text, end="", flush=True)
            file.write(text)
            file.flush()

        say(f"# {time.strftime('%d %B %Y, %H:%M')}: {header()}\n")
        for part in config.parts or PARTS:
            say(f"\n## {part}\n\n")
            for name, case in PARTS[part].items():
                say(f"- {name}: ")  # first: if a case takes the machine down, the report ends with its name
                began = time.monotonic()
                succeeded, result, errors = call(case)
                say(f"{'' if succeeded else 'FAILED: '}{result} ({time.monotonic() - began:.0f} s)\n")
                warnings = [line for line in errors.splitlines() if line.lower().startswith("warning: ")]
                say("".join(f"  - {line}\n" for line in dict.fromkeys(warnings)))
                if not succeeded:
                    failed.append(f"{part}: {name}")
                    written = errors.partition("\nExtension modules: ")[0]  # of a crash: all of them
                    say(textwrap.indent(f"\n{written[-500:].strip()}\n\n", " " * 6))
        say(f"\nfailed: {'; '.join(failed) or 'nothing'}\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_command(main)
