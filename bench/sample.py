"""sample.py against transformers' generate: tokens a second and peak memory, beside what the machine allows.

Same model, prompts, samples and lengths. The contenders take turns, each measurement in a process of its own;
`generate` gets all prompts in one batch of equal lengths, with its dynamic and with its static cache. The
bounds come from rates measured here: a token costs two operations a weight; a step reads the weights, each
prompt's keys and values once, and those of the completions so far.

    python bench/sample.py --model data/society/reference --num_samples 1 64
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import CUDA, DEVICE, DTYPE, apart, clock, rates

from decode import Batch
from files import flag, parse, run_command
from model import load_model
from sample import draw_rows
from trainer import peak_memory

CONTENDERS = ("generate", "static", "sample.py")


@dataclass
class BenchConfig:
    """Flags of bench/sample.py."""

    model: str = flag("data/society/reference", "Folder or hub name of a model.")
    num_samples: list[int] | None = flag(None, "Completions per prompt (default: 1 16 64 128).")
    rows: int = flag(128, "Take up to 4 prompts at once, while prompts * samples is within this.")
    prompt_tokens: int = flag(200, "Tokens of each prompt.")
    new_tokens: int = flag(64, "Tokens of each completion.")
    repeats: int = flag(2, "Rounds; the fastest counts.")


def load(path: str) -> Any:
    """The model as sample.py would load it."""
    return load_model(path, str(DEVICE), DTYPE)[0]


@torch.no_grad()
def measure(contender: str, config: BenchConfig, samples: int, prompts: int) -> tuple[float, float]:
    """(tokens a second, peak memory in GB) of one contender, after a short warm-up."""
    model = load(config.model)
    ids = torch.randint(5, model.config.vocab_size, (prompts, config.prompt_tokens), device=model.device)

    def run(room: int) -> None:
        if contender == "sample.py":
            owner = [prompt for prompt in range(prompts) for _ in range(samples)]
            streams = [np.random.default_rng(row) for row in range(len(owner))]
            draw_rows(Batch(model, ids.tolist(), owner, room, None), streams, {})
            return
        flags = {"cache_implementation": "static"} if contender == "static" else {}
        flags |= {"max_new_tokens": room, "min_new_tokens": room, "num_return_sequences": samples}
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, pad_token_id=0, **flags)

    run(config.new_tokens if CUDA else 2)  # compiling depends on the length
    seconds = clock(lambda: run(config.new_tokens))
    return prompts * samples * config.new_tokens / seconds, peak_memory(DEVICE)


def bounds(config: BenchConfig, cases: dict[int, int]) -> dict[int, tuple[float, float]]:
    """(tokens a second by arithmetic, by memory traffic) for each number of samples in {samples: prompts}."""
    model = load(config.model)
    operations, traffic = rates()
    text = model.config.get_text_config()
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        weights -= model.get_input_embeddings().weight.numel()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * heads * size * model.dtype.itemsize  # bytes of keys and values
    print(f"{weights / 1e6:.1f} M weights")
    found = {}
    for samples, prompts in cases.items():
        rows = samples * prompts
        step = weights * model.dtype.itemsize + token * (
            prompts * config.prompt_tokens + rows * config.new_tokens / 2
        )
        found[samples] = (operations / (2 * weights), rows * traffic / step)
    return found


def main() -> None:
    """Measure and print a row for each number of samples."""
    config = parse(BenchConfig, __doc__)
    cases = {n: max(1, min(4, config.rows // n)) for n in config.num_samples or (1, 16, 64, 128)}
    limits = apart(bounds, config, cases)
    print(f"{config.model}: {config.prompt_tokens} prompt tokens, {config.new_tokens} new ones")
    print(
        f"{'samples':>7} {'prompts':>7} " + " ".join(f"{c + ' tok/s, GB':>21}" for c in CONTENDERS), end=" "
    )
    print(f"{'ratio':>6} {'bounds, tok/s':>15}")
    for samples, prompts in cases.items():
        runs: dict[str, list[tuple[float, float]]] = {c: [] for c in CONTENDERS}
        for _ in range(config.repeats):
            for contender, results in runs.items():
                results.append(apart(measure, contender, config, samples, prompts))
        best = {c: (max(r[0] for r in results), min(r[1] for r in results)) for c, results in runs.items()}
        columns = " ".join(f"{best[c][0]:14,.1f} {best[c][1]:6.2f}" for c in CONTENDERS)
        ratio = best["sample.py"][0] / max(best["generate"][0], best["static"][0])
        arithmetic, traffic = limits[samples]
        print(
            f"{samples:7} {prompts:7} {columns} {ratio:6.2f} {arithmetic:7,.0f} {traffic:7,.0f}", flush=True
        )


if __name__ == "__main__":
    run_command(main)
