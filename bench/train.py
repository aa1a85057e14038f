"""The gradient of a batch's DPO loss, ours against TRL's with PEFT: pairs a second and peak memory.

Same model, pairs, LoRA layers and loss, the reference's log-probabilities known beforehand to both. TRL pads
chosen and rejected, each with its prompt, in micro-batches of so many pairs; here the prompt is computed once
for both and nothing is padded. The contenders take turns, each measurement in a process of its own.

The bound is arithmetic at the rate of a large matrix product: a token passes the layers' weights twice, once
forward and once back, and a completion's token the head's twice.

    python bench/train.py
    python bench/train.py --model HuggingFaceTB/SmolLM2-135M --data pairs.jsonl --pairs 16
"""

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import CUDA, DEVICE, DTYPE, apart, clock, rates

from files import flag, parse, run_command
from formats import read_pairs
from logs import peak_memory
from lora import add_lora
from model import Stats, load_model
from preferences import Pair, count_tokens, tokenize
from reference import reference_stats
from train_dpl import DPLConfig, objective
from trainer import forward_backward


@dataclass
class BenchConfig:
    """Flags of bench/train.py."""

    model: str = flag("data/society/reference", "Folder or hub name of a model.")
    data: str = flag("data/society/train.jsonl.gz", "Preference pairs.")
    pairs: int = flag(256, "Pairs of the batch: the first ones of --data.")
    max_length: int = flag(512, "Longest prompt + completion, in tokens.")
    lora_rank: int = flag(16, "Rank of the adapter.")
    micro_batch_tokens: int = flag(2048, "Ours: tokens in a forward pass.")
    sizes: list[int] | None = flag(None, "TRL's: pairs in a forward pass (default: 1 4 16).")
    repeats: int = flag(3, "Rounds; the fastest counts.")


def load(
    config: BenchConfig, cache: Path
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Pair], Stats]:
    """The model, its tokenizer, the batch, and what the reference thinks of it."""
    model, tokenizer = load_model(config.model, str(DEVICE), DTYPE)
    with contextlib.redirect_stdout(None):
        pairs = tokenize(read_pairs(config.data)[: config.pairs], tokenizer, config.max_length)
    return model, tokenizer, pairs, reference_stats(model, pairs, cache, config.micro_batch_tokens)


def ours(config: BenchConfig, cache: Path) -> tuple[float, float, float]:
    """(pairs a second, peak GB, loss) of what trainer.py does in a step before the update."""
    model, _, pairs, reference = load(config, cache)
    rows, loss = range(len(pairs)), partial(objective, config=DPLConfig(alpha=0.1, beta=0.1))
    add_lora(model, config.lora_rank, config.lora_rank)
    found = {}

    def run(rows: Sequence[int]) -> None:
        found.update(forward_backward(model, pairs, rows, reference, loss, config.micro_batch_tokens))

    run(rows if CUDA else rows[:2])  # compiling depends on the lengths
    return len(pairs) / clock(lambda: run(rows)), peak_memory(DEVICE), found["loss"]


def trl(config: BenchConfig, cache: Path, size: int) -> tuple[float, float, float]:
    """The same of TRL's trainer, which is given the same token ids."""
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    model, tokenizer, pairs, reference = load(config, cache)
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
    known = reference.logp.tolist()
    rows = [dict(zip(names, (*p, *k), strict=True)) for p, k in zip(pairs, known, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        flags = DPOConfig(
            output_dir=folder,
            beta=0.1,
            use_cpu=not CUDA,
            bf16=CUDA,
            gradient_checkpointing=False,
            precompute_ref_log_probs=True,
            max_length=None,
            report_to="none",
        )
        lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules="all-linear")
        one = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        trainer = DPOTrainer(
            model, None, flags, train_dataset=one, processing_class=tokenizer, peft_config=lora
        )
        total = 0.0

        def run(rows: list[dict]) -> None:
            nonlocal total
            total = 0.0
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                inputs = {name: x.to(DEVICE) for name, x in trainer.data_collator(part).items()}
                loss = trainer.compute_loss(trainer.model, inputs) * (len(part) / len(rows))
                loss.backward()
                total += loss.item()

        run(rows if CUDA else rows[:2])
        return len(rows) / clock(lambda: run(rows)), peak_memory(DEVICE), total


def bound(config: BenchConfig, cache: Path) -> float:
    """Pairs a second, were all arithmetic done at a large product's rate and nothing else."""
    model, _, pairs, _ = load(config, cache)
    head = model.get_output_embeddings().weight.numel()
    layers = sum(p.numel() for p in model.base_model.parameters() if p.ndim == 2)
    layers -= model.get_input_embeddings().weight.numel()
    fed = sum(map(count_tokens, pairs))
    predicted = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    padded = sum(2 * len(p.prompt) + 2 * max(len(p.chosen), len(p.rejected)) for p in pairs)
    print(f"{config.model}: {len(pairs)} pairs, {fed:,} tokens packed ({padded:,} padded pair by pair)")
    return rates()[0] * len(pairs) / (4 * (fed * layers + predicted * head))


def main() -> None:
    """Measure in turns and print a row for each contender."""
    config = parse(BenchConfig, __doc__)
    contenders: dict[str, tuple] = {"train_dpl.py": (ours,)}
    contenders |= {f"trl, {size} at a time": (trl, size) for size in config.sizes or (1, 4, 16)}
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as cache:
        limit = apart(bound, config, Path(cache))
        for _ in range(config.repeats):
            for name, (contender, *size) in contenders.items():
                runs[name].append(apart(contender, config, Path(cache), *size))
    print(f"{'':20} {'pairs/s':>8} {'ratio':>6} {'of bound':>8} {'peak GB':>8} {'loss':>8}")
    fastest = max(speed for speed, _, _ in runs["train_dpl.py"])
    for name, found in runs.items():
        speed, memory = max(f[0] for f in found), min(f[1] for f in found)
        columns = f"{speed:8.2f} {fastest / speed:6.2f} {speed / limit:8.1%} {memory:8.2f} {found[0][2]:8.5f}"
        print(f"{name:20} {columns}", flush=True)


if __name__ == "__main__":
    run_command(main)
