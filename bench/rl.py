"""A whole step of reinforcement learning, train_rl.py against TRL's RLOOTrainer with PEFT: tokens a second.

Same model, prompts, number of samples K, LoRA layers, length limit and rule-based reward; temperature 1, no
dropout, one optimizer step for each batch of texts. The phases are nearly the same:

    sampling    TRL also decodes the texts here; ours are decoded in "reward"
    reference   its log-probabilities (ours once for equal texts). TRL also computes the policy's, without
                gradients; here the sampler has them
    gradient    forward and backward
    update      the rest: clipping, optimizer

Each contender has its own process, and they take turns. The first step of a process is slower and does not
count. Both draw their own texts, which end where they end, so speed is completion tokens (with end tokens) by
seconds of the step. Memory is the process's peak, with what its packages take.

    python bench/rl.py
    python bench/rl.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data hh.jsonl.gz --chat
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import CUDA, DEVICE, DTYPE, apart

import train_rl
from common.flags import Flags, flag, parse, require, run_command
from common.logs import peak_memory
from common.rows import read_pairs
from core.hub import load_model
from train_rl import PHASES, RLConfig

BETA, RANK, LR = 0.1, 16, 1e-5


@dataclass
class BenchConfig(Flags):
    """Flags of bench/rl.py."""

    model: str = flag("data/society/reference", "Folder or hub name of a model.")
    data: str = flag("data/society/debates.jsonl.gz", "Preference pairs, of which the prompts are used.")
    chat: bool = flag(False, "Put prompts that are strings through the chat template.")
    prompts: int = flag(4, "Prompts of a step: the first ones of --data that differ.", "[1, inf)")
    num_samples: list[int] | None = flag(None, "K: texts of each prompt (default: 8 16).", "[2, inf)")
    max_new_tokens: int = flag(64, "Longest text, in tokens.", "[1, inf)")
    sizes: list[int] | None = flag(None, "TRL: texts in a forward pass (default: 1 4 16).", "[1, inf)")
    steps: int = flag(3, "Warm steps of each process; their median counts.", "[1, inf)")
    rounds: int = flag(2, "Processes of each contender.", "[1, inf)")


class Result(NamedTuple):
    """One process's measurement, without its first step."""

    speed: list[float]  # completion tokens per second, of each step
    seconds: list[dict[str, float]]  # of each step, by phase; "update" is what is left
    length: float  # tokens per text
    memory: float  # GB


def different_words(texts: list[str]) -> list[float]:
    """The reward: how many of a text's words are different from each other, as a share."""
    return [len(set(text.split())) / max(1, len(text.split())) for text in texts]


def read_distinct_prompts(config: BenchConfig) -> list[Any]:
    """The prompts of a step."""
    with contextlib.redirect_stdout(io.StringIO()):
        rows = read_pairs(config.data, config.chat)
    distinct = {json.dumps(row["prompt"]): row["prompt"] for row in rows}
    prompts = list(distinct.values())
    require(config, "prompts", len(prompts) >= config.prompts, f"at most the {len(prompts)} of --data")
    return prompts[: config.prompts]


def summarise(tokens: list[int], seconds: list[dict[str, float]], texts: int) -> Result:
    """The result without the first step; `seconds` has the whole step's as "step"."""
    tokens, seconds = tokens[1:], seconds[1:]
    speed = [count / row["step"] for count, row in zip(tokens, seconds, strict=True)]
    split = [row | {"update": row["step"] - sum(row[name] for name in PHASES)} for row in seconds]
    return Result(speed, split, float(np.mean(tokens)) / texts, peak_memory(DEVICE))


def ours(config: BenchConfig, seed: int, k: int, _: int) -> Result:
    """train_rl.py, and what it logs."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        data, out = Path(folder, "prompts.jsonl"), Path(folder, "out")
        prompts = read_distinct_prompts(config)
        data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        flags = RLConfig(
            model=config.model,
            data=str(data),
            out_dir=str(out),
            alpha=BETA,
            beta=BETA,
            lora_rank=RANK,
            lora_alpha=RANK,
            lr=LR,
            warmup_steps=0,
            batch_size=len(prompts),
            num_samples=k,
            max_new_tokens=config.max_new_tokens,
            max_steps=config.steps + 1,
            log_every=1,
            seed=seed,
        )
        train_rl.train(flags, lambda _, texts: different_words(texts))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").open()][: config.steps + 1]
    texts = len(prompts) * k
    seconds = [{name: row[f"seconds_{name}"] for name in PHASES} for row in rows]
    for row, logged in zip(seconds, rows, strict=True):
        row["step"] = len(prompts) / logged["examples_per_second"]
    return summarise([round(row["tokens_per_text"] * texts) for row in rows], seconds, texts)


def trl(config: BenchConfig, seed: int, k: int, size: int) -> Result:
    """TRL's trainer, with a clock around the methods that are the phases of a step."""
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    tokens, seconds = [], []

    def now() -> float:
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def clock(name: str):
        began = now()
        yield
        seconds[-1][name] += now() - began

    class Clocked(RLOOTrainer):
        def _generate(self, prompts):
            with clock("sampling"):
                drawn = super()._generate(prompts)
            tokens.append(sum(map(len, drawn[1])))
            return drawn

        def _calculate_rewards(self, *args):
            with clock("reward"):
                return super()._calculate_rewards(*args)

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            with contextlib.nullcontext() if torch.is_grad_enabled() else clock("reference"):
                return super()._get_per_token_logps_and_entropies(*args, **kwargs)

        def training_step(self, *args, **kwargs):  # all phases; the first of a step samples
            began, before = now(), sum(seconds[-1].values())
            loss = super().training_step(*args, **kwargs)
            seconds[-1]["gradient"] += now() - began - (sum(seconds[-1].values()) - before)
            return loss

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = now()
            seconds.append(dict.fromkeys(PHASES, 0.0))

        def on_step_end(self, *args, **kwargs):
            seconds[-1]["step"] = now() - self.began

    disable_progress_bars()
    torch.set_flush_denormal(True)  # as train_rl.py does
    prompts = read_distinct_prompts(config)
    model, tokenizer = load_model(config.model, str(DEVICE), DTYPE)
    texts = len(prompts) * k
    require(config, "sizes", texts % size == 0, f"divisors of {texts}, the texts of a step")
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
        flags = RLOOConfig(
            output_dir=output,
            beta=BETA,
            num_generations=k,
            max_completion_length=config.max_new_tokens,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=texts // size,
            max_steps=config.steps + 1,
            learning_rate=LR,
            lr_scheduler_type="constant",
            disable_dropout=True,
            seed=seed,
            use_cpu=not CUDA,
            bf16=CUDA,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )

        def reward(completions, **_):
            return different_words([c if isinstance(c, str) else c[0]["content"] for c in completions])

        adapter = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        rows = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
        given = {"train_dataset": rows, "processing_class": tokenizer, "peft_config": adapter}
        Clocked(model, reward, flags, callbacks=[Steps()], **given).train()
    return summarise(tokens, seconds, texts)


def main() -> None:
    """Measure in turns, and print a row for each contender."""
    config = parse(BenchConfig, __doc__)
    names = (*PHASES, "update")
    titles = ("tokens/s", "slower by", "peak GB", "tokens/text", *names)
    print(f"{'':26}" + "".join(f"{title:>12}" for title in titles) + "   (seconds of a step)")
    for k in config.num_samples or (8, 16):
        contenders = {f"train_rl.py, K = {k}": (ours, 0)}
        contenders |= {f"TRL, K = {k}, {n} at a time": (trl, n) for n in config.sizes or (1, 4, 16)}
        results: dict[str, list[Result]] = {name: [] for name in contenders}
        turns = [(seed, name) for seed in range(config.rounds) for name in contenders]
        for seed, name in tqdm(turns, unit="process", disable=None):
            contender, size = contenders[name]
            results[name].append(apart(contender, config, seed, k, size))
        speed = {name: np.median([x for run in runs for x in run.speed]) for name, runs in results.items()}
        for name, runs in results.items():
            memory, length = min(run.memory for run in runs), np.mean([run.length for run in runs])
            split = [np.median([row[phase] for run in runs for row in run.seconds]) for phase in names]
            line = f"{speed[name]:12.1f}{max(speed.values()) / speed[name]:12.2f}{memory:12.2f}{length:12.1f}"
            print(f"{name:26}{line}" + "".join(f"{x:12.2f}" for x in split), flush=True)


if __name__ == "__main__":
    run_command(main)
