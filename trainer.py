"""The training loop that every train_*.py shares.

    global batch of pairs -> this process's share -> micro-batches -> gradient of the mean loss -> all_reduce
    -> optimizer step

The gradient is that of the mean loss over the global batch, for any number of processes and any split into
micro-batches. A step depends on (seed, step) alone: the batch is a slice of an endless stream of shuffled
epochs, and dropout is seeded anew at every step. So a resumed run equals one that was never interrupted.

A loss is a function objective(policy, reference) (see `Objective`); train_dpl.py shows a complete script.

    python train_dpl.py                                         # one process
    torchrun --nproc_per_node 8 train_dpl.py                    # DDP
    torchrun --nproc_per_node 8 train_dpl.py --parallel fsdp    # FSDP2
"""

import argparse
import importlib.util
import math
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoint import export, open_run, read_flags, resume_run, save_checkpoint, start_run
from checks import check_inputs, check_objective, check_packable
from files import InputError, digest_json, error_prefix, flag, require
from formats import read_pairs
from logs import flop_utilisation, flops_per_token, open_loggers, peak_memory, print_row
from lora import add_lora, lora_disabled, lora_layers
from model import Stats, load_model, packed_forward, pair_stats
from parallel import (
    all_gather,
    all_reduce_gradients,
    barrier,
    checkpoint_activations,
    distributed,
    full_tensor,
    get_device,
    get_rank,
    get_world_size,
    record_signals,
    shard,
)
from preferences import count_tokens, describe, micro_batches, pack, tokenize
from reference import digest_model, reference_stats

# objective(policy, reference) -> {"loss": (pairs,), and anything else (pairs,) to average and log}
#
# `policy` and `reference` are Stats of one micro-batch, (pairs, 2) each; without a reference it is None.
# policy.logp and policy.entropy carry gradients. An objective sees one micro-batch, not the global batch: the
# loss of a pair may not depend on the other pairs (no batch statistics). "reward_margin", (pairs,), also
# gives reward_accuracy, the share of pairs where it is positive.
Objective = Callable[[Stats, Stats | None], dict[str, Tensor]]
Load = Callable[[str, PreTrainedTokenizerBase, int, bool], Sequence]
Prepare = Callable[[PreTrainedModel, PreTrainedTokenizerBase, Sequence, Stats], dict[str, Any]]
SEED_STRIDE = 1000003  # between the seeds of one step or epoch and the next
CHOICES = {
    "schedule": ("constant", "linear", "cosine"),
    "optimizer": ("adamw", "rmsprop"),
    "dtype": ("auto", "float32", "bfloat16"),
    "parallel": ("ddp", "fsdp"),
}


@dataclass
class TrainConfig:
    """Flags of every train_*.py. Defaults are the DPL paper's (appendix B.3) where it gives a value."""

    # model and data
    model: str | None = flag(None, "Folder or hub name of the policy to start from.")
    data: str | None = flag(None, "Training rows: .jsonl[.gz], .json, .parquet.")
    eval_data: str | None = flag(None, "Held-out rows, evaluated every --eval_every steps.")
    chat: bool = flag(False, "Put rows of strings through the chat template.")
    max_length: int = flag(512, "Longest prompt + completion, in tokens.")
    # the run's folder
    out_dir: str = flag("out/run", "Folder for the adapter, metrics.jsonl and checkpoint/.")
    overwrite: bool = flag(False, "Replace the run in --out_dir.")
    resume: bool = flag(False, "Continue the run in --out_dir with its own flags, or start it.")
    # LoRA
    lora_rank: int = flag(16, "Rank of the adapter; 0 trains all weights.")
    lora_alpha: float = flag(16.0, "LoRA's scale: the adapter's output is multiplied by alpha / rank.")
    lora_dropout: float = flag(0.05, "Dropout on the adapter's input.")
    lora_targets: list[str] | None = flag(None, "Layers to adapt (default: all linear layers but the head).")
    # optimization
    batch_size: int = flag(8, "Pairs per optimizer step, over all processes and micro-batches.")
    max_steps: int = flag(0, "Optimizer steps; 0 means --epochs decides.")
    epochs: float = flag(1.0, "Passes over the data, if --max_steps is 0.")
    lr: float = flag(1e-5, "Peak learning rate.")
    warmup_steps: int = flag(150, "Steps of linear warm-up.")
    schedule: str = flag("constant", "After the warm-up: constant, linear or cosine (both to zero).")
    optimizer: str = flag("adamw", "adamw (no weight decay) or rmsprop.")
    max_grad_norm: float = flag(1.0, "Clip the gradient to this norm; 0 does not clip.")
    seed: int = flag(0, "Seed for the order of pairs, the adapter's initialization and dropout.")
    # logging and checkpoints
    log_every: int = flag(10, "Steps between rows of metrics.jsonl, which are printed too.")
    eval_every: int = flag(100, "Steps between evaluations; there is also one at the start and the end.")
    save_every: int = flag(100, "Steps between checkpoints; there is also one at the end.")
    keep: int = flag(2, "Checkpoints to keep: the newest ones.")
    wandb: bool = flag(False, "Log to Weights & Biases too.")
    tensorboard: bool = flag(False, "Log to --out_dir/tensorboard too.")
    # memory and devices
    micro_batch_tokens: int = flag(2048, "Tokens per forward pass: lower it to save memory.")
    checkpoint_activations: bool = flag(False, "Save memory: run each layer again in the backward pass.")
    parallel: str = flag("ddp", "With torchrun: ddp (each process holds the whole model) or fsdp (a shard).")
    dtype: str = flag("auto", "float32, bfloat16 or auto: bfloat16 on CUDA, else float32.")

    society = "recipes/society.txt"  # the embedded world's flags, read if neither --model nor --data is given

    def __post_init__(self) -> None:
        positive = ("batch_size", "micro_batch_tokens", "max_length", "log_every", "eval_every", "save_every")
        for name in (*positive, "keep"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("lora_rank", "max_steps", "warmup_steps", "max_grad_norm"):
            require(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("lr", "lora_alpha", "epochs"):
            require(self, name, 0 < getattr(self, name) < math.inf, "a positive number")
        require(self, "seed", 0 <= self.seed < 2**32, "0 or more and below 2^32")
        require(self, "lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)")
        for name, choices in CHOICES.items():
            require(self, name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        require(self, "parallel", self.parallel == "ddp" or "RANK" in os.environ, "started by torchrun")
        require(self, "resume", not (self.resume and self.overwrite), "given without --overwrite")
        for name in ("wandb", "tensorboard"):
            if getattr(self, name) and not importlib.util.find_spec(name):
                raise InputError(f"--{name}: needs its package: pip install {name}")

    @classmethod
    def default_args(cls, args: argparse.Namespace) -> list[str]:
        """Arguments that parse() reads before the command line's: the resumed run's own, or the society's."""
        saved = Path(args.out_dir, "run.json")
        if args.resume and saved.is_file():
            flags = read_flags(saved.parent) | {"out_dir": args.out_dir, "overwrite": False}
            values = {name: v if isinstance(v, list) else [v] for name, v in flags.items() if v is not None}
            return [word for name, value in values.items() for word in (f"--{name}", *map(str, value))]
        if args.model is None and args.data is None and cls.society:
            return [f"@{Path(__file__).parent / cls.society}"]
        return []


def load_pairs(
    path: str, tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool = False
) -> Sequence:
    """Tokenised preference pairs of a file. Raises InputError naming the file."""
    rows = read_pairs(path, chat)
    with error_prefix(path):
        return tokenize(rows, tokenizer, max_length)


def batch_rows(step: int, size: int, count: int, seed: int) -> list[int]:
    """Rows of the global batch of a step: a slice of an endless stream of shuffles of range(count)."""
    first, last = step * size, (step + 1) * size
    stream: list[int] = []
    for epoch in range(first // count, (last - 1) // count + 1):
        generator = torch.Generator().manual_seed(seed + SEED_STRIDE * epoch)
        stream += torch.randperm(count, generator=generator).tolist()
    skip = first // count * count
    return stream[first - skip : last - skip]


def forward_backward(
    model: PreTrainedModel,
    examples: Sequence,
    rows: Sequence[int],
    reference: Stats | None,
    objective: Objective,
    max_tokens: int,
    entropy: bool = False,
) -> dict[str, float]:
    """Forward over `rows` of `examples`, and backward if gradients are enabled; returns means over the rows.

    The gradient is that of the mean loss over `rows`. Each process computes its share of the rows, in
    micro-batches of at most `max_tokens` tokens; the means are over all processes. Returned are the values
    of the objective, reward_accuracy, the policy's log-probabilities, and kl: the mean of log pi_ref - log pi
    over completions, in nats. (If the reference wrote the completions, kl estimates KL(pi_ref || pi).)
    Raises InputError if a loss is NaN or infinite.
    """
    sums: defaultdict[str, Tensor | float] = defaultdict(float)
    batches = micro_batches(rows, examples, max_tokens, get_rank(), get_world_size())
    for batch in batches:
        if isinstance(model, FSDPModule):  # FSDP sums gradients over processes in the backward pass
            model.set_requires_gradient_sync(batch is batches[-1])
        policy = pair_stats(model, pack([examples[row] for row in batch]), entropy)
        ref = reference and Stats(*(x[batch].to(policy.logp.device) for x in reference))
        values = objective(policy, ref)
        loss = values["loss"]
        if not loss.isfinite().all():
            bad = [row for row, finite in zip(batch, loss.isfinite().tolist(), strict=True) if not finite]
            raise InputError(f"the loss is NaN or infinite on pairs {bad} (counted from 0); stopped")
        if loss.requires_grad:
            (loss.sum() / len(rows)).backward()
        if "reward_margin" in values:
            values["reward_accuracy"] = (values["reward_margin"] > 0).float()
        names = ("logp_chosen", "logp_rejected") if policy.logp.shape[1] == 2 else ("logp",)
        values |= dict(zip(names, policy.logp.unbind(1), strict=True))
        if ref:
            values["kl"] = (ref.logp - policy.logp).mean(1)
        for name, value in values.items():  # kept on the device: reading a number off would wait for the GPU
            sums[name] += value.detach().sum().double() / len(rows)
    by_process = all_gather(torch.stack(list(sums.values())).tolist())
    return dict(zip(sums, map(sum, zip(*by_process, strict=True)), strict=True))


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, then constant, or linear or cosine decay to zero at `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    left = 1 - (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * (left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


@distributed()
def train(
    config: TrainConfig,
    objective: Objective,
    *,
    reference: bool = True,
    load: Load = load_pairs,
    prepare: Prepare | None = None,
) -> None:
    """Train by `config` on the loss `objective`, and write the run's folder.

    reference=False skips the reference pass; the objective's second argument is then None.
    load(path, tokenizer, max_length, chat) reads a file into token ids, a (prompt, *completions) per example.
    prepare(model, tokenizer, examples, reference) runs once before the first step, for what an objective must
    know of the whole data set (MallowsPO's phi*); it returns keyword arguments for the objective.
    Under torchrun every process calls train(). SIGTERM and SIGINT save a checkpoint and exit with code 128 +
    the signal's number.
    """
    # ---- open the run: checks flags and paths, writes nothing
    out, device = open_run(config), get_device()
    fsdp, max_tokens = config.parallel == "fsdp", config.micro_batch_tokens
    bfloat16 = config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")
    # LoRA: a bfloat16 base and a float32 adapter. All weights: float32 weights, autocast to bfloat16
    dtype = torch.bfloat16 if bfloat16 and config.lora_rank else torch.float32
    mixed = bfloat16 and not config.lora_rank
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=mixed)

    # ---- model and data
    place = "cpu" if fsdp else str(device)  # FSDP moves the shards
    model, tokenizer = load_model(config.model, place, dtype)
    check_packable(model, config.model)
    reading = (tokenizer, config.max_length, config.chat)
    examples = load(config.data, *reading)
    held_out = load(config.eval_data, *reading) if config.eval_data else []
    digests = {"model": digest_model(model, mixed), "data": digest_json(examples)}
    check_inputs(config, model, examples, held_out, digests)
    print(f"the first example, as the model sees it:\n{describe(examples[0], tokenizer)}")

    # ---- adapter and sharding
    torch.manual_seed(config.seed)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if fsdp:
        shard(model, device, mixed, packed_forward)

    # ---- the reference pass: the same model with the adapter off, or before its weights are trained
    ref = eval_ref = None
    if reference:
        cache = (out.parent / "reference_cache", max_tokens, digests["model"])
        with autocast, lora_disabled(model):
            ref = reference_stats(model, examples, *cache)
            eval_ref = reference_stats(model, held_out, *cache) if held_out else None

    # ---- optimizer, resume
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adamw":  # beta2 = 0.95: a run of a hundred steps must forget its first gradients
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    else:
        optimizer = torch.optim.RMSprop(parameters, lr=config.lr)
    size = min(config.batch_size, len(examples))
    steps = config.max_steps or math.ceil(config.epochs * len(examples) / size)
    start = resume_run(config, digests, model, optimizer) if config.resume else 0
    if start > steps:
        raise InputError(f"--max_steps, --epochs: {steps:,} steps, but the run to --resume is at {start:,}")
    if get_rank() == 0:
        start_run(config, out, start)
    barrier()  # no process writes into the folder before it holds run.json
    if prepare:
        objective = partial(objective, **prepare(model, tokenizer, examples, ref))
    entropy = check_objective(objective, len(examples[0]) - 1, reference, device)
    trained, processes = sum(p.numel() for p in parameters), get_world_size()
    print(f"{trained:,} trained parameters, {len(examples):,} examples, {steps:,} steps of {size}", end="")
    print(f" on {processes} processes ({config.parallel})" if processes > 1 else "")
    if steps < config.warmup_steps and get_rank() == 0:
        peak = learning_rate(config, steps - 1, steps)
        warning = f"{steps} steps end inside the warm-up: --lr {config.lr:g} is not reached, only {peak:.2g}"
        print(f"warning: --warmup_steps {config.warmup_steps}: {warning}", file=sys.stderr)

    # ---- the loop
    loggers = open_loggers(config, out) if get_rank() == 0 else []
    flops, received, began = flops_per_token(model), record_signals(), time.monotonic()

    def evaluate() -> dict[str, float]:
        with autocast, torch.no_grad(), error_prefix(f"--eval_data {config.eval_data}"):
            rows = range(len(held_out))
            values = forward_backward(model, held_out, rows, eval_ref, objective, max_tokens, entropy)
        return {f"eval_{name}": value for name, value in values.items()}

    def log(row: dict[str, float]) -> None:
        row["peak_memory_gb"] = max(all_gather(peak_memory(device)))
        for logger in loggers:
            logger(row)
        done = row["step"] + 1 - start
        print_row(row, steps, (time.monotonic() - began) / 60 / done * (steps - start - done))

    quiet = get_rank() > 0 or None  # None: tqdm shows its bar on a terminal only
    bar = tqdm(range(start, steps), out.name, steps, initial=start, unit="step", disable=quiet)
    for step in bar:
        row = {"step": step}
        evaluates = bool(held_out) and step % config.eval_every == 0
        if evaluates:
            row |= evaluate()

        step_began, rows = time.monotonic(), batch_rows(step, size, len(examples), config.seed)
        torch.manual_seed(config.seed + SEED_STRIDE * (step + 1) + get_rank())  # of dropout
        for _, layer in lora_layers(model):  # dropout in the adapter alone: the base stays the reference
            layer.train()
        with autocast, error_prefix(f"step {step}"):
            row |= forward_backward(model, examples, rows, ref, objective, max_tokens, entropy)
        model.eval()
        if not fsdp:
            all_reduce_gradients(parameters)
        norm = full_tensor(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)).item()
        if not math.isfinite(norm):
            raise InputError(f"step {step}: the gradient is NaN or infinite on pairs {sorted(rows)}; stopped")
        for group in optimizer.param_groups:
            group["lr"] = row["lr"] = learning_rate(config, step, steps)
        optimizer.step()
        optimizer.zero_grad()

        seconds = time.monotonic() - step_began
        row |= {"grad_norm": norm, "examples_per_second": size / seconds}
        row["tokens_per_second"] = sum(count_tokens(examples[index]) for index in rows) / seconds
        row |= flop_utilisation(flops * row["tokens_per_second"], device)
        if step % config.log_every == 0 or evaluates:
            log(row)
        stop = max(all_gather(max(received, default=0)))
        if stop or step + 1 == steps or (step + 1) % config.save_every == 0:
            save_checkpoint(out / "checkpoint", step + 1, digests, model, optimizer, config.keep)
        if stop:
            bar.close()
            if get_rank() == 0:
                name = signal.Signals(stop).name
                print(f"stopped by {name} at step {step + 1} of {steps}; --resume goes on", file=sys.stderr)
            sys.exit(128 + stop)

    # ---- the end: the final policy, on the held-out pairs and on the batch that would come next
    row = {"step": steps}
    with autocast, torch.no_grad():
        rows = batch_rows(steps, size, len(examples), config.seed)
        row |= forward_backward(model, examples, rows, ref, objective, max_tokens, entropy)
    if held_out:
        row |= evaluate()
    log(row)
    export(out, config, model, tokenizer, row)
