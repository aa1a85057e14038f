"""Sampling by hand: temperature, top-k, top-p, min-p, with a key-value cache.

    p_t(v) ~ p(v)^(1/t), then the k likeliest, then the smallest set that holds mass p, then p >= min_p max(p)

The prompt is computed once and its cache shared out to the samples; finished sequences leave the batch.

    python sample.py --model out/dpl --prompts data/society/prompts.jsonl --num_samples 16
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from files import InputError, flag, parse, read_rows, run_command, write_whole
from model import load_model
from preferences import check_messages, decode_continuation, encode_prompts


class Completion(NamedTuple):
    """One sampled completion."""

    tokens: list[int]  # the end token included, if it ended
    logp: float  # log-probability under the model, temperature 1 and no cuts, in nats
    sampled_logp: float  # log-probability under the law it was drawn from
    finish: str  # "eos", or "length" when max_new_tokens came first


def next_token_probs(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The law of the next token, (batch, vocab), from logits (batch, vocab); temperature 0 is greedy.

    The cuts come in transformers' order, each on what the one before left; 0, 1.0 and 0.0 switch them off.
    """
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p < 1.0:
        ascending, order = logits.sort(-1)
        cut = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        cut[..., -1] = False
        logits = logits.masked_fill(cut.scatter(-1, order, cut), -math.inf)
    probs = logits.softmax(-1)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompt_ids: list[int],
    num_samples: int,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[Completion]:
    """Draw `num_samples` completions of one prompt."""
    device = model.get_input_embeddings().weight.device
    ends = torch.tensor([] if eos_token_id is None else eos_token_id, dtype=torch.long, device=device).view(
        -1
    )
    cache = DynamicCache(config=model.config)
    prompt = torch.tensor([prompt_ids], device=device)
    logits = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    cache.batch_repeat_interleave(num_samples)
    logits = logits.expand(num_samples, -1)

    tokens = torch.zeros(num_samples, max_new_tokens, dtype=torch.long, device=device)
    scores = torch.zeros(num_samples, max_new_tokens, 2, device=device)  # model's and law's log-probabilities
    length = torch.full((num_samples,), max_new_tokens, device=device)
    finished = torch.zeros(num_samples, dtype=torch.bool, device=device)
    alive = torch.arange(num_samples, device=device)
    for step in range(max_new_tokens):
        logits = logits.float()
        probs = next_token_probs(logits, temperature, top_k, top_p, min_p)
        token = torch.multinomial(probs, 1, generator=generator)
        tokens[alive, step] = token[:, 0]
        law = torch.stack([logits.log_softmax(-1).gather(1, token), probs.gather(1, token).log()], -1)
        scores[alive, step] = law[:, 0]
        ended = torch.isin(token[:, 0], ends)
        if ended.any():
            length[alive[ended]] = step + 1
            finished[alive[ended]] = True
            going = (~ended).nonzero()[:, 0]
            alive, token = alive[going], token[going]
            cache.batch_select_indices(going)
        if not len(alive) or step + 1 == max_new_tokens:
            break
        position = torch.full_like(token, len(prompt_ids) + step)
        logits = model(token, past_key_values=cache, position_ids=position, use_cache=True).logits[:, -1]

    return [
        Completion(row[:n].tolist(), *score.sum(0).tolist(), "eos" if end else "length")
        for row, score, n, end in zip(tokens, scores, length.tolist(), finished.tolist(), strict=True)
    ]


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Every id that ends a completion: the tokenizer's EOS and those of the model's generation settings."""
    ids = model.generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return sorted({token for token in [*ids, tokenizer.eos_token_id] if token is not None})


@dataclass
class SampleConfig:
    """Flags of sample.py."""

    model: str = flag("out/dpl", "Folder or hub name of a model, or folder of an adapter.")
    prompts: str = flag("data/society/prompts.jsonl", "Rows with a 'prompt': string or messages.")
    out_file: str = flag("samples.jsonl", "Where to write one row a completion.")
    overwrite: bool = flag(False, "Replace --out_file.")
    num_samples: int = flag(16, "Completions per prompt.")
    max_new_tokens: int = flag(256, "Longest completion, in tokens.")
    temperature: float = flag(1.0, "Token temperature; 0 is greedy.")
    top_k: int = flag(0, "Keep the k likeliest tokens; 0 keeps all.")
    top_p: float = flag(1.0, "Keep the smallest set of tokens that holds this mass.")
    min_p: float = flag(0.0, "Keep tokens at least this share as likely as the likeliest.")
    seed: int = flag(0, "Decides the samples.")

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        ):
            if not holds:
                raise InputError(f"--{name} {getattr(self, name)}: must be {wanted}")


def read_prompts(path: str) -> list[str | list[dict]]:
    """The prompts of a file's rows, strings or message lists. Raises InputError naming the row."""
    prompts = []
    for where, row in read_rows(path):
        prompt = row.get("prompt")
        if isinstance(prompt, list) and prompt:
            check_messages(prompt, where)
        elif not isinstance(prompt, str):
            raise InputError(f"{where}: needs a 'prompt', a string or a message list")
        prompts.append(prompt)
    return prompts


def main() -> None:
    """Sample every prompt of a file."""
    config = parse(SampleConfig, __doc__)
    if Path(config.out_file).is_dir():
        raise InputError(f"--out_file {config.out_file}: is a folder")
    if Path(config.out_file).exists() and not config.overwrite:
        raise InputError(f"--out_file {config.out_file}: exists; --overwrite replaces it")
    prompts = read_prompts(config.prompts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model(config.model, device, torch.bfloat16 if device == "cuda" else torch.float32)
    ends = end_tokens(model, tokenizer)
    try:
        encoded = encode_prompts(prompts, tokenizer)
    except InputError as error:
        raise InputError(f"{config.prompts}: {error}") from None
    with write_whole(config.out_file) as file:
        for number, (prompt, ids) in enumerate(
            zip(tqdm(prompts, unit="prompt", disable=None), encoded, strict=True)
        ):
            generator = torch.Generator(device).manual_seed(config.seed + 1000003 * number)
            law = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_p")}
            for c in sample(
                model, ids, config.num_samples, config.max_new_tokens, ends, generator=generator, **law
            ):
                text = decode_continuation(c.tokens[:-1] if c.finish == "eos" else c.tokens, tokenizer)
                row = {"prompt": prompt, "completion": text, "tokens": len(c.tokens)}
                row |= {"logp": c.logp, "sampled_logp": c.sampled_logp, "finish": c.finish}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"wrote {len(prompts) * config.num_samples:,} completions to {config.out_file}")


if __name__ == "__main__":
    run_command(main)
