"""Sampling by hand: token temperature, global temperature, and transformers' cuts.

Token temperature t divides each step's logits: p_t(v) ~ p(v)^(1/t). *Global* temperature tau draws whole
texts y from p(y)^(1/tau) / Z, which keeps their order. They differ by one factor: at token temperature tau a
text has probability prod_i p(y_i|.)^(1/tau) / Z_i with Z_i = sum_v p(v|.)^(1/tau), so

    p(y)^(1/tau)  =  prod_i Z_i  *  (the probability of y at token temperature tau).

Hence sequential Monte Carlo, for any model and with no training: grow many texts at token temperature tau,
weight each by its Z_i, and when the weights get uneven let heavy texts multiply and light ones die. It is
exact as the number of particles grows. The law is over texts cut at --max_new_tokens; above tau = 1, Z may
grow with that limit without bound: unlikely texts are so many that together they outweigh the rest. The cuts
(--min_p ...), which come before tau and make another p, keep them out.

Sample s of prompt n depends on (seed, n, s) alone, up to the rounding of floats: neither on the batch nor on
the number of processes. (Global temperature: on seed, n and the numbers of particles and samples.) Under
torchrun each process takes a share of the prompts.

    python sample.py --model out/dpl --prompts data/society/prompts.jsonl --num_samples 16
    python sample.py --model out/dpl --prompt "Which meal?" --global_temperature 2 --min_p 0.01
"""

import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decode import Batch, Completion, race
from files import (
    InputError,
    atomic_write,
    digest_json,
    error_prefix,
    flag,
    parse,
    require,
    require_same,
    run_command,
    write_json,
)
from checks import max_positions
from model import load_model
from parallel import all_gather, distributed, get_device, get_rank, get_world_size
from formats import read_prompts, to_messages
from preferences import decode_continuation, encode_prompts, end_tokens

NUCLEUS = 1024  # tokens that top_p sorts first: sorting a whole vocabulary takes a small model's step
FORMATS = ("jsonl", "messages", "alpaca_eval", "arena_hard")
FREE = {"out_file", "overwrite", "resume"}  # flags that a resumed run may change


def next_token_probs(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The law of the next token, (batch, vocab), from logits (batch, vocab); temperature 0 is greedy.

    Temperature, then the k likeliest tokens, then the smallest set that holds mass top_p, then p(v) >= min_p
    max(p): transformers' order, each on what the one before left. 0, 1.0 and 0.0 switch the cuts off.
    """
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits if temperature == 1 else logits / temperature
    vocab = logits.shape[-1]
    if 0 < top_k < vocab:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    probs = logits.softmax(-1)
    if top_p < 1.0:
        for size in (min(NUCLEUS, vocab), vocab):
            top, order = probs.topk(size)
            before = top.cumsum(-1) - top  # mass of the likelier ones
            if (before[..., -1] >= top_p).all():
                break
        probs = torch.zeros_like(probs).scatter_(-1, order, top.masked_fill(before >= top_p, 0.0))
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs / probs.sum(-1, keepdim=True) if top_p < 1.0 or min_p > 0 else probs


def draw_rows(batch: Batch, streams: Sequence[np.random.Generator], law: dict[str, Any]) -> list[Completion]:
    """Complete every text of a batch, text r with the random numbers of streams[r].

    `law` holds next_token_probs' arguments.
    """
    while batch.going:
        probs = next_token_probs(batch.logits, **law)
        batch.append(race(probs, [streams[row] for row in batch.root[: batch.going].tolist()]), probs)
    return batch.completions(batch.root.argsort().tolist())


def systematic(share: Tensor, count: int, stream: np.random.Generator) -> list[int]:
    """`count` indices, each about count * share[i] times: evenly spaced points under one random shift."""
    points = (torch.arange(count, dtype=share.dtype) + stream.random()) / count
    return torch.searchsorted(share.cumsum(0), points).clamp_(max=len(share) - 1).tolist()


def draw_global(
    batch: Batch, num_samples: int, tau: float, stream: np.random.Generator, cuts: dict[str, Any]
) -> tuple[list[Completion], float, float]:
    """`num_samples` completions from p(y)^(1/tau) / Z, the batch's texts being the particles of one prompt.

    `cuts` holds next_token_probs' arguments. Also gives the effective sample size, 1 / sum_i W_i^2 with W_i
    the weight of all descendants of first particle i, so that copies count as one, and log Z in nats.
    """
    particles = batch.going
    while batch.going:
        probs = next_token_probs(batch.logits, **cuts)
        tempered = probs.log() / tau
        batch.weight[: batch.going] += tempered.logsumexp(-1).cpu()
        share = batch.weight.softmax(0)
        if 1 / share.square().sum() < particles / 2:  # before the token is drawn, so that copies part at once
            mean = batch.weight.logsumexp(0) - math.log(particles)
            rows = batch.reorder(systematic(share, particles, stream))
            batch.logits, probs, tempered = batch.logits[rows], probs[rows], tempered[rows]
            batch.weight[:] = mean
        if batch.going:
            batch.append(race(tempered.softmax(-1), [stream] * batch.going), probs)
    share = batch.weight.softmax(0)
    ess = 1 / torch.zeros_like(share).index_add(0, batch.root, share).square().sum().item()
    log_z = batch.weight.logsumexp(0).item() - math.log(particles)
    if ess < particles / 10:
        advice = "give more --particles, or a --global_temperature nearer 1"
        print(f"warning: effective sample size {ess:.1f} of {particles} particles: {advice}", file=sys.stderr)
    chosen = batch.completions(stream.permutation(systematic(share, num_samples, stream)).tolist())
    return [c._replace(sampled_logp=c.sampled_logp / tau - log_z) for c in chosen], ess, log_z


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed from a generator, or from torch's own."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else None))


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
    """Draw `num_samples` completions of one prompt, in one batch."""
    batch = Batch(model, [prompt_ids], [0] * num_samples, max_new_tokens, eos_token_id)
    seed = draw_seed(generator)
    streams = [np.random.default_rng([seed, number]) for number in range(num_samples)]
    law = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return draw_rows(batch, streams, law)


def sample_global(
    model: PreTrainedModel,
    prompt_ids: list[int],
    num_samples: int,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None,
    *,
    global_temperature: float,
    particles: int,
    generator: torch.Generator | None = None,
) -> list[Completion]:
    """Draw `num_samples` completions from p(y)^(1/tau) / Z, exact as particles grow; few particles repeat.

    `sampled_logp` is log p(y) / tau - log Z, with the run's estimate of log Z.
    """
    batch = Batch(model, [prompt_ids], [0] * particles, max_new_tokens, eos_token_id)
    return draw_global(
        batch, num_samples, global_temperature, np.random.default_rng(draw_seed(generator)), {}
    )[0]


@dataclass
class SampleConfig:
    """Flags of sample.py."""

    model: str = flag("out/dpl", "Folder or hub name of a model, or folder of an adapter.")
    prompts: str = flag("data/society/prompts.jsonl", "Rows with a 'prompt', or .txt with one a line.")
    prompt: str | None = flag(None, "One prompt, in place of --prompts.")
    chat: bool = flag(False, "Put string prompts into the chat template, as a user's message.")
    out_file: str | None = flag(None, "Default: samples.jsonl, or for one prompt the terminal.")
    overwrite: bool = flag(False, "Replace --out_file.")
    resume: bool = flag(False, "Continue --out_file where an interrupted run left it, or start it.")
    format: str = flag("jsonl", "jsonl, messages, alpaca_eval (a .json file) or arena_hard (version 2).")
    num_samples: int = flag(16, "Completions per prompt.")
    max_new_tokens: int = flag(256, "Longest completion, in tokens.")
    stop: list[str] | None = flag(None, "Strings that end a completion and are cut off its text.")
    temperature: float = flag(1.0, "Token temperature; 0 is greedy.")
    top_k: int = flag(0, "Keep the k likeliest tokens; 0 keeps all.")
    top_p: float = flag(1.0, "Keep the smallest set of tokens that holds this mass.")
    min_p: float = flag(0.0, "Keep tokens at least this share as likely as the likeliest.")
    global_temperature: float | None = flag(None, "Temperature of whole texts, after the cuts above.")
    particles: int = flag(128, "Texts grown side by side for --global_temperature.")
    batch_size: int = flag(128, "Completions in one batch: lower it to save memory.")
    seed: int = flag(0, "Decides the samples.")

    def __post_init__(self) -> None:
        t, tau = self.temperature, self.global_temperature
        for name, holds, wanted in (
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", t == 0 or 1e-6 <= t < math.inf, "0, or at least 1e-6"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("global_temperature", tau is None or 1e-6 <= tau < math.inf, "at least 1e-6"),
            ("global_temperature", tau is None or t == 1, "given without --temperature"),
            ("particles", tau is None or self.particles >= self.num_samples, "at least --num_samples"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("format", self.format in FORMATS, f"one of {', '.join(FORMATS)}"),
            ("stop", all(self.stop or []), "strings that are not empty"),
            ("resume", not (self.resume and self.overwrite), "given without --overwrite"),
        ):
            require(self, name, holds, wanted)


def as_line(config: SampleConfig, row: dict, index: int, last: bool, text: str, stats: dict[str, Any]) -> str:
    """Line `index` of the output: a sample of a prompt's row in the --format asked for."""
    prompt = row["prompt"]
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    if config.format == "messages":
        made = {"messages": [*turns, {"role": "assistant", "content": text}]} | stats
    elif config.format == "alpaca_eval":
        made = {"instruction": turns[-1]["content"], "output": text, "generator": config.model} | stats
    elif config.format == "arena_hard":
        answer = {"role": "assistant", "content": {"answer": text}}
        made = {"uid": row.get("uid", turns[-1]["content"]), "ans_id": str(index), "model": config.model}
        made |= {"messages": [*turns, answer], "metadata": {"token_len": stats["tokens"]}} | stats
    else:
        made = {"prompt": prompt, "completion": text} | stats
    line = json.dumps(made, ensure_ascii=False)
    if config.format == "alpaca_eval":  # one JSON list
        line = ("[" if index == 0 else " ") + line + ("]" if last else ",")
    return line + "\n"


def sample_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    numbers: Sequence[int],
    ends: list[int],
    config: SampleConfig,
) -> list[tuple[str, dict[str, Any]]]:
    """(text, statistics) of every sample of the prompts of these numbers, prompt by prompt."""
    room, stop, found = config.max_new_tokens, config.stop or [], []
    law = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    reach = max((len(s.encode()) for s in stop), default=0) + 1  # tokens that a stop string may lie over

    def stopped(tokens: list[int]) -> bool:
        text = decode_continuation(tokens[-reach:], tokenizer)
        return any(s in text for s in stop)

    if tau := config.global_temperature:
        for n in numbers:
            batch = Batch(model, [encoded[n]], [0] * config.particles, room, ends, stopped if stop else None)
            stream = np.random.default_rng([config.seed, n])
            drawn, ess, log_z = draw_global(batch, config.num_samples, tau, stream, law)
            found += [(c, {"ess": ess, "log_z": log_z}) for c in drawn]
    else:
        rows = [(n, sample) for n in numbers for sample in range(config.num_samples)]
        for start in range(0, len(rows), config.batch_size):
            part = rows[start : start + config.batch_size]
            prompts = sorted({n for n, _ in part})
            owner = [prompts.index(n) for n, _ in part]
            batch = Batch(model, [encoded[n] for n in prompts], owner, room, ends, stopped if stop else None)
            streams = [np.random.default_rng([config.seed, *row]) for row in part]
            found += [(c, {}) for c in draw_rows(batch, streams, law)]
    result = []
    for c, extra in found:
        text = decode_continuation(c.tokens[: -1 if c.finish == "eos" else None], tokenizer)
        if c.finish == "stop":
            text = text[: min((text.find(s) for s in stop if s in text), default=None)]
        stats = {"tokens": len(c.tokens), "logp": c.logp, "sampled_logp": c.sampled_logp} | extra
        stats = {name: round(value, 4) for name, value in stats.items()} | {"finish": c.finish}
        result.append((text, stats))
    return result


def written_lines(out: Path, config: SampleConfig, prompts: str) -> list[bytes]:
    """The whole lines of `out`, if --resume is to keep them. `prompts` is a digest.

    Raises InputError if <out>.flags.json, which lies beside it, is missing or tells of other flags or rows.
    """
    if not (config.resume and out.exists()):
        return []
    beside = Path(f"{out}.flags.json")
    try:
        before = json.loads(beside.read_bytes())
        require_same(asdict(config), before["config"], FREE)
        same = before["prompts"] == prompts
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"--out_file {out}: no whole {beside.name} beside it to --resume by") from None
    if not same:
        raise InputError(f"--prompts {config.prompts}: not what the run to --resume was reading")
    return [line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def open_out_file(out: Path, lines: list[bytes], config: SampleConfig, prompts: str) -> IO[str]:
    """Open `out` to append to these lines, and write what written_lines() compares."""
    with atomic_write(out, "wb") as file:
        file.writelines(lines)
    write_json(f"{out}.flags.json", {"config": asdict(config), "prompts": prompts})
    return out.open("a", encoding="utf-8")


@distributed()
def main() -> None:
    """Sample every prompt of a file, or one prompt to the terminal."""
    config, device = parse(SampleConfig, __doc__), get_device()
    rows = read_prompts(config.prompts) if config.prompt is None else [{"prompt": config.prompt}]
    for row in rows:
        if config.chat and isinstance(row["prompt"], str):
            row["prompt"] = to_messages(row["prompt"])
    out = Path(config.out_file or "samples.jsonl") if config.out_file or len(rows) > 1 else None
    if out and out.is_dir():
        raise InputError(f"--out_file {out}: is a folder")
    if out and get_rank() == 0 and out.exists() and not (config.overwrite or config.resume):
        raise InputError(f"--out_file {out}: exists; --overwrite replaces it, --resume continues it")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, tokenizer = load_model(config.model, str(device), dtype)
    with error_prefix(config.prompts if config.prompt is None else "--prompt"):
        prompts = [row["prompt"] for row in rows]
        encoded, ends = encode_prompts(prompts, tokenizer), end_tokens(model, tokenizer, prompts)
    longest = max(map(len, encoded)) + config.max_new_tokens - 1  # the last token is never fed
    if longest > (limit := max_positions(model)):
        raise InputError(
            f"--max_new_tokens {config.max_new_tokens}: needs {longest} positions, the model has {limit}"
        )
    if max(map(max, encoded)) >= model.get_input_embeddings().weight.shape[0]:
        raise InputError(f"--model {config.model}: its tokenizer has tokens that it has no embeddings for")

    count, total = config.num_samples, config.num_samples * len(rows)
    chunk = max(1, config.batch_size // count)  # prompts that a process takes at a time
    digest = digest_json(encoded)
    lines = written_lines(out, config, digest) if out and get_rank() == 0 else []
    done = all_gather(len(lines) // count)[0]
    # the batches must be those of a run that never stopped
    done = len(rows) if done >= len(rows) else done // chunk * chunk
    bar = tqdm(
        total=len(rows), initial=done, unit="prompt", disable=None if out and get_rank() == 0 else True
    )
    file = None
    for first in range(done, len(rows), chunk * get_world_size()):
        start = first + get_rank() * chunk
        numbers = range(start, min(start + chunk, len(rows)))
        parts = all_gather(sample_prompts(model, tokenizer, encoded, numbers, ends, config))
        if out and get_rank() == 0 and not file:  # not before: what --overwrite replaces outlives a failure
            file = open_out_file(out, lines[: done * count], config, digest)
        for index, (text, stats) in enumerate(itertools.chain(*parts), first * count):
            if file:
                file.write(as_line(config, rows[index // count], index, index + 1 == total, text, stats))
            else:
                print(f"--- {', '.join(f'{name} {value}' for name, value in stats.items())}\n{text}\n")
        if file:
            file.flush()
        bar.update(sum(map(len, parts)) // count)
    if file:
        file.close()
    if out:
        print(f"{total:,} completions in {out}")


if __name__ == "__main__":
    run_command(main)
