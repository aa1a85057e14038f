"""The gradient of a batch's DPO loss, ours against TRL's with PEFT: pairs a second and peak memory.

Same model, pairs, adapter and loss; the reference's log-probabilities are known beforehand. Three contenders:

    train_dpl.py   rows [prompt | chosen | rejected | prompt | ...]: prompts once, no padding, few logits
    padded         as one writes it first: prompt + chosen and prompt + rejected, padded, all logits
    TRL            its DPOTrainer, with PEFT's adapter

A new adapter gives DPO's loss log 2 even if log-probabilities are wrong, so the adapter gets random weights.
Loss and gradient norm of all contenders must agree to 1e-3 (2e-2 on a GPU), or the script stops. Contenders
take turns, and each measurement has its own process. The first pass over the batch ("cold") is slower,
because memory is mapped then. The later passes ("warm") count.

The floor is the time of the matrix products alone, at the rate of a large one measured in the same run. Every
token passes the layers forward and backward; every completion token also passes the head both ways. The last
lines say where the time of train_dpl.py goes, by torch.profiler.

    python bench/train.py
    python bench/train.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data hh.jsonl.gz --pairs 16 --chat
"""

import contextlib
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import CUDA, DEVICE, DTYPE, apart, clock, product_rate, rates

from common.files import InputError
from common.flags import Flags, flag, parse, run_command
from common.logs import peak_memory
from common.rows import read_pairs
from core.hub import load_model
from core.lora import add_lora, load_lora, lora_layers, save_lora
from core.model import Stats
from core.pairs import Pair, count_tokens, tokenize
from core.reference import reference_stats
from core.trainer import forward_backward
from train_dpl import DPLConfig, objective

DPO = partial(objective, config=DPLConfig(alpha=0.1, beta=0.1))


@dataclass
class BenchConfig(Flags):
    """Flags of bench/train.py."""

    model: str = flag("data/society/reference", "Folder or hub name of a model.")
    data: str = flag("data/society/train.jsonl.gz", "Preference pairs.")
    chat: bool = flag(False, "Put rows of strings through the chat template.")
    pairs: int = flag(256, "Pairs of the batch: the first ones of --data.", "[1, inf)")
    max_length: int = flag(512, "Longest prompt + completion, in tokens.", "[1, inf)")
    lora_rank: int = flag(16, "Rank of the adapter.", "[1, inf)")
    micro_batch_tokens: list[int] | None = flag(
        None, "Ours: tokens in a forward pass (default: 512 2048).", "[1, inf)"
    )
    sizes: list[int] | None = flag(
        None, "Pairs in a forward pass of the others (default: 1 4 8).", "[1, inf)"
    )
    rounds: int = flag(2, "Processes of each contender.", "[1, inf)")
    passes: int = flag(3, "Warm passes in each; the median of all counts.", "[1, inf)")


class Result(NamedTuple):
    """One process's measurement: seconds of passes over the batch, GB, and what was computed."""

    cold: float
    warm: list[float]
    memory: float
    loss: float
    norm: float  # of the adapter's gradient


class Batch(NamedTuple):
    """What every contender starts from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pairs: list[Pair]
    reference: Stats


def load(config: BenchConfig, folder: Path) -> Batch:
    """The model, its tokenizer, the pairs, and the reference's Stats of them, cached in `folder`."""
    model, tokenizer = load_model(config.model, str(DEVICE), DTYPE)
    with contextlib.redirect_stdout(None):
        pairs = tokenize(read_pairs(config.data, config.chat)[: config.pairs], tokenizer, config.max_length)
    return Batch(model, tokenizer, pairs, reference_stats(model, pairs, folder, 2048))


def prepare(config: BenchConfig, folder: Path) -> float:
    """Write an adapter that is not zero into `folder`; returns the floor, in pairs a second."""
    model, _, pairs, _ = load(config, folder)
    head = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.base_model.parameters() if p.ndim == 2)
    layers -= model.get_input_embeddings().weight.numel()
    fed = sum(map(count_tokens, pairs))
    predicted = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    padded = sum(2 * len(p.prompt) + 2 * max(len(p.chosen), len(p.rejected)) for p in pairs)
    print(f"{config.model}: {len(pairs)} pairs, {fed:,} tokens packed ({padded:,} padded pair by pair)")
    floor = rates()[0] * len(pairs) / (4 * (fed * layers + predicted * head))
    torch.manual_seed(0)
    add_lora(model, config.lora_rank, config.lora_rank)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    save_lora(model, folder / "adapter", config.model)
    return floor


def measure(config: BenchConfig, model: nn.Module, run: Callable[[], float]) -> Result:
    """Time `run`, which adds the gradient of the batch's mean loss and returns that loss."""
    seconds, loss = [], 0.0

    def step() -> None:
        nonlocal loss
        model.zero_grad()
        loss = run()

    for _ in range(1 + config.passes):
        seconds.append(clock(step))
    gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    return Result(seconds[0], seconds[1:], peak_memory(DEVICE), loss, norm)


def ours(config: BenchConfig, folder: Path, tokens: int) -> Result:
    """What core/trainer.py does in a step before the update."""
    model, _, pairs, reference = load(config, folder)
    load_lora(model, folder / "adapter")
    rows = range(len(pairs))
    return measure(
        config, model, lambda: forward_backward(model, pairs, rows, reference, DPO, tokens)["loss"]
    )


def profile(config: BenchConfig, folder: Path, tokens: int) -> tuple[dict[str, tuple[float, float]], float]:
    """({what a warm pass of train_dpl.py spends: (seconds, operations)}, a large product's FLOP/s)."""
    model, _, pairs, reference = load(config, folder)
    load_lora(model, folder / "adapter")
    vocab = model.get_output_embeddings().weight.shape[0]
    for _ in range(2):
        with torch.profiler.profile(record_shapes=True) as profiler:
            forward_backward(model, pairs, range(len(pairs)), reference, DPO, tokens)
    spent: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for event in profiler.key_averages(group_by_input_shape=True):
        kind, flops = "attention" if "attention" in event.key else "the rest", 0
        if event.key.rstrip("_") in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            a, b = [shape for shape in event.input_shapes if len(shape) > 1][-2:]
            kind = "head" if vocab in (*a, *b) else "LoRA" if config.lora_rank in (*a, *b) else "layers"
            flops = 2 * math.prod(a) * b[-1] * event.count
        micros = event.self_device_time_total if CUDA else event.self_cpu_time_total
        spent[kind] = (spent[kind][0] + micros / 1e6, spent[kind][1] + flops)
    return dict(spent), product_rate()


def padded(config: BenchConfig, folder: Path, size: int) -> Result:
    """DPO as one writes it first, `size` pairs at a time."""
    model, _, pairs, reference = load(config, folder)
    load_lora(model, folder / "adapter")

    def logp(texts: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        ids = pad_sequence([torch.tensor(prompt + answer) for prompt, answer in texts], True).to(DEVICE)
        position = torch.arange(ids.shape[1])
        length = torch.tensor([len(prompt) + len(answer) for prompt, answer in texts])[:, None]
        start = torch.tensor([len(prompt) for prompt, _ in texts])[:, None]
        mask = (position < length).to(DEVICE)
        answered = mask & (position >= start).to(DEVICE)
        logits = model(ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1].float()
        token = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (token * answered[:, 1:]).sum(1)

    def run() -> float:
        total = 0.0
        for first in range(0, len(pairs), size):
            part = slice(first, first + size)
            texts = [(p.prompt, answer) for p in pairs[part] for answer in (p.chosen, p.rejected)]
            policy = Stats(logp(texts).view(-1, 2), None)
            known = Stats(*(x[part].to(DEVICE) for x in reference))
            loss = DPO(policy, known)["loss"].sum() / len(pairs)
            loss.backward()
            total += loss.item()
        return total

    return measure(config, model, run)


def trl(config: BenchConfig, folder: Path, size: int) -> Result:
    """TRL's trainer, which is given the same token ids and adapter, `size` pairs at a time."""
    from datasets import Dataset, disable_progress_bars
    from peft import PeftModel
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    model, tokenizer, pairs, reference = load(config, folder)
    model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    known = reference.logp.tolist()
    rows = [dict(zip(names, (*p, *k), strict=True)) for p, k in zip(pairs, known, strict=True)]
    with tempfile.TemporaryDirectory() as output:
        flags = DPOConfig(
            output_dir=output,
            beta=0.1,
            use_cpu=not CUDA,
            bf16=CUDA,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            max_length=None,
            report_to="none",
        )
        one = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        trainer = DPOTrainer(model, None, flags, train_dataset=one, processing_class=tokenizer)
        trainer.model.eval()  # no dropout, as for the others

        def run() -> float:
            total = 0.0
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                inputs = {name: x.to(DEVICE) for name, x in trainer.data_collator(part).items()}
                loss = trainer.compute_loss(trainer.model, inputs) * (len(part) / len(rows))
                loss.backward()
                total += loss.item()
            return total

        return measure(config, trainer.model, run)


def main() -> None:
    """Measure in turns, check that all computed the same, and print a row for each contender."""
    config = parse(BenchConfig, __doc__)
    sizes = config.sizes or (1, 4, 8)
    contenders = {f"train_dpl.py, {n:,} tokens": (ours, n) for n in config.micro_batch_tokens or (512, 2048)}
    contenders |= {f"padded, {size} pairs": (padded, size) for size in sizes}
    contenders |= {f"TRL, {size} pairs": (trl, size) for size in sizes}
    results: dict[str, list[Result]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        floor = apart(prepare, config, Path(folder))
        for name in tqdm(list(contenders) * config.rounds, unit="process", disable=None):
            contender, size = contenders[name]
            results[name].append(apart(contender, config, Path(folder), size))
        tokens = next(iter(contenders.values()))[1]
        spent, rate = apart(profile, config, Path(folder), tokens)
    first = next(iter(results.values()))[0]
    for name, runs in results.items():
        for key in ("loss", "norm"):
            value, wanted = getattr(runs[0], key), getattr(first, key)
            if abs(value - wanted) > (2e-2 if CUDA else 1e-3) * wanted:
                raise InputError(f"{name}: its {key} is {value:.6g}, and {wanted:.6g} of the first contender")
    speed = {}
    for name, runs in results.items():
        warm = sorted(seconds for run in runs for seconds in run.warm)
        speed[name] = config.pairs / warm[len(warm) // 2]
    best = max(value for name, value in speed.items() if name.startswith("train_dpl.py"))
    titles = ("pairs/s", "(cold)", "ratio", "of floor", "peak GB", "loss", "norm")
    print(f"{'':28}" + "".join(f"{title:>10}" for title in titles))
    for name, runs in results.items():
        cold, memory = config.pairs / min(run.cold for run in runs), min(run.memory for run in runs)
        line = f"{speed[name]:10.2f}{cold:10.2f}{best / speed[name]:10.2f}{speed[name] / floor:10.1%}"
        print(f"{name:28}{line}{memory:10.2f}{runs[0].loss:10.5f}{runs[0].norm:10.5f}", flush=True)
    total = sum(seconds for seconds, _ in spent.values())
    print(
        f"{total:.2f} s of train_dpl.py, {tokens:,} tokens, under the profiler: share, and rate of products"
    )
    print(f"    (of a large one's, {rate / 1e9:.0f} GFLOP/s measured after it)")
    for kind, (seconds, flops) in sorted(spent.items(), key=lambda item: -item[1][0]):
        print(f"    {kind:10}{seconds / total:6.1%}" + (f"{flops / seconds / rate:8.0%}" if flops else ""))


if __name__ == "__main__":
    run_command(main)
