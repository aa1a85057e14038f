"""The one training loop, which every train_*.py shares.

    a global batch of pairs -> each process's share -> micro-batches within a token budget -> the gradient of
    the mean loss, summed over processes once -> an optimizer step

What a step does depends on (seed, step) alone: the batch is a slice of an endless stream of shuffles, and
dropout is reseeded. So a resumed run is the run that was never interrupted. The gradient is that of the mean
over the batch's pairs, however they are split. Row s of metrics.jsonl is about the policy after s updates.

    python train_dpl.py                                         # one process
    torchrun --nproc_per_node 8 train_dpl.py                    # eight, each with the whole model
    torchrun --nproc_per_node 8 train_dpl.py --parallel fsdp    # eight, each with an eighth of it
"""

import importlib.util
import json
import math
import os
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoint import export, go_back, open_run, save_checkpoint, start_files
from files import InputError, flag, naming, require
from lora import add_lora, lora_disabled, lora_layers
from model import Stats, check_packable, checkpoint_activations, load_model, max_positions, pair_stats, shard
from parallel import gathered, joined, note_signals, own_device, rank, sum_gradients, whole, world
from preferences import pack, read_pairs, tokenize
from reference import count_tokens, digest_examples, digest_model, micro_batches, reference_stats

# (policy, reference) -> losses and reward margins, each (pairs,)
Objective = Callable[[Stats, Stats | None], tuple[Tensor, Tensor | None]]
STRIDE = 1000003  # from the seed of one step or epoch to the next one's
COUNTS = ("batch_size", "micro_batch_tokens", "max_length", "log_every", "eval_every", "save_every", "keep")
CHOICES = {
    "schedule": ("constant", "linear", "cosine"),
    "optimizer": ("adamw", "rmsprop"),
    "dtype": ("auto", "float32", "bfloat16"),
    "parallel": ("ddp", "fsdp"),
}
# dense bfloat16 FLOP/s, by a word of the GPU's name
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


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
    lr: float = flag(4e-3, "Peak learning rate; recipes/ has the papers' (5e-7 to 1e-5).")
    warmup_steps: int = flag(20, "Steps of linear warm-up.")
    schedule: str = flag("cosine", "After the warm-up: constant, linear or cosine (both to zero).")
    optimizer: str = flag("adamw", "adamw (no weight decay) or rmsprop.")
    max_grad_norm: float = flag(1.0, "Clip the gradient to this norm; 0 does not clip.")
    seed: int = flag(0, "Decides the order of pairs, the adapter's start and dropout.")
    log_every: int = flag(10, "Steps between rows of metrics.jsonl.")
    eval_every: int = flag(100, "Steps between evaluations; also one at the start and one at the end.")
    save_every: int = flag(100, "Steps between checkpoints; also one at the end.")
    keep: int = flag(2, "Checkpoints to keep: the newest ones.")
    parallel: str = flag("ddp", "With torchrun: ddp (each process holds the whole model) or fsdp (a shard).")
    checkpoint_activations: bool = flag(False, "Save memory: run each layer again in the backward pass.")
    wandb: bool = flag(False, "Log to Weights & Biases too.")
    tensorboard: bool = flag(False, "Log to --out_dir/tensorboard too.")
    dtype: str = flag("auto", "float32, bfloat16 or auto: bfloat16 on CUDA, else float32.")

    def __post_init__(self) -> None:
        for name in COUNTS:
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("lora_rank", "max_steps", "warmup_steps", "max_grad_norm"):
            require(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("lr", "lora_alpha", "epochs"):
            require(self, name, 0 < getattr(self, name) < math.inf, "a positive number")
        require(self, "seed", 0 <= self.seed < 2**32, "0 or more and below 2^32")
        require(self, "lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)")
        for name, choices in CHOICES.items():
            require(self, name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        torchrun = self.parallel == "ddp" or "RANK" in os.environ
        require(self, "parallel", torchrun, "started by torchrun")
        for name in ("wandb", "tensorboard"):
            if getattr(self, name) and not importlib.util.find_spec(name):
                raise InputError(f"--{name}: needs its package: pip install {name}")
        require(self, "resume", not (self.resume and self.overwrite), "given without --overwrite")


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

    The keys: loss, reward_margin and reward_accuracy (of an objective that has margins), logp_chosen and
    logp_rejected (logp without a reference), kl. Each process measures its share of the rows; the means are
    of all of them. Raises InputError if a loss is NaN or infinite, naming `where` and the pairs.

    `kl` is the mean of log pi_ref - log pi over completions: an estimate of KL(pi_ref || pi), in nats a
    sequence, if the reference wrote the completions, else only the policy's drift away from them.
    """
    total: defaultdict[str, Tensor | float] = defaultdict(float)
    groups = micro_batches(rows, examples, budget, rank(), world())
    for group in groups:
        if isinstance(model, FSDPModule):  # it sums gradients over processes during a backward pass
            model.set_requires_gradient_sync(group is groups[-1])
        policy = pair_stats(model, pack([examples[row] for row in group]))
        known = reference and Stats(*(value[group].to(policy.logp.device) for value in reference))
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
        for name, value in values.items():  # still on the device: reading each off would make it wait
            total[name] += value.detach().sum().double() / len(rows)
    parts = gathered(torch.stack(list(total.values())).tolist())
    return dict(zip(total, map(sum, zip(*parts, strict=True)), strict=True))


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, then constant, or linear or cosine decay to zero at `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    left = 1 - (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * (left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def peak_memory(device: torch.device) -> float:
    """Most memory held so far, in GB: the device's on CUDA, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def utilisation(flops: float, device: torch.device) -> dict[str, float]:
    """FLOP/s over what this run's GPUs could do; nothing on a CPU, or on a GPU that PEAK_FLOPS lacks."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = [peak for gpu, peak in PEAK_FLOPS.items() if gpu in name]
    return {"flop_utilisation": flops / (peaks[0] * world())} if peaks else {}


def open_logs(config: TrainConfig, out: Path) -> list[Callable[[dict[str, float]], None]]:
    """What takes each row besides metrics.jsonl: Weights & Biases and TensorBoard, where asked for."""
    logs: list[Callable[[dict[str, float]], None]] = []
    if config.wandb:
        import wandb

        wandb.init(project="diverse-preferences", name=out.name, dir=out, config=asdict(config))
        logs.append(lambda row: wandb.log(row, step=row["step"]))
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"))
        logs.append(lambda row: [writer.add_scalar(name, row[name], row["step"]) for name in row])
        logs.append(lambda _: writer.flush())
    return logs


@joined()
def train(
    config: TrainConfig,
    make_objective: Callable[[Stats | None, int, Sequence, PreTrainedTokenizerBase], Objective],
    load: Callable[[str, PreTrainedTokenizerBase, int], Sequence] = load_pairs,
    reference: bool = True,
) -> None:
    """Train by `config` and write the run's folder.

    make_objective(reference, vocabulary size, training examples, tokenizer) gives the objective, `reference`
    being the examples' Stats, or None where none is wanted. `load` reads and tokenises a file into
    (prompt, *completions) examples.
    Under torchrun every process calls this. SIGTERM and SIGINT save a checkpoint and exit with code 128 + the
    signal's number.
    """
    out, device, fsdp = open_run(config), own_device(), config.parallel == "fsdp"
    half = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    # LoRA: a bfloat16 base under a float32 adapter. All weights: float32, and autocast to bfloat16
    dtype = torch.bfloat16 if half and config.lora_rank else torch.float32
    mixed = half and not config.lora_rank
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=mixed)
    place = "cpu" if fsdp else str(device)  # a model to be sharded need not fit on a device whole
    model, tokenizer = load_model(config.model, place, dtype)
    check_packable(model, config.model)
    examples = load(config.data, tokenizer, config.max_length)
    held_out = load(config.eval_data, tokenizer, config.max_length) if config.eval_data else []
    vocabulary = model.get_input_embeddings().weight.shape[0]
    largest = max(max(map(max, example)) for example in [*examples, *held_out])
    if largest >= vocabulary:
        raise InputError(f"--model {config.model}: has no embedding for the tokenizer's id {largest}")
    longest = max(len(prompt) + max(map(len, answers)) - 1 for prompt, *answers in [*examples, *held_out])
    if longest > max_positions(model):
        raise InputError(f"--max_length {config.max_length}: more positions than {config.model} has")
    size = min(config.batch_size, len(examples))
    if world() > min(size, len(held_out) or size):
        raise InputError(f"{world()} processes need as many pairs in --batch_size and in --eval_data")
    facts = {"model": digest_model(model, mixed), "data": digest_examples(examples)}
    if any(other != facts for other in gathered(facts)):
        raise InputError(f"--model {config.model}, --data {config.data}: not the same for all processes")
    facts["config"] = asdict(config)

    torch.manual_seed(config.seed)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if fsdp:
        shard(model, device, mixed)
    budget = config.micro_batch_tokens
    with autocast, lora_disabled(model):
        cache = (out.parent / "reference_cache", budget, facts["model"])
        known = reference_stats(model, examples, *cache) if reference else None
        held_out_known = reference_stats(model, held_out, *cache) if reference and held_out else None

    parameters = [p for p in model.parameters() if p.requires_grad]
    # beta2 is 0.95, not 0.999: a run may be a hundred steps, and must forget its first gradients
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    if config.optimizer == "rmsprop":
        optimizer = torch.optim.RMSprop(parameters, lr=config.lr)
    steps = config.max_steps or math.ceil(config.epochs * len(examples) / size)
    trained = sum(p.numel() for p in parameters)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    multiplied = sum(p.numel() for p in model.parameters()) - (embedding is not head) * embedding.numel()
    flops = 4 * multiplied + 2 * trained  # a token: 2 forward, 2 back to activations, 2 to trained weights

    start = go_back(config, facts, model, optimizer) if config.resume else 0
    if start > steps:
        raise InputError(f"--max_steps, --epochs: {steps:,} steps, but the run to --resume is at {start:,}")
    if rank() == 0:
        start_files(config, out, start)
    logs = open_logs(config, out) if rank() == 0 else []
    gathered(None)  # no one writes into the folder before it holds run.json
    objective = make_objective(known, vocabulary, examples, tokenizer)
    processes = f" on {world()} processes ({config.parallel})" if world() > 1 else ""
    print(f"{trained:,} trained parameters, {len(examples):,} examples, {steps:,} steps of {size}{processes}")

    caught, quiet = note_signals(), rank() > 0 or None
    bar = tqdm(range(start, steps + 1), out.name, steps + 1, initial=start, unit="step", disable=quiet)
    for step in bar:
        row, last = {"step": step}, step == steps
        stop = max(gathered(max(caught, default=0)))
        if step > start and (stop or last or step % config.save_every == 0):
            save_checkpoint(out / "checkpoint", step, facts, model, optimizer, config.keep)
        if stop:
            bar.close()
            if rank() == 0:
                name = signal.Signals(stop).name
                print(f"stopped by {name} at step {step} of {steps}; --resume goes on", file=sys.stderr)
            sys.exit(128 + stop)
        evaluates = bool(held_out) and (step % config.eval_every == 0 or last)
        if evaluates:
            with autocast, torch.no_grad():
                rows = range(len(held_out))
                found = measure(model, held_out, rows, held_out_known, objective, budget, "held-out")
            row |= {f"eval_{name}": value for name, value in found.items()}
            bar.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))

        began, rows = time.monotonic(), batch_rows(step, size, len(examples), config.seed)
        torch.manual_seed(config.seed + STRIDE * (step + 1) + rank())  # the same dropout, resumed or not
        for _, layer in lora_layers(model):  # dropout is the adapter's alone: the base stays the reference
            layer.train(not last)
        with autocast, torch.set_grad_enabled(not last):
            row |= measure(model, examples, rows, known, objective, budget, f"step {step}")
        model.eval()
        if not last:
            if not fsdp:
                sum_gradients(parameters)
            norm = whole(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)).item()
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
            row |= utilisation(flops * row["tokens_per_second"], device)
        bar.set_postfix(loss=row["loss"])
        if step % config.log_every == 0 or evaluates or last:
            row["peak_memory_gb"] = max(gathered(peak_memory(device)))
            if rank() == 0:
                with (out / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
            for log in logs:
                log(row)
    export(out, config, model, tokenizer, row)
