"""What a run reports: rows of metrics.jsonl, a printed line for each, memory and speed; wandb, TensorBoard.

A row is a dict of numbers about the policy after `step` updates: what the objective returned, averaged over
the step's pairs, and under eval_... the same of the held-out pairs. At step 0 the policy is the reference, so
a reward margin in the first row is where the loss starts, not something learned: with alpha != beta, DPL
starts at (alpha - beta) times the reference's log-ratio.
"""

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from common.parallel import get_rank, get_world_size

# dense bfloat16 FLOP/s, by a word in the GPU's name
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
PRINTED = {  # names of metrics.jsonl: in a printed line
    "loss": "loss",
    "reward_accuracy": "accuracy",
    "reward_margin": "margin",
    "objective": "J",
    "reward": "reward",
    "entropy": "entropy",
    "cross_entropy": "cross-entropy",
    "kl": "kl",
    "share_cut": "cut",
    "unique_texts": "unique",
}


def open_loggers(config: Any, out: Path) -> list[Callable[[dict[str, float]], None]]:
    """Functions that each take a row: metrics.jsonl's, and those of the services that `config` asks for."""

    def append(row: dict[str, float]) -> None:
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    loggers: list[Callable[[dict[str, float]], None]] = [append]
    if config.wandb:
        import wandb

        wandb.init(project="diverse-preferences", name=out.name, dir=out, config=asdict(config))
        loggers.append(lambda row: wandb.log(row, step=row["step"]))
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"))
        loggers.append(lambda row: [writer.add_scalar(name, row[name], row["step"]) for name in row])
        loggers.append(lambda _: writer.flush())
    return loggers


def print_device(device: torch.device, dtype: str) -> None:
    """Print device, dtype and torch's version; warn if training is on the CPU and a GPU seems to be there."""
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    print(f"{device}{gpu}, {dtype}, torch {torch.__version__}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # the user wants the CPU
    if device.type == "cuda" or hidden or get_rank() > 0:
        return
    if torch.version.cuda or torch.version.hip:
        reason = "this torch is made for GPUs, but it finds none (is the driver too old for it?)"
    elif shutil.which("nvidia-smi"):
        reason = "this machine has nvidia-smi, but this torch is made for CPUs: install one made for CUDA"
    else:
        return
    print(f"WARNING: training ON THE CPU: {reason}", file=sys.stderr)


def print_start(
    parameters: Sequence[nn.Parameter], examples: int, steps: int, size: int, config: Any
) -> None:
    """Print the size of the run, and warn if it ends before the learning rate's warm-up does."""
    trained, processes = sum(p.numel() for p in parameters), get_world_size()
    line = f"{trained:,} trained parameters, {examples:,} examples, {steps:,} steps of {size}"
    print(line + f" on {processes} processes ({config.parallel})" if processes > 1 else line)
    if steps < config.warmup_steps and get_rank() == 0:
        reached = f"{config.lr * steps / config.warmup_steps:.2g}"
        reason = f"{steps} steps end inside the warm-up: --lr {config.lr:g} is not reached, only {reached}"
        print(f"warning: --warmup_steps {config.warmup_steps}: {reason}", file=sys.stderr)


def print_row(row: dict[str, float], steps: int, start: int, began: float) -> None:
    """Print a row in short, above the progress bar. Step `start` began at time.monotonic() == `began`."""
    line = f"step {row['step']}/{steps}:"
    for prefix, title in (("", ""), ("eval_", " | held-out:")):
        values = [f"{PRINTED[name]} {row[prefix + name]:.4g}" for name in PRINTED if prefix + name in row]
        line += f"{title} {', '.join(values)}" if values else ""
    if "examples_per_second" in row:
        done = row["step"] + 1 - start
        minutes_left = (time.monotonic() - began) / 60 / done * (steps - start - done)
        line += f" | {row['examples_per_second']:.3g} examples/s, {minutes_left:.1f} min left"
    if row["step"] == 0 and abs(row.get("reward_margin", 0)) > 1e-3:
        line += "  <- before any update: this margin is where the loss starts"
    tqdm.write(line)
    sys.stdout.flush()  # a run in the background writes to a file, which Python buffers


def peak_memory(device: torch.device) -> float:
    """Most memory used so far, in GB: the GPU's on CUDA, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def flops_per_token(model: nn.Module) -> float:
    """Training FLOPs per token: per weight 2 forward and 2 backward, plus 2 per trained weight's gradient."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    is_tied = head is not None and head.weight is embedding
    multiplied = sum(p.numel() for p in model.parameters()) - (not is_tied) * embedding.numel()
    return 4 * multiplied + 2 * trained


def speed(seconds: float, pairs: int, tokens: int, flops: float, device: torch.device) -> dict[str, float]:
    """Pairs and tokens per second of a step, and on a GPU of PEAK_FLOPS its FLOP/s as a share of the peak.

    `flops` is per token.
    """
    values = {"examples_per_second": pairs / seconds, "tokens_per_second": tokens / seconds}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for peak in (peak for gpu, peak in PEAK_FLOPS.items() if gpu in name):
        values["flop_utilisation"] = flops * tokens / seconds / (peak * get_world_size())
    return values
