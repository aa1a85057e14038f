"""The training loop that every train_*.py shares.

    global batch of pairs -> this process's share -> micro-batches -> gradient of the mean loss -> all_reduce
    -> optimizer step

The loss is the mean over the pairs of the global batch. Without dropout, the gradient is the same for any
number of processes and any split into micro-batches. The batch of a step is a slice of an endless stream of
shuffled epochs, and the seed of dropout is set anew for every step, so a resumed run equals one that was
never interrupted: on the CPU to the bit, on a GPU up to the order in which its kernels add.

A loss is a function (see `Objective` below); train_dpl.py is a complete script.

    python train_dpl.py                                         # one process
    torchrun --nproc_per_node 8 train_dpl.py                    # eight, each with the whole model ("ddp")
    torchrun --nproc_per_node 8 train_dpl.py --parallel fsdp    # eight, each with a shard of it (FSDP2)
"""

import argparse
import importlib.util
import itertools
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
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import checkpoint, logs, parallel
from common.files import ROOT, InputError, digest_json, error_prefix
from common.flags import Flags, flag, parse, require
from core.checks import (
    check_compile,
    check_inputs,
    check_memory,
    check_objective,
    check_overwrite,
    check_packable,
)
from core.hub import export, load_model
from core.lora import add_lora, lora_disabled, lora_layers, merge_lora, print_share
from core.model import Stats, pair_stats, set_forward, wrap_layers
from core.pairs import (
    SEED_STRIDE,
    batch_indices,
    count_tokens,
    default_micro_batch_tokens,
    describe,
    load_pairs,
    micro_batches,
    pack,
)
from core.reference import cache_folder, digest_model, reference_stats


class Objective(Protocol):
    """A loss: returns {"loss": (pairs,), and any other (pairs,) tensors: averaged and logged}.

    `policy` and `reference` are Stats of one micro-batch, (pairs, 2) each. policy.logp carries gradients.
    policy.entropy is computed, with its gradient, only if the objective uses it. `reference` is None in a run
    without a reference. The loss of a pair may not depend on other pairs (batch statistics), because the
    other pairs of the global batch are in other micro-batches. The training loop logs "reward_accuracy", the
    share of pairs with a positive "reward_margin"; "kl", if there is a reference; and, for a language model,
    "logp_chosen" and "logp_rejected" ("logp", their mean, if there is no "reward_margin").
    """

    def __call__(self, policy: Stats, reference: Stats | None) -> dict[str, Tensor]: ...


@dataclass
class TrainConfig(Flags):
    """Flags of every train_*.py. Defaults are the DPL paper's (appendix B.3) where it gives a value."""

    # model and data
    model: str | None = flag(None, "Folder or hub name of the policy to start from.")
    data: str | None = flag(None, "Training rows: .jsonl[.gz], .json, .parquet, .csv.")
    eval_data: str | None = flag(None, "Held-out rows, evaluated every --eval_every steps.")
    chat: bool = flag(False, "Put rows of strings through the chat template.")
    max_length: int = flag(512, "Longest prompt + completion, in tokens.", "[1, inf)")
    # the run's folder
    out_dir: str = flag("out/run", "Folder for the adapter, metrics.jsonl and checkpoint/.")
    overwrite: bool = flag(False, "Replace the run in --out_dir.")
    resume: bool = flag(False, "Continue the run in --out_dir with the flags saved there, or start it.")
    # LoRA
    lora_rank: int = flag(16, "Rank of the adapter; 0 trains all weights.", "[0, inf)")
    lora_alpha: float = flag(16.0, "LoRA's scale: its output is multiplied by alpha / rank.", "(0, inf)")
    lora_dropout: float = flag(0.05, "Dropout on the adapter's input.", "[0, 1)")
    lora_targets: list[str] | None = flag(None, "Layers to adapt (default: all linear layers but the head).")
    # optimization
    batch_size: int = flag(8, "Pairs per optimizer step, over all processes and micro-batches.", "[1, inf)")
    max_steps: int = flag(0, "Optimizer steps; 0 means --epochs decides.", "[0, inf)")
    epochs: float = flag(1.0, "Passes over the data, if --max_steps is 0.", "(0, inf)")
    lr: float = flag(1e-5, "Peak learning rate.", "(0, inf)")
    warmup_steps: int = flag(150, "Steps of linear warm-up.", "[0, inf)")
    schedule: str = flag("constant", "Learning rate after the warm-up.", ("constant", "linear", "cosine"))
    optimizer: str = flag("adamw", "adamw has no weight decay.", ("adamw", "rmsprop"))
    max_grad_norm: float = flag(1.0, "Clip the gradient to this norm; 0 does not clip.", "[0, inf)")
    seed: int = flag(0, "Seed of the order of pairs, the adapter and dropout.", "[0, 4294967296)")
    # logging and checkpoints
    log_every: int = flag(10, "Steps between rows of metrics.jsonl, which are printed too.", "[1, inf)")
    eval_every: int = flag(100, "Steps between evaluations, beside those at start and end.", "[1, inf)")
    save_every: int = flag(100, "Steps between checkpoints; there is also one at the end.", "[1, inf)")
    keep: int = flag(2, "Checkpoints to keep: the newest ones.", "[1, inf)")
    wandb: bool = flag(False, "Log to Weights & Biases too.")
    tensorboard: bool = flag(False, "Log to --out_dir/tensorboard too.")
    # memory and devices
    micro_batch_tokens: int | None = flag(None, "Per forward pass (512; GPU 2048, 80 GB 8192).", "[1, inf)")
    checkpoint_activations: bool = flag(False, "Save memory: run each layer again in the backward pass.")
    parallel: str = flag("ddp", "torchrun: a process holds the whole model, or a shard.", ("ddp", "fsdp"))
    dtype: str = flag("auto", "auto: bfloat16 on a GPU, else float32.", ("auto", "float32", "bfloat16"))
    compile: bool = flag(False, "On a GPU: compile the layers; minutes at the start, then faster steps.")
    attention: str = flag("flex", "On a GPU: FlexAttention, or dense (no compiler).", ("flex", "dense"))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "parallel", self.parallel == "ddp" or "RANK" in os.environ, "started by torchrun")
        require(self, "resume", not (self.resume and self.overwrite), "given without --overwrite")
        for name in ("wandb", "tensorboard"):
            if getattr(self, name) and not importlib.util.find_spec(name):
                raise InputError(f"--{name}: needs its package: pip install {name}")


def parse_run(
    config: type[TrainConfig], description: str, society: str | None = "recipes/society.txt"
) -> TrainConfig:
    """Read a training script's flags. Those of the run to resume have lower priority than the command line's.

    `society` is a file of flags for the embedded society, for when neither --model nor --data is given.
    """

    def default_args(args: argparse.Namespace) -> list[str]:
        if args.resume and Path(args.out_dir, "run.json").is_file():
            return checkpoint.saved_args(Path(args.out_dir), config)
        return [f"@{ROOT / society}"] if society and args.model is None and args.data is None else []

    return parse(config, description, default_args=default_args)


def forward_backward(
    model: PreTrainedModel,
    examples: Sequence,
    indices: Sequence[int],
    reference: Stats | None,
    objective: Objective,
    max_tokens: int,
    entropy: bool = False,
) -> dict[str, float]:
    """Forward over examples[indices], and backward if gradients are enabled; returns means over the indices.

    `reference` holds the reference's Stats of all `examples`. The gradient is that of the mean loss. Each
    process computes its share of the indices, in micro-batches of about `max_tokens` tokens; the means are
    over all processes. The result holds the objective's values, reward_accuracy, the policy's
    log-probabilities and kl. kl is the mean of log pi_ref - log pi over the completions of the data, in
    nats. It estimates KL(pi_ref || pi) only if the reference sampled them. DPO's penalty is the reverse,
    KL(pi || pi_ref), which needs texts of the policy. Raises InputError if a loss is NaN or infinite.
    """
    sums: defaultdict[str, Tensor | float] = defaultdict(float)
    batches = micro_batches(indices, examples, max_tokens, parallel.get_rank(), parallel.get_world_size())
    is_lora, losses = any(lora_layers(model)), []
    for batch in batches:
        if isinstance(model, FSDPModule):
            # FSDP sums gradients over processes (shard() sets this) in every backward; for an adapter, once
            # per step is enough. Without LoRA, a process would keep whole gradients of all weights
            model.set_requires_gradient_sync(batch is batches[-1] or not is_lora)
        policy = pair_stats(model, pack([examples[index] for index in batch]), entropy)
        ref = None
        if reference is not None:
            rows = torch.stack([x[batch] for x in reference])
            ref = type(reference)(*parallel.to_device(rows, policy.logp.device))
        values = objective(policy, ref)
        loss = values["loss"]
        losses.append(loss.detach())
        if loss.requires_grad:
            (loss.sum() / len(indices)).backward()  # the global batch: processes' gradients are added
        if "reward_margin" in values:
            values["reward_accuracy"] = (values["reward_margin"] > 0).float()
        if model.get_output_embeddings() is not None:  # a reward model has no log-probabilities
            if "reward_margin" in values:
                values["logp_chosen"], values["logp_rejected"] = policy.logp.unbind(1)
            else:
                values["logp"] = policy.logp.mean(1)
        if ref is not None:
            values = {"kl": (ref.logp - policy.logp).mean(1)} | values
        for name, value in values.items():
            sums[name] += value.detach().sum().double() / len(indices)
    # checked once, after the last micro-batch: every look at a value makes the CPU wait for the GPU
    finite = torch.cat(losses).isfinite().tolist()
    if bad := [index for index, ok in zip(itertools.chain(*batches), finite, strict=True) if not ok]:
        raise InputError(f"the loss is NaN or infinite on examples {bad} (from 0, dropped ones not counted)")
    by_process = parallel.all_gather(torch.stack(list(sums.values())).tolist())
    totals = [sum(parts) for parts in zip(*by_process, strict=True)]
    return dict(zip(sums, totals, strict=True))


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, then constant, or linear or cosine decay to zero at `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    left = 1 - (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * (left if config.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)


def load_policy(
    config: TrainConfig, device: torch.device, load_model: Callable
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to train, in the dtype and on the device that training wants, and its tokenizer."""
    check_overwrite(config)
    check_memory(config, device)
    half = is_bfloat16(config, device)
    logs.print_device(device, "bfloat16" if half else "float32")
    # LoRA: a bfloat16 base and a float32 adapter. All weights: float32 weights, autocast to bfloat16
    dtype = torch.bfloat16 if half and config.lora_rank else torch.float32
    model, tokenizer = load_model(config.model, "cpu", dtype)
    # an adapter of before is merged: the run adds its own
    return merge_lora(model).to("cpu" if config.parallel == "fsdp" else device), tokenizer


def is_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    """Whether matrix products are computed in bfloat16."""
    return config.dtype == "bfloat16" or (config.dtype == "auto" and device.type == "cuda")


def make_trainable(config: TrainConfig, model: PreTrainedModel, device: torch.device) -> None:
    """Add the adapter, if any, shard the model, and check that it can be packed."""
    torch.manual_seed(config.seed)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
        print_share(model)
    model.attention, layers = config.attention, parallel.decoder_layers(model)  # FSDP renames their classes
    mixed = is_bfloat16(config, device) and not config.lora_rank
    set_forward(model, device, mixed, config.parallel == "fsdp")
    check_packable(model, config.model)
    wrap_layers(layers, config.compile, config.checkpoint_activations)
    if config.compile:
        check_compile(model)


@parallel.distributed()
def train(
    config: TrainConfig,
    objective: Objective,
    *,
    reference: bool = True,
    load_model: Callable = load_model,
    load: Callable = load_pairs,
    prepare: Callable | None = None,
) -> None:
    """Train by `config` on the loss `objective`, and write the run's folder.

    reference=False skips the reference pass; the objective's second argument is then None.
    load_model(path, device, dtype) gives the model to start from and its tokenizer (see train_reward.py).
    load(path, tokenizer, max_length, chat) reads a file into token ids, a (prompt, *completions) per example.
    prepare(model, tokenizer, examples, reference) runs once before the first step, for what an objective must
    know of the whole data set; it returns keyword arguments for the objective (see train_mallows.py).
    Under torchrun every process calls train(), and only rank 0 prints. SIGTERM and SIGINT save a checkpoint
    and exit with code 128 + the signal's number.
    """
    # ---- flags and paths, model and data; nothing is written yet
    out, device = checkpoint.open_run(config), parallel.get_device()
    max_tokens = config.micro_batch_tokens or default_micro_batch_tokens(device)
    model, tokenizer = load_policy(config, device, load_model)
    examples, held_out = (
        load(path, tokenizer, config.max_length, config.chat) if path else []
        for path in (config.data, config.eval_data)
    )
    digests = {"model": digest_model(model), "data": digest_json(examples)}
    check_inputs(config, model, examples, held_out, digests)
    print(f"the first example, as the model sees it:\n{describe(examples[0], tokenizer)}")
    make_trainable(config, model, device)

    # ---- the run's folder: what is wrong with it, or with the objective, is told before the reference pass
    plan = checkpoint.plan_run(config, out, digests, len(examples))
    if not prepare:
        check_objective(objective, len(examples[0]) - 1, reference, device)

    # ---- the reference pass: the model is still untrained and its adapter is off, so it is the reference
    ref = eval_ref = None
    if reference:
        # float32 weights under autocast, and FSDP's bfloat16 copies of them, round differently
        key = f"{digests['model']} {config.parallel if model.mixed else ''}"
        with lora_disabled(model):
            ref, eval_ref = (
                reference_stats(model, some, cache_folder(out), max_tokens, key) if some else None
                for some in (examples, held_out)
            )

    # ---- the objective
    checkpoint.start_run(config, out, plan)
    if prepare:
        objective = partial(objective, **prepare(model, tokenizer, examples, ref))
    # again, now with prepare()'s arguments, and to find out whether it uses policy.entropy
    entropy = check_objective(objective, len(examples[0]) - 1, reference, device)

    def gradient(step: int, batch: list[int]) -> tuple[dict[str, float], int]:
        row = forward_backward(model, examples, batch, ref, objective, max_tokens, entropy)
        return row, sum(count_tokens(examples[index]) for index in batch)

    def evaluate() -> dict[str, float]:
        with torch.no_grad(), error_prefix(f"--eval_data {config.eval_data}"):
            every = range(len(held_out))
            means = forward_backward(model, held_out, every, eval_ref, objective, max_tokens, entropy)
        return {f"eval_{name}": value for name, value in means.items()}

    row = run_steps(config, out, plan, model, digests, gradient, evaluate if held_out else None)
    export(out, config, model, tokenizer, row)


def run_steps(
    config: TrainConfig,
    out: Path,
    plan: checkpoint.Plan,
    model: PreTrainedModel,
    digests: dict[str, str],
    gradient: Callable[[int, list[int]], tuple[dict[str, float], int]],
    evaluate: Callable[[], dict[str, float]] | None,
) -> dict[str, float]:
    """The loop: gradient, optimizer step, log, checkpoint. Returns the row of the final policy.

    gradient(step, batch) adds to the weights' gradients, unless they are disabled; `batch` are indices of
    examples. It returns what to log and how many tokens it read. evaluate(): what to log of held-out data.
    """
    device, start, steps, size = parallel.get_device(), plan.start, plan.steps, plan.size
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "adamw":  # beta2 = 0.95: a run of a hundred steps must forget its first gradients
        fused = device.type == "cuda"  # the default on CUDA, foreach, needs a second copy of all weights
        optimizer = torch.optim.AdamW(parameters, config.lr, (0.9, 0.95), weight_decay=0.0, fused=fused)
    else:
        optimizer = torch.optim.RMSprop(parameters, lr=config.lr)
    if plan.checkpoint:
        checkpoint.load_checkpoint(*plan.checkpoint, model, optimizer)
    loggers = logs.open_loggers(config, out) if parallel.get_rank() == 0 else []
    logs.print_start(parameters, plan.count, steps, size, config)
    flops, signals, began = logs.flops_per_token(model), parallel.record_signals(), time.monotonic()

    def log(row: dict[str, float]) -> None:
        row["peak_memory_gb"] = max(parallel.all_gather(logs.peak_memory(device)))
        for logger in loggers:
            logger(row)
        logs.print_row(row, steps, start, began)

    hide = parallel.get_rank() > 0 or None  # None: tqdm shows its bar on a terminal only
    bar = tqdm(range(start, steps), out.name, steps, initial=start, unit="step", disable=hide)
    for step in bar:
        row = {"step": step}  # a row of metrics.jsonl: the policy after `step` updates, before this step's
        evaluates = evaluate is not None and step % config.eval_every == 0
        if evaluates:
            row |= evaluate()

        step_began = time.monotonic()
        torch.manual_seed(config.seed + SEED_STRIDE * (step + 1) + parallel.get_rank())  # dropout's
        for _, layer in lora_layers(model):  # no dropout in the base: it must compute what the reference did
            layer.train()
        batch = batch_indices(step, size, plan.count, config.seed)
        with error_prefix(f"step {step}"):
            values, tokens = gradient(step, batch)
        model.eval()
        if config.parallel == "ddp":
            parallel.all_reduce_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
        norm = parallel.full_tensor(norm).item()
        if not math.isfinite(norm):
            raise InputError(f"step {step}: NaN or infinite gradient on examples {sorted(batch)}; stopped")
        for group in optimizer.param_groups:
            group["lr"] = row["lr"] = learning_rate(config, step, steps)
        optimizer.step()
        optimizer.zero_grad()

        seconds = time.monotonic() - step_began
        row |= {**values, "grad_norm": norm, **logs.speed(seconds, size, tokens, flops, device)}
        if step % config.log_every == 0 or evaluates:
            log(row)
        stop = max(parallel.all_gather(max(signals, default=0)))  # all processes stop at the same step
        if stop or step + 1 == steps or (step + 1) % config.save_every == 0:
            checkpoint.save_checkpoint(out / "checkpoint", step + 1, digests, model, optimizer, config.keep)
        if stop:
            bar.close()
            if parallel.get_rank() == 0:
                name = signal.Signals(stop).name
                print(f"stopped by {name} at step {step + 1} of {steps}; --resume goes on", file=sys.stderr)
            sys.exit(128 + stop)

    # the final policy, without dropout, on the next batch and the held-out examples
    row = {"step": steps}
    with torch.no_grad(), error_prefix(f"step {steps}"):
        row |= gradient(steps, batch_indices(steps, size, plan.count, config.seed))[0]
    row |= evaluate() if evaluate else {}
    log(row)
    return row
