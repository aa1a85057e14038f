"""Tokens per second and peak memory of sample.py, transformers' generate, and what the machine allows.

All get the same model, prompts, number of samples and lengths. Every measurement runs in a process of its
own, and the contenders take turns. `generate` gets all prompts, of equal length, in one batch, once with its
dynamic and once with its static cache. The bounds follow from speeds measured here: a token costs two
operations per weight; a step reads the weights, the keys and values of each prompt once, and those of all
completions so far.

    python bench/sample.py --model data/society/reference --num_samples 1 64
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import CUDA, DEVICE, DTYPE, apart, clock, rates

from common.flags import Flags, flag, parse, run_command
from common.logs import peak_memory
from hub import load_model
from sample import sample_completions

CONTENDERS = ("generate", "static", "sample.py")


@dataclass
class BenchConfig(Flags):
    """Flags of bench/sample.py."""

    model: str = flag("data/society/reference", "Folder or hub name of a model.")
    num_samples: list[int] | None = flag(None, "Completions per prompt (default: 1 16 64 128).")
    batch_size: int = flag(128, "Completions per batch: as many prompts as fit, at most 4.")
    prompt_tokens: int = flag(200, "Tokens of each prompt.")
    new_tokens: int = flag(64, "Tokens of each completion.")
    compile: bool = flag(False, "Compile our decoding step; the time of compiling is not counted.")
    repeats: int = flag(2, "Measurements of each contender; the best counts.")


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


def main() -> None:
    """Measure and print a line for each number of samples."""
    config = parse(BenchConfig, __doc__)
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
