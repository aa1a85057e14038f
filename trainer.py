"""The one training loop, and the reference pass before it.

    a global batch of pairs -> micro-batches by a token budget -> the mean loss's gradient -> an update

What a step does is a function of (seed, step) alone: the batch is a slice of an endless stream of shuffles
and dropout is reseeded, so a resumed run is the run that was never interrupted. The gradient is that of the
mean over the batch's pairs however they are split. Row s of metrics.jsonl is the policy after s updates.
"""

import json
import math
import os
import resource
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from files import InputError, flag, naming, write_json, write_whole
from lora import add_lora, lora_layers, save_lora
from model import Stats, check_packable, load_model, pair_stats
from preferences import pack, read_pairs, tokenize
from reference import count_tokens, micro_batches, reference_stats, take

# (policy, reference) -> losses and reward margins, each (pairs,)
Objective = Callable[[Stats, Stats | None], tuple[Tensor, Tensor | None]]
STRIDE = 1000003  # between the seeds of steps and epochs
CHOICES = {
    "schedule": ("constant", "linear", "cosine"),
    "optimizer": ("adamw", "rmsprop"),
    "dtype": ("auto", "float32", "bfloat16"),
}
# flags that may change between a run and its --resume
FREE = {"out_dir", "overwrite", "resume", "max_steps", "epochs", "log_every", "eval_every", "save_every"}


@dataclass
class TrainConfig:
    """The flags of every train_*.py. Defaults suit data/society; recipes/ holds the papers' settings."""

    model: str = flag("data/society/reference", "Folder or hub name of the policy to start from.")
    data: str = flag("data/society/train.jsonl.gz", "Training rows: .jsonl[.gz], .json, .parquet.")
    eval_data: str | None = flag(None, "Held-out rows, measured every --eval_every steps.")
    out_dir: str = flag("out/run", "Where the adapter, metrics.jsonl and checkpoint/ go.")
    overwrite: bool = flag(False, "Replace the run that --out_dir holds.")
    resume: bool = flag(False, "Continue the run that --out_dir holds, or start it.")
    lora_rank: int = flag(8, "Rank of the adapter; 0 trains all weights.")
    lora_alpha: float = flag(8.0, "LoRA scale: the adapter's term is multiplied by alpha / rank.")
    lora_dropout: float = flag(0.0, "Dropout on the adapter's input.")
    lora_targets: list[str] | None = flag(None, "Layers to adapt (default: all linear but the head).")
    batch_size: int = flag(256, "Pairs per optimizer step, over all micro-batches.")
    micro_batch_tokens: int = flag(2048, "Tokens per forward pass: lower it to save memory.")
    max_length: int = flag(512, "Longest prompt + completion, in tokens.")
    max_steps: int = flag(0, "Optimizer steps; 0 means --epochs decides.")
    epochs: float = flag(1.0, "Passes over the data, where --max_steps is 0.")
    lr: float = flag(4e-3, "Peak learning rate (the papers' 7B models: 1e-5).")
    warmup_steps: int = flag(20, "Steps of linear warm-up.")
    schedule: str = flag("cosine", "After the warm-up: constant, linear or cosine (both to zero).")
    optimizer: str = flag("adamw", "adamw (no weight decay) or rmsprop.")
    max_grad_norm: float = flag(1.0, "Clip the gradient to this norm; 0 does not clip.")
    seed: int = flag(0, "Decides the order of pairs, the adapter's start and dropout.")
    log_every: int = flag(10, "Steps between rows of metrics.jsonl.")
    eval_every: int = flag(100, "Steps between evaluations, which also come first and last.")
    save_every: int = flag(100, "Steps between checkpoints; one also comes last.")
    dtype: str = flag("auto", "float32, bfloat16 or auto: bfloat16 on CUDA, else float32.")
    trust_remote_code: bool = flag(False, "Let the model's folder or hub page run its own code.")

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "micro_batch_tokens",
            "max_length",
            "log_every",
            "eval_every",
            "save_every",
        ):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lora_rank", "max_steps", "warmup_steps", "max_grad_norm"):
            self.require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("lr", "lora_alpha", "epochs"):
            self.require(name, 0 < getattr(self, name) < math.inf, "a positive number")
        self.require("seed", 0 <= self.seed < 2**32, "0 or more and below 2^32")
        self.require("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)")
        for name, choices in CHOICES.items():
            self.require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        self.require("resume", not (self.resume and self.overwrite), "given without --overwrite")

    def require(self, name: str, holds: bool, wanted: str) -> None:
        """Raise InputError naming the flag unless its value holds."""
        if not holds:
            raise InputError(f"--{name} {getattr(self, name)}: must be {wanted}")


def load_pairs(path: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequence:
    """Tokenised pairs of a file; an InputError names it."""
    rows = read_pairs(path)
    with naming(path):
        return tokenize(rows, tokenizer, max_length)


def batch_rows(step: int, size: int, count: int, seed: int) -> list[int]:
    """Rows of the global batch of a step: a slice of an endless stream of shuffles of range(count)."""
    first, last = step * size, (step + 1) * size
    stream: list[int] = []
    for epoch in range(first // count, (last - 1) // count + 1):
        generator = torch.Generator().manual_seed(seed + STRIDE * epoch)
        stream += torch.randperm(count, generator=generator).tolist()
    skip = first // count * count
    return stream[first - skip : last - skip]


def measure(
    model: PreTrainedModel,
    examples: Sequence,
    rows: Sequence[int],
    reference: Stats | None,
    objective: Objective,
    budget: int,
    where: str,
) -> dict[str, float]:
    """Means over `rows` of the loss and what explains it; with gradients on, adds the mean loss's gradient.

    `kl` is the mean of log pi_ref - log pi over completions: an estimate of KL(pi_ref || pi), in nats a
    sequence, if the reference wrote the completions, else only the policy's drift away from them.
    """
    total: defaultdict[str, float] = defaultdict(float)
    for group in micro_batches(rows, examples, budget):
        policy = pair_stats(model, pack([examples[row] for row in group]))
        known = take(reference, group, policy.logp.device)
        losses, margins = objective(policy, known)
        if not losses.isfinite().all():
            bad = [row for row, fine in zip(group, losses.isfinite().tolist(), strict=True) if not fine]
            raise InputError(f"{where}: the loss is NaN or infinite on pairs {bad} (counted from 0); stopped")
        if losses.requires_grad:
            (losses.sum() / len(rows)).backward()
        values = {"loss": losses}
        if margins is not None:
            values |= {"reward_margin": margins, "reward_accuracy": (margins > 0).float()}
        names = ("logp_chosen", "logp_rejected") if known else ("logp",)
        values |= dict(zip(names, policy.logp.T, strict=True))
        if known:
            values["kl"] = (known.logp - policy.logp).mean(1)
        for name, value in values.items():
            total[name] += value.detach().sum().item() / len(rows)
    return dict(total)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, then constant, or linear or cosine decay to zero at `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    left = 1 - (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * (left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def save_checkpoint(folder: Path, step: int, config: TrainConfig, model: nn.Module, optimizer: Any) -> None:
    """Write trained weights, optimizer state and step beside the old checkpoint, then take its place."""
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        tensors |= {f"{name}|{key}": value for key, value in optimizer.state.get(p, {}).items()}
    new, old = folder.with_name("checkpoint.new"), folder.with_name("checkpoint.old")
    shutil.rmtree(new, ignore_errors=True)
    with write_whole(new / "state.safetensors", "wb") as file:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file.name)
    write_json(new / "state.json", {"step": step, "config": asdict(config)})
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, config: TrainConfig, model: nn.Module, optimizer: Any) -> int:
    """Restore the newest whole checkpoint and return its step, 0 if there is none.

    Raises InputError if it belongs to a run with other flags, or if it is damaged.
    """
    if not folder.exists():  # interrupted between the two renames of save_checkpoint
        folder = folder.with_name("checkpoint.old")
    if not folder.exists():
        return 0
    try:
        state = json.loads((folder / "state.json").read_bytes())
        tensors, step = load_file(folder / "state.safetensors"), state["step"]
        for name, value in asdict(config).items():
            saved = state["config"][name]
            if name not in FREE and saved != value:
                raise InputError(f"--{name} {value}: the run to --resume had {saved}; give the same flags")
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data.copy_(tensors[name])
                found = {
                    k.removeprefix(f"{name}|"): v for k, v in tensors.items() if k.startswith(f"{name}|")
                }
                optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in found.items()}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder}: damaged checkpoint ({error}); delete it, or --overwrite the run"
        ) from None
    return step


def open_run(config: TrainConfig) -> Path:
    """The run's folder, checked but untouched. Raises InputError if it holds something to keep."""
    out = Path(config.out_dir)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out_dir {out}: is a file")
    if out.is_dir() and any(out.iterdir()):
        if not (out / "run.json").is_file():
            raise InputError(f"--out_dir {out}: holds files that are no run; name another folder")
        if not (config.overwrite or config.resume):
            raise InputError(f"--out_dir {out}: holds a run; --resume continues it, --overwrite replaces it")
    return out


def peak_memory(device: torch.device) -> float:
    """Most memory held so far, in GB: the device's on CUDA, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def train(
    config: TrainConfig,
    make_objective: Callable[[Stats | None, int], Objective],
    load: Callable[[str, PreTrainedTokenizerBase, int], Sequence] = load_pairs,
    reference: bool = True,
) -> None:
    """Train by `config` and write the run's folder.

    make_objective(reference, vocabulary size) returns the objective; `reference` is the training set's Stats,
    or None where none is wanted. `load` reads and tokenises a file into (prompt, *completions) examples.
    """
    out = open_run(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    # a bfloat16 base under a float32 adapter; weights that are trained themselves stay float32, with autocast
    dtype = torch.bfloat16 if half and config.lora_rank else torch.float32
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half and not config.lora_rank)
    model, tokenizer = load_model(config.model, str(device), dtype, config.trust_remote_code)
    check_packable(model, config.model)
    examples = load(config.data, tokenizer, config.max_length)
    held_out = load(config.eval_data, tokenizer, config.max_length) if config.eval_data else []
    vocabulary = model.get_input_embeddings().weight.shape[0]
    largest = max(max(map(max, example)) for example in [*examples, *held_out])
    if largest >= vocabulary:
        raise InputError(f"--model {config.model}: has no embedding for the tokenizer's id {largest}")
    longest = max(len(prompt) + max(map(len, answers)) - 1 for prompt, *answers in [*examples, *held_out])
    if longest > getattr(model.config.get_text_config(), "max_position_embeddings", longest):
        raise InputError(f"--max_length {config.max_length}: more positions than {config.model} has")
    caches, budget = out.parent / "reference", config.micro_batch_tokens
    with autocast:
        known = reference_stats(model, examples, caches, budget) if reference else None
        held_out_known = reference_stats(model, held_out, caches, budget) if reference and held_out else None
    objective = make_objective(known, model.config.get_text_config().vocab_size)

    torch.manual_seed(config.seed)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # 0.95, not 0.999: a run of a hundred steps must forget its first gradients
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    if config.optimizer == "rmsprop":
        optimizer = torch.optim.RMSprop(parameters, lr=config.lr)
    size = min(config.batch_size, len(examples))
    steps = config.max_steps or math.ceil(config.epochs * len(examples) / size)

    checkpoint, metrics_path = out / "checkpoint", out / "metrics.jsonl"
    start = load_checkpoint(checkpoint, config, model, optimizer) if config.resume else 0
    if config.overwrite:
        for folder in out.glob("checkpoint*"):
            shutil.rmtree(folder)
    lines = metrics_path.read_text().splitlines(keepends=True) if start else []
    whole = (line for line in lines if line.endswith("\n"))  # a killed run may leave half a row
    with write_whole(metrics_path) as file:
        file.writelines(line for line in whole if json.loads(line)["step"] < start)
    write_json(out / "run.json", asdict(config))
    trained = sum(p.numel() for p in parameters)
    print(f"{trained:,} trained parameters, {len(examples):,} examples, {steps:,} steps of {size}")

    bar = tqdm(range(start, steps + 1), initial=start, total=steps, desc=out.name, unit="step", disable=None)
    for step in bar:
        row, last = {"step": step}, step == steps
        evaluates = bool(held_out) and (step % config.eval_every == 0 or last)
        if evaluates:
            with autocast, torch.no_grad():
                rows = range(len(held_out))
                found = measure(model, held_out, rows, held_out_known, objective, budget, "held-out")
            row |= {f"eval_{name}": value for name, value in found.items()}
            bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        if last or (step % config.save_every == 0 and step > start):
            save_checkpoint(checkpoint, step, config, model, optimizer)

        began, rows = time.monotonic(), batch_rows(step, size, len(examples), config.seed)
        torch.manual_seed(config.seed + STRIDE * (step + 1))  # dropout, the same whether or not resumed here
        for _, layer in lora_layers(model):  # dropout is the adapter's alone: the base stays the reference
            layer.train(not last)
        with autocast, torch.set_grad_enabled(not last):
            row |= measure(model, examples, rows, known, objective, budget, f"step {step}")
        model.eval()
        if not last:
            norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf).item()
            if not math.isfinite(norm):
                raise InputError(
                    f"step {step}: the gradient is NaN or infinite on pairs {sorted(rows)}; stopped"
                )
            for group in optimizer.param_groups:
                group["lr"] = row["lr"] = learning_rate(config, step, steps)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.monotonic() - began
            row |= {"grad_norm": norm, "examples_per_second": size / seconds}
            row["tokens_per_second"] = sum(count_tokens(examples[index]) for index in rows) / seconds
        row["peak_memory_gb"] = peak_memory(device)
        bar.set_postfix(loss=row["loss"])
        if step % config.log_every == 0 or evaluates or last:
            with metrics_path.open("a") as file:
                file.write(json.dumps(row) + "\n")
    export(out, config, model, tokenizer, row)


def export(out: Path, config: TrainConfig, model: PreTrainedModel, tokenizer: Any, row: dict) -> None:
    """Write the adapter (or, at rank 0, the whole model), the tokenizer and a model card."""
    if config.lora_rank:
        base = Path(config.model)
        save_lora(model, out, base.resolve() if base.is_dir() else config.model)
    else:
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    flags = "\n".join(f"    --{name} {value}" for name, value in asdict(config).items())
    results = "\n".join(f"    {name} {value:.4g}" for name, value in row.items())
    with write_whole(out / "README.md") as file:
        file.write(
            f"# {out.name}\n\nTrained from `{config.model}` with\n\n{flags}\n\nended at\n\n{results}\n"
        )
    print(f"wrote {out}")
