"""Tokens per second and peak memory of sample.py, transformers' generate, and what the machine allows.

All get the same model, prompts, number of samples and lengths. Every measurement runs in a process of its
own, and the contenders take turns. `generate` gets all prompts, of equal length, in one batch, once with its
dynamic and once with its static cache. The bounds follow from speeds measured here: a token costs two
operations per weight; a step reads the weights, the keys and values of each prompt once, and those of all
completions so far.

    python bench/sample.py --model data/society/reference --num_samples 1 64

With --natural, answers to the first prompts of --data end where they end, at the latest after --new_tokens.
`generate` gets as many prompts at a time as fill a batch, padded on the left; "continuous" is transformers'
continuous batching. "fill" is the mean share of a batch's places that a step computes a needed token for.
The bound is the speed of sample.py's full steps.

    python bench/sample.py --natural --model MODEL --data hh.jsonl.gz --chat --prompts 32 --new_tokens 256
"""

import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import CUDA, DEVICE, DTYPE, apart, clock, rates

from common.encode import encode_prompts, end_tokens
from common.flags import Flags, flag, parse, require, run_command
from common.logs import peak_memory
from common.rows import read_pairs
from core.decode import Batch
from core.hub import load_model
from sample import sample_completions

CONTENDERS = ("generate", "static", "sample.py")
NATURAL = ("generate", "continuous", "sample.py")


@dataclass
class BenchConfig(Flags):
    """Flags of bench/sample.py."""

    model: str = flag("data/society/reference", "Folder or hub name of a model.")
    num_samples: list[int] | None = flag(None, "Completions per prompt (default: 1 16 64 128).", "[1, inf)")
    batch_size: int = flag(128, "Completions per batch: as many prompts as fit, at most 4.", "[1, inf)")
    prompt_tokens: int = flag(200, "Tokens of each prompt.", "[1, inf)")
    new_tokens: int = flag(64, "Tokens of each completion.", "[1, inf)")
    compile: bool = flag(False, "Compile our decoding step; the time of compiling is not counted.")
    repeats: int = flag(2, "Measurements of each contender; the best counts.", "[1, inf)")
    natural: bool = flag(False, "Completions end by themselves.")
    data: str = flag("data/society/debates.jsonl.gz", "For --natural: pairs, of which the prompts are used.")
    chat: bool = flag(False, "For --natural: put prompts that are strings through the chat template.")
    prompts: int = flag(16, "For --natural: prompts, the first that differ.", "[1, inf)")
    contenders: list[str] | None = flag(None, "For --natural: which to run (default: all).", NATURAL)


def load(path: str) -> PreTrainedModel:
    """The model as sample.py loads it."""
    return load_model(path, str(DEVICE), DTYPE)[0]


@torch.no_grad()
def benchmark(contender: str, config: BenchConfig, num_samples: int, prompts: int) -> tuple[float, float]:
    """(tokens per second, peak memory in GB) of one contender, after a warm-up."""
    model = load(config.model)
    ids = torch.randint(5, model.config.vocab_size, (prompts, config.prompt_tokens), device=model.device)

    def run(new_tokens: int) -> None:
        if contender == "sample.py":
            seeds, limits = [[i] for i in range(prompts)], (new_tokens, None, prompts * num_samples)
            list(sample_completions(model, ids.tolist(), seeds, num_samples, *limits, compile=config.compile))
            return
        flags = {"cache_implementation": "static"} if contender == "static" else {}
        flags |= {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        flags |= {"num_return_sequences": num_samples, "do_sample": True, "top_k": 0, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), **flags)

    run(config.new_tokens if CUDA else 4)  # on CUDA, compiled code depends on the length
    seconds = clock(lambda: run(config.new_tokens))
    return prompts * num_samples * config.new_tokens / seconds, peak_memory(DEVICE)


def bounds(config: BenchConfig, cases: dict[int, int]) -> dict[int, tuple[float, float]]:
    """Bounds on tokens per second by (arithmetic, memory traffic), for {samples per prompt: prompts}."""
    model = load(config.model)
    flops, bytes_per_second = rates()
    text = model.config.get_text_config()
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        weights -= model.get_input_embeddings().weight.numel()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * heads * size * model.dtype.itemsize  # bytes of keys and values
    print(f"{weights / 1e6:.1f} M weights")
    result = {}
    for num_samples, prompts in cases.items():
        batch = num_samples * prompts
        tokens_read = prompts * config.prompt_tokens + batch * config.new_tokens / 2  # mean over steps
        step = weights * model.dtype.itemsize + token * tokens_read  # bytes
        result[num_samples] = (flops / (2 * weights), batch * bytes_per_second / step)
    return result


@torch.no_grad()
def natural(contender: str, config: BenchConfig, num_samples: int) -> dict[str, float]:
    """Tokens per second, fill, GB and tokens of one contender; of sample.py also the speed of full steps."""
    model, tokenizer = load_model(config.model, str(DEVICE), DTYPE)
    rows = [row["prompt"] for row in read_pairs(config.data, config.chat)]
    new = (prompt for i, prompt in enumerate(rows) if prompt not in rows[:i])
    prompts = list(itertools.islice(new, config.prompts))
    require(config, "prompts", len(prompts) == config.prompts, f"at most {len(prompts)} with this --data")
    encoded, ends = encode_prompts(prompts, tokenizer), end_tokens(model, tokenizer, prompts)
    steps: list[tuple[float, int]] = []  # seconds and the completions that got a token
    flags = GenerationConfig(max_new_tokens=config.new_tokens, eos_token_id=ends, pad_token_id=ends[0])
    flags.update(do_sample=True, top_k=0, num_return_sequences=num_samples)

    def ours(prompts: list[list[int]]) -> list[int]:
        seeds, limits = [[i] for i in range(len(prompts))], (config.new_tokens, ends, config.batch_size)
        drawn = sample_completions(model, prompts, seeds, num_samples, *limits)
        return [len(c.tokens) for completions in drawn for c in completions]

    def generate(prompts: list[list[int]]) -> list[int]:
        lengths, size = [], max(1, config.batch_size // num_samples)
        for some in (prompts[i : i + size] for i in range(0, len(prompts), size)):
            longest = max(map(len, some))
            ids = torch.tensor(
                [[ends[0]] * (longest - len(prompt)) + prompt for prompt in some], device=DEVICE
            )
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in some])
            tokens = model.generate(ids, attention_mask=mask.to(DEVICE), generation_config=flags)[:, longest:]
            is_end = torch.isin(tokens, torch.tensor(ends, device=DEVICE))
            ended = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1]).tolist()
            lengths += ended
            steps.extend((0.0, sum(n > i for n in ended)) for i in range(tokens.shape[1]))
        return lengths

    def continuous(prompts: list[list[int]]) -> list[int]:
        outputs = model.generate_batch(prompts, generation_config=flags)
        return [len(output.generated_tokens) for output in outputs.values()]

    append = Batch.append

    def timed(batch: Batch, *args: Tensor) -> Tensor:
        steps.append((time.perf_counter(), batch.active))
        return append(batch, *args)

    with patch.object(Batch, "append", timed):
        run = {"sample.py": ours, "generate": generate, "continuous": continuous}[contender]
        run(encoded[:1])
        steps.clear()
        began = time.perf_counter()
        lengths = run(encoded)
        seconds = time.perf_counter() - began
    result = {
        "rate": sum(lengths) / seconds,
        "memory": peak_memory(DEVICE),
        "tokens": sum(lengths) / len(lengths),
    }
    places = max(config.batch_size, num_samples if contender == "generate" else 0)  # it takes whole prompts
    result["fill"] = float(np.mean([n for _, n in steps])) / places if steps else math.nan
    full = [after - now for (now, n), (after, _) in itertools.pairwise(steps) if n == config.batch_size]
    result["bound"] = config.batch_size / np.median(full) if contender == "sample.py" and full else math.nan
    return result


def main_natural(config: BenchConfig) -> None:
    """Measure completions that end by themselves, and print a line for each contender."""
    for n in config.num_samples or (16,):
        print(f"{config.model}: {config.prompts} prompts, {n} samples, at most {config.new_tokens} tokens")
        print(f"{'':12} {'tok/s':>8} {'bound':>10} {'fill, %':>8} {'GB':>6} {'tokens a text':>14}")
        for contender in (config.contenders or NATURAL) * config.repeats:
            r = apart(natural, contender, config, n)
            row = f"{contender:12} {r['rate']:8.1f} {r['bound']:10.1f} {100 * r['fill']:8.1f}"
            print(f"{row} {r['memory']:6.2f} {r['tokens']:14.1f}".replace("nan", "  -"), flush=True)


def main() -> None:
    """Measure and print a line for each number of samples."""
    config = parse(BenchConfig, __doc__)
    if config.natural:
        return main_natural(config)
    cases = {n: max(1, min(4, config.batch_size // n)) for n in config.num_samples or (1, 16, 64, 128)}
    limits = apart(bounds, config, cases)
    print(f"{config.model}: {config.prompt_tokens} prompt tokens, {config.new_tokens} new ones")
    titles = " ".join(f"{c + ' tok/s, GB':>21}" for c in CONTENDERS)
    print(f"{'samples':>7} {'prompts':>7} {titles} {'ratio':>6} {'bounds, tok/s':>15}")
    for num_samples, prompts in cases.items():
        results: dict[str, list[tuple[float, float]]] = {c: [] for c in CONTENDERS}
        for _ in range(config.repeats):
            for contender in CONTENDERS:
                results[contender].append(apart(benchmark, contender, config, num_samples, prompts))
        speed = {c: max(tokens for tokens, _ in results[c]) for c in CONTENDERS}
        columns = " ".join(f"{speed[c]:14,.1f} {min(gb for _, gb in results[c]):6.2f}" for c in CONTENDERS)
        ratio = speed["sample.py"] / max(speed["generate"], speed["static"])
        arithmetic, traffic = limits[num_samples]
        bound = f"{arithmetic:7,.0f} {traffic:7,.0f}"
        print(f"{num_samples:7} {prompts:7} {columns} {ratio:6.2f} {bound}", flush=True)


if __name__ == "__main__":
    run_command(main)
