"""What only a GPU can show: first that the results are right, then how fast. One report, written as it goes.

    make gpu        # about ten minutes on one H100; writes out/gpu.md

Nothing is downloaded: models have random weights, and training is on the embedded society. A part that fails
is reported, the others still run, and the exit code is 1. Without a GPU, every part runs in a small form on
the CPU and the report describes it. Only its ratios and errors are meaningful, not its speeds.

    attention      FlexAttention against the dense masks, forward and backward, in bfloat16
    architectures  packed rows against one plain forward for each text, in float32 and bfloat16
    training       the society on the GPU: losses against the CPU's, resumed, checkpointed activations, FSDP
    checks         check_packable accepts bfloat16 models: 100 random token draws
    7B training    LoRA: tokens/s, share of the peak, memory, compilations after the first step
    7B sampling    tokens/s at 1, 16 and 128 samples, against generate's static cache and the memory bound
"""

import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from machine import CUDA, DEVICE, clock, rates

from checks import packing_gap, probe_pairs
from decode import Batch
from files import flag, parse, run_command
from logs import flops_per_token, peak_memory
from lora import add_lora
from model import block_mask, dense, dense_masks, flex, pair_stats
from preferences import Packed, Pair, count_tokens, pack
from sample import sample_batch

SIZES = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 7},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "gpt2": {"n_embd": 128, "n_layer": 3, "n_head": 8},
}
SEVEN_B = {"vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
SEVEN_B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768}
BFLOAT16 = torch.bfloat16


@dataclass
class GpuConfig:
    """Flags of bench/gpu.py."""

    out_file: str = flag("out/gpu.md", "The report.")
    parts: list[str] | None = flag(None, "Only these parts.")


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
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=dtype).eval()
    if scale != 1:
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(scale)
    return model


def largest_error(ours: Tensor, exact: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return ((ours.float() - exact.float()).abs().max() / exact.float().abs().max()).item()


# ---- right results


def attention(say: Callable[[str], None]) -> None:
    """FlexAttention against dense attention in float32 on the same inputs.

    On a GPU: forward and backward in bfloat16, compiled; rows of 18 to 5,000 tokens, heads of 16 to 256, 1 to
    7 query heads for each key head, windows, a cap. On the CPU: the forward pass in float32, not compiled.
    """
    tokens, sizes, groups = (18, 127, 128, 129, 2047, 5000), (16, 64, 80, 96, 128, 256), (1, 3, 4, 7)
    cases = [(t, 64, 4, w, None) for t in tokens for w in (None, 100)]
    cases += [(1000, size, 4, None, None) for size in sizes] + [(1000, 64, g, None, None) for g in groups]
    cases += [(1000, 64, 2, w, 20.0) for w in (None, 100)]
    if not CUDA:
        cases = [(t, 16, 2, w, c) for t in (18, 129) for w in (None, 10) for c in (None, 20.0)]
    rng, worst = np.random.default_rng(0), {}
    for t, size, group, window, softcap in cases:
        row = pack(make_pairs(t, rng, 512)).to(DEVICE)
        shape = [(1, 2 * group, t, size), (1, 2, t, size), (1, 2, t, size)]
        dtype = BFLOAT16 if CUDA else torch.float32
        qkv = [torch.randn(s, device=DEVICE, dtype=dtype, requires_grad=CUDA) for s in shape]
        wide = [x.detach().float().requires_grad_(CUDA) for x in qkv]
        scale = size**-0.5
        exact = dense(*wide, dense_masks(row, window), scale, softcap)
        ours = flex(*qkv, block_mask(row, window), scale, softcap)
        errors = {"forward": largest_error(ours, exact)}
        if CUDA:
            weight = torch.randn_like(exact)
            wanted = torch.autograd.grad((exact * weight).sum(), wide)
            found = torch.autograd.grad((ours.float() * weight).sum(), qkv)
            errors["backward"] = max(map(largest_error, found, wanted))
        for name, error in errors.items():
            case = f"{t} tokens, heads of {size}, groups of {group}, window {window}, cap {softcap}"
            worst[name] = max(worst.get(name, (0.0, "")), (error, case))
            assert error < (0.03 if CUDA else 1e-5), f"{name} differs by {error:.2%}: {case}"
    for name, (error, case) in worst.items():
        say(f"{name}: {len(cases)} cases, largest error {error:.2e} of the largest value, at {case}")
    say(f"graphs compiled: {counters['stats']['unique_graphs']}")


def architectures(say: Callable[[str], None]) -> None:
    """Packed rows against one plain forward for each text; the largest difference of a text in nats.

    On a GPU: in float32 and bfloat16. On the CPU: in float32.
    """
    for kind, extra in ARCHITECTURES.items():
        gaps = {}
        for dtype in (torch.float32, BFLOAT16) if CUDA else (torch.float32,):
            model = make_model(kind, (SIZES if kind != "gpt2" else {"vocab_size": 512}) | extra, dtype, 2.0)
            pairs = make_pairs(200, np.random.default_rng(1), 512) * 2
            gaps[str(dtype)[6:]] = packing_gap(model, pairs)
            assert gaps["float32"] < 0.05, f"{kind}: packing moves a text by {gaps['float32']:.2g} nats"
        say(f"{kind:12} " + ", ".join(f"{name}: {gap:.1e} nats" for name, gap in gaps.items()))


def training(say: Callable[[str], None]) -> None:
    """Training on the society in float32: largest difference of a loss from the CPU's plain run.

    On a GPU: 20 steps, FSDP over NCCL with one process, and a run in bfloat16. On the CPU: 3 steps and gloo.
    """
    runs = {
        "adapter": [],
        "adapter, checkpointed activations": ["--checkpoint_activations"],
        "all weights": ["--lora_rank", 0, "--lr", 1e-3],
        "all weights, FSDP": ["--lora_rank", 0, "--lr", 1e-3, "--parallel", "fsdp"],
        "adapter, resumed": [],
    }
    with tempfile.TemporaryDirectory() as folder:

        def losses(
            name: str, flags: list, on_gpu: bool, steps: int = 20, dtype: str = "float32"
        ) -> np.ndarray:
            out = Path(folder) / f"{name} {on_gpu} {dtype}"
            environment = os.environ | ({} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""})
            words = ["train_dpl.py", "--max_steps", steps, "--log_every", 1, "--warmup_steps", 5, *flags]
            words += ["--dtype", dtype, "--resume", "--out_dir", out]
            torchrun = ["-m", "torch.distributed.run", "--standalone"] if "FSDP" in name else []
            command = [sys.executable, *torchrun, *map(str, words)]
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
            rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            return np.array([row["loss"] for row in rows])

        baseline = {}
        for name, flags in runs.items():
            steps = 20 if CUDA else 3
            kind = name.split(",")[0]
            if kind not in baseline:
                baseline[kind] = losses(kind, flags, False, steps)
            if name.endswith("resumed"):
                losses(name, flags, CUDA, steps // 2)
            gap = abs(losses(name, flags, CUDA, steps) - baseline[kind]).max()
            say(f"{name:36} largest difference of a loss from the CPU's: {gap:.1e}")
            assert gap < 5e-3, "the losses differ"
        if CUDA:
            gap = abs(losses("adapter", [], True, dtype="bfloat16") - baseline["adapter"]).max()
            say(f"{'adapter, bfloat16':36} largest difference of a loss from the CPU's: {gap:.1e}")


def checks_(say: Callable[[str], None]) -> None:
    """How far bfloat16 moves check_packable's log-probabilities, over draws of its token ids.

    On a GPU: 100 draws, 12 layers of width 1,024. On the CPU: 5 draws, 3 layers of width 128.
    """
    sizes = SIZES | (
        {"hidden_size": 1024, "num_hidden_layers": 12, "head_dim": 64, "vocab_size": 32768} if CUDA else {}
    )
    model = make_model("llama", sizes, BFLOAT16, 1.5)
    rng, gaps = np.random.default_rng(0), []
    for _ in range(100 if CUDA else 5):
        ids = rng.integers(3, sizes["vocab_size"], 12).tolist()
        gaps.append(packing_gap(model, probe_pairs(ids)))
    say(f"{len(gaps)} draws: mean {np.mean(gaps):.2g} nats, largest {max(gaps):.2g}; the limit is 2")
    assert max(gaps) < 2, "a good model would be refused"


# ---- speed


def train_7b(say: Callable[[str], None]) -> None:
    """Forward and backward of LoRA, r = 16: speed, memory, and compilations after the first step.

    On a GPU: a model of 7B weights in bfloat16, rows of 2,048 and 8,192 tokens. On the CPU: a tiny one.
    """
    model = make_model("llama", SEVEN_B if CUDA else SIZES, BFLOAT16 if CUDA else torch.float32)
    add_lora(model, 16, 16)
    peak = rates()[0]
    flops = flops_per_token(model)
    for tokens in (2048, 8192) if CUDA else (256,):
        pairs = make_pairs(tokens, np.random.default_rng(0), model.config.vocab_size)
        packed = pack(pairs)

        def step(packed: Packed = packed) -> None:
            logp = pair_stats(model, packed).logp
            (-(logp[:, 0] - logp[:, 1])).sum().backward()
            model.zero_grad()

        step()
        graphs = counters["stats"]["unique_graphs"]
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        seconds = min(clock(step) for _ in range(5))
        compiled = counters["stats"]["unique_graphs"] - graphs
        rate = sum(map(count_tokens, pairs)) / seconds
        line = f"{tokens:,} tokens: {rate:,.0f} tokens/s, {flops * rate / peak:.0%} of a large product's rate"
        say(f"{line}, {peak_memory(DEVICE):.1f} GB, {compiled} compilations after the first step")


@torch.no_grad()
def sample_7b(say: Callable[[str], None]) -> None:
    """Tokens a second from one prompt, against generate's static cache and the bound by memory traffic.

    On a GPU: a model of 7B weights, 512 tokens, 128 new ones, 1, 16 and 128 samples. On the CPU: a tiny one.
    """
    model = make_model("llama", SEVEN_B if CUDA else SIZES, BFLOAT16 if CUDA else torch.float32)
    prompt, new = (512, 128) if CUDA else (32, 8)
    ids = torch.randint(3, model.config.vocab_size, (1, prompt), device=DEVICE)
    speed = rates()[1]
    config = model.config
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim

    def ours(n: int, compile: bool = False) -> None:
        rngs = [np.random.default_rng(i) for i in range(n)]
        sample_batch(Batch(model, ids.tolist(), [0] * n, new, None, compile=compile), rngs)

    def generate(n: int) -> None:
        flags = {"max_new_tokens": new, "min_new_tokens": new, "num_return_sequences": n, "pad_token_id": 0}
        flags |= {"do_sample": True, "top_k": 0, "cache_implementation": "static"}
        model.generate(ids, attention_mask=torch.ones_like(ids), **flags)

    for n in (1, 16, 128) if CUDA else (1, 4):
        rates_ = {}
        runs = {"sample.py": ours, "generate": generate}
        if CUDA:
            runs["sample.py --compile"] = partial(ours, compile=True)
        for name, run in runs.items():
            run(n)
            rates_[name] = n * new / min(clock(partial(run, n)) for _ in range(2))
        step = (weights + token * (prompt + n * new / 2)) * model.dtype.itemsize
        bound = n * speed / step
        speeds = ", ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in rates_.items())
        best = max(rate for name, rate in rates_.items() if name != "generate")
        ratio, share = best / rates_["generate"], best / bound
        say(f"{n} samples: {speeds}: {ratio:.2f} times, {share:.0%} of the memory bound")


PARTS = {
    "attention": attention,
    "architectures": architectures,
    "training": training,
    "checks": checks_,
    "7B training": train_7b,
    "7B sampling": sample_7b,
}


def main() -> None:
    """Run the parts in order of risk and write the report."""
    config = parse(GpuConfig, __doc__)
    path, failed = Path(config.out_file), []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:

        def say(line: str) -> None:
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        device = torch.cuda.get_device_name() if CUDA else "no GPU: small forms on the CPU"
        say(f"{device}, torch {torch.__version__}")
        for name, part in PARTS.items():
            if config.parts and name not in config.parts:
                continue
            say(f"\n## {name}\n\n{inspect.cleandoc(part.__doc__)}\n")
            began = time.monotonic()
            try:
                part(say)
            except Exception as error:  # the report is what counts: the other parts may still pass
                failed.append(name)
                say(f"FAILED: {type(error).__name__}: {error}")
                traceback.print_exc()
            say(f"({time.monotonic() - began:.0f} s)")
        say(f"\nfailed: {', '.join(failed) or 'nothing'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_command(main)
