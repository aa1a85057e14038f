"""Sample completions: token temperature, global temperature, and truncation by top-k, top-p and min-p.

Token temperature t divides the logits of every step: p_t(v) is proportional to p(v)^(1/t). Global temperature
tau acts on whole completions y: p(y)^(1/tau) / Z, which keeps their order (DPL paper, equations 6 and 10). At
token temperature tau, a completion has the probability

    prod_i p(y_i | y_<i)^(1/tau) / Z_i    with    Z_i = sum_v p(v | y_<i)^(1/tau),
    so    p(y)^(1/tau)  =  prod_i Z_i  *  (probability of y at token temperature tau).

Sequential Monte Carlo therefore samples at a global temperature from any model, without training: sample many
completions ("particles") at token temperature tau and weight each by the product of its Z_i; when weights get
uneven, resample the particles in proportion to them. It is exact in the limit of many particles.

Above tau = 1, truncate p first (--min_p 0.01). Otherwise broken texts outweigh all good ones: each is
unlikely, but there are very many. A larger --max_new_tokens makes this worse.

Sample s of prompt n depends on (seed, n, s) alone, up to floating-point rounding: not on the batch size or on
the number of processes. (At a global temperature: on seed, n and the numbers of particles and samples.) Under
torchrun, each process samples a share of the prompts.

    python sample.py --model out/dpl --prompts data/society/prompts.jsonl --num_samples 16
    python sample.py --prompt "Which meal is the best of the day?" --global_temperature 2 --min_p 0.01
"""

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.encode import decode_continuation, encode_prompts, end_tokens
from common.files import (
    InputError,
    atomic_write,
    digest_json,
    error_prefix,
    lock,
    parse_json,
    read_template,
    write_json,
)
from common.flags import Flags, flag, parse, require, require_same, run_command
from common.parallel import all_gather, distributed, get_device, get_dtype, get_rank, get_world_size
from common.rows import check_prompt, read_prompts, sample_row, to_messages
from core.checks import max_positions
from core.decode import Batch, Completion, exponential_noise, gumbel_max, next_token_probs
from core.hub import digest_weights, load_model

MAY_CHANGE = {"out_file", "overwrite", "resume", "batch_size", "compile"}  # when a run is resumed


def sample_completions(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    seeds: Sequence[Sequence[int]],
    num_samples: int,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None,
    batch_size: int,
    has_stop: Callable[[list[int]], bool] | None = None,
    compile: bool = False,
    **sampling_params: float,
) -> Iterator[list[Completion]]:
    """Yields the `num_samples` completions of each prompt, in order; `batch_size` are sampled at a time.

    The place of one that has ended goes to the next in line, of this prompt or of the next. Sample s of
    prompt i has the random numbers of the seed [*seeds[i], s]. `sampling_params` are those of
    next_token_probs.
    """
    if not prompts:
        return
    owner = [i for i in range(len(prompts)) for _ in range(num_samples)]  # of each sample, its prompt

    def line_up(first: int, count: int) -> tuple[list[list[int]], list[int], bool]:
        """Batch.start's arguments for samples first, first + 1, ..."""
        part, after = owner[first : first + count], owner[first + count : first + count + 1]
        new = owner[first - 1] + 1 if first else 0  # prompts before it have been started
        return [list(ids) for ids in prompts[new : part[-1] + 1]], [i - new for i in part], part[-1:] == after

    def stream(number: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng([*seeds[owner[number]], number % num_samples])
        while True:  # 16 steps a call: for 128 samples, a call for each step takes as long as a GPU's step
            yield from exponential_noise(rng, 16, batch.logits.shape[-1])

    *first, keep_last = line_up(0, batch_size)
    batch = Batch(model, *first, max_new_tokens, eos_token_id, has_stop, compile, keep_last)
    streams, done = {}, {}
    for i in range(len(prompts)):
        mine = range(i * num_samples, (i + 1) * num_samples)
        while not all(number in done for number in mine):
            free = batch_size - batch.active
            if batch.started < len(owner) and free >= batch_size / 16:  # several at a time: they share a pass
                batch.start(*line_up(batch.started, free))
            probs, numbers = next_token_probs(batch.logits, **sampling_params), batch.ancestor.tolist()
            streams |= {number: stream(number) for number in numbers if number not in streams}
            batch.append(gumbel_max(probs, np.stack([next(streams[number]) for number in numbers])), probs)
            finished = batch.take_finished()
            done |= finished
            for number in finished:
                del streams[number]
        yield [done.pop(number) for number in mine]


def completion_text(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a completion, without its end token."""
    end = -1 if completion.finish == "eos" else None
    return decode_continuation(completion.tokens[:end], tokenizer)


def systematic_resampling(weights: Tensor, count: int, rng: np.random.Generator) -> list[int]:
    """`count` indices, index i about count * weights[i] times; weights sum to 1 (Kitagawa 1996)."""
    points = (torch.arange(count, dtype=weights.dtype) + rng.random()) / count
    return torch.searchsorted(weights.cumsum(0), points).clamp_(max=len(weights) - 1).tolist()


def sample_global_batch(
    batch: Batch, num_samples: int, tau: float, rng: np.random.Generator, **sampling_params: float
) -> tuple[list[Completion], float, float]:
    """Sample `num_samples` completions from p(y)^(1/tau) / Z; the batch's completions are the particles.

    p is the distribution of next_token_probs with `sampling_params`. Also returns the effective sample size
    1 / sum_a W_a^2, where W_a is the weight of all particles that descend from initial particle a (so copies
    count once), and the estimate of log Z in nats. Warns on stderr if the effective sample size is low.
    """
    particles = batch.active
    log_weights = torch.zeros(particles, dtype=torch.float64)
    while batch.active:
        probs = next_token_probs(batch.logits, **sampling_params)
        tempered = probs.log() / tau
        log_weights[: batch.active] += tempered.logsumexp(-1).cpu()  # log Z_i
        weights = log_weights.softmax(0)
        if 1 / weights.square().sum() < particles / 2:  # before sampling: copies get own tokens
            order = batch.reindex(systematic_resampling(weights, particles, rng))[: batch.active]
            probs, tempered = probs[order], tempered[order]
            log_weights[:] = log_weights.logsumexp(0) - math.log(particles)
        if batch.active:
            noise = exponential_noise(rng, *tempered.shape)
            order = batch.append(gumbel_max(tempered.softmax(-1), noise), probs)
            log_weights = log_weights[order]
    weights = log_weights.softmax(0)
    ess = 1 / torch.zeros_like(weights).index_add(0, batch.ancestor, weights).square().sum().item()
    log_z = log_weights.logsumexp(0).item() - math.log(particles)
    if ess < particles / 10:
        advice = "more --particles, or a --global_temperature nearer 1"
        if tau > 1:
            has_min_p = sampling_params.get("min_p", 0) >= 0.01
            advice = f"a larger --min_p, {advice}" if has_min_p else "--min_p 0.01"
        print(f"warning: effective sample size {ess:.1f} of {particles}: give {advice}", file=sys.stderr)
    chosen = batch.completions(rng.permutation(systematic_resampling(weights, num_samples, rng)).tolist())
    return [c._replace(sampled_logp=c.sampled_logp / tau - log_z) for c in chosen], ess, log_z


def sample(
    model: PreTrainedModel,
    prompt_ids: list[int],
    num_samples: int,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None,
    *,
    seed: int = 0,
    global_temperature: float | None = None,
    particles: int | None = None,
    **sampling_params: float,
) -> list[Completion]:
    """Sample `num_samples` completions of one prompt, in one batch.

    `sampling_params` are those of next_token_probs. With a `global_temperature` tau, they come from
    p(y)^(1/tau) / Z instead: exact in the limit of many `particles` (default: num_samples); with few,
    completions repeat, and `sampled_logp` is log p(y) / tau - log Z, with log Z estimated. Raises InputError
    if the model cannot be sampled (see Batch) or its log-probabilities are NaN.
    """
    if global_temperature:
        batch = Batch(model, [prompt_ids], [0] * (particles or num_samples), max_new_tokens, eos_token_id)
        rng = np.random.default_rng(seed)
        return sample_global_batch(batch, num_samples, global_temperature, rng, **sampling_params)[0]
    size = num_samples, max_new_tokens, eos_token_id, num_samples
    return next(sample_completions(model, [prompt_ids], [[seed]], *size, **sampling_params))


@dataclass
class SampleConfig(Flags):
    """Flags of sample.py."""

    model: str = flag("out/dpl", "Folder or hub name of a model, or folder of an adapter.")
    prompts: str = flag("data/society/prompts.jsonl", "Rows with a 'prompt', or .txt with one per line.")
    prompt: str | None = flag(None, "One prompt, in place of --prompts; prints its completions.")
    prompt_template: str | None = flag(None, "File with {question}, filled from 'question' or 'problem'.")
    chat: bool = flag(False, "Put string prompts into the chat template; HH-RLHF transcripts become turns.")
    out_file: str | None = flag(None, "Default: samples.jsonl, in the --model folder if that is a run.")
    overwrite: bool = flag(False, "Replace --out_file.")
    resume: bool = flag(False, "Continue --out_file of an interrupted run; start it if there is none.")
    num_samples: int = flag(16, "Completions per prompt.", "[1, inf)")
    max_new_tokens: int = flag(256, "Longest completion, in tokens.", "[1, inf)")
    stop: list[str] | None = flag(None, "Strings that end a completion; they are removed from its text.")
    temperature: float = flag(1.0, "Token temperature; 0 is greedy.")
    top_k: int = flag(0, "Keep the top_k likeliest tokens; 0 keeps all.", "[0, inf)")
    top_p: float = flag(1.0, "Keep the smallest set of tokens with this total probability.", "(0, 1]")
    min_p: float = flag(0.0, "Keep tokens with at least min_p times the largest probability.", "[0, 1]")
    global_temperature: float | None = flag(None, "Of whole texts; above 1, add --min_p 0.01.", "[1e-6, inf)")
    particles: int = flag(128, "Particles per prompt, for --global_temperature.")
    batch_size: int = flag(128, "Completions sampled at a time; fewer save memory.", "[1, inf)")
    compile: bool = flag(False, "Compile the decoding step: minutes at the start, then faster steps.")
    seed: int = flag(0, "Seed of all random numbers.", "[0, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        t, tau = self.temperature, self.global_temperature
        require(self, "temperature", t == 0 or 1e-6 <= t < math.inf, "0, or at least 1e-6")
        require(self, "global_temperature", tau is None or t == 1, "given without --temperature")
        enough = tau is None or self.particles >= self.num_samples
        require(self, "particles", enough, "at least --num_samples")
        one = self.prompt_template is None or self.prompt is None
        require(self, "prompt_template", one, "given without --prompt")
        require(self, "resume", not (self.resume and self.overwrite), "given without --overwrite")


def encode(
    rows: list[dict], config: SampleConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[int]]:
    """Token ids of every prompt, and the end tokens. Raises InputError if prompts do not fit the model."""
    prompts, options = [row["prompt"] for row in rows], [row.get("template_options") for row in rows]
    with error_prefix(f"--model {config.model}"):
        ends = end_tokens(model, tokenizer, prompts)
    with error_prefix(config.prompts if config.prompt is None else "--prompt"):
        encoded = encode_prompts(prompts, tokenizer, options)
    new, limit = config.max_new_tokens, max_positions(model)
    needed = max(map(len, encoded)) + new - 1  # the last token is not fed
    if needed > limit:
        raise InputError(f"--max_new_tokens {new}: needs {needed} positions, the model has {limit}")
    if max(map(max, encoded)) >= model.get_input_embeddings().weight.shape[0]:
        raise InputError(f"--model {config.model}: its tokenizer has tokens that it has no embeddings for")
    return encoded, ends


def sample_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    indices: Sequence[int],
    ends: list[int],
    config: SampleConfig,
) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Sample the prompts encoded[indices]; yields (text, statistics) of the samples of each."""
    stop = config.stop or []
    params = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    span = max((len(s.encode()) for s in stop), default=0) + 1  # most tokens that a stop string may touch

    def has_stop(tokens: list[int]) -> bool:
        text = decode_continuation(tokens[-span:], tokenizer)
        return any(s in text for s in stop)

    limits, options = (config.max_new_tokens, ends), (has_stop if stop else None, config.compile)

    def describe(c: Completion, **extra: float) -> tuple[str, dict[str, Any]]:
        text = completion_text(c, tokenizer)
        if c.finish == "stop":
            text = text[: min((text.find(s) for s in stop if s in text), default=None)]
        stats = {"tokens": len(c.tokens), "logp": c.logp, "sampled_logp": c.sampled_logp} | extra
        return text, {name: round(x, 4) for name, x in stats.items()} | {"finish": c.finish}

    if tau := config.global_temperature:
        for n in indices:
            rng = np.random.default_rng([config.seed, n])
            batch = Batch(model, [encoded[n]], [0] * config.particles, *limits, *options)
            completions, ess, log_z = sample_global_batch(batch, config.num_samples, tau, rng, **params)
            del batch  # before the next one takes as much memory
            yield [describe(c, ess=ess, log_z=log_z) for c in completions]
        return
    prompts, seeds = [encoded[n] for n in indices], [[config.seed, n] for n in indices]
    each = prompts, seeds, config.num_samples
    for completions in sample_completions(model, *each, *limits, config.batch_size, *options, **params):
        yield list(map(describe, completions))


def lines_to_keep(out: Path, config: SampleConfig, digests: dict[str, str]) -> list[bytes]:
    """The complete lines of `out` that --resume keeps; `digests` are those of the model and of the prompts.

    Raises InputError if <out>.flags.json beside it is missing or damaged, or has other digests or flags.
    """
    if not (config.resume and out.exists()):
        return []
    path = Path(f"{out}.flags.json")
    try:
        saved = parse_json(path.read_bytes())
        require_same(asdict(config), saved["config"], MAY_CHANGE)
        for name, digest in digests.items():
            if saved.get(name, digest) != digest:
                value = getattr(config, name)
                raise InputError(f"--{name} {value}: not what the run to --resume had")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path}: missing or damaged, so --resume cannot check the flags; give --overwrite"
        ) from None
    return [line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


@distributed()
def main() -> None:
    """Sample every prompt of a file, or print samples of one prompt."""
    config = parse(SampleConfig, __doc__, may_be_empty=("prompt",))
    template = read_template(config.prompt_template, "question") if config.prompt_template else None
    if config.prompt is None:
        rows = read_prompts(config.prompts, template, config.chat)
    else:
        rows = [{"prompt": to_messages(config.prompt) if config.chat else config.prompt}]
        if config.chat:
            check_prompt(rows[0]["prompt"], "--prompt")
    folder = Path(config.model) if Path(config.model, "run.json").is_file() else Path()
    writes = config.out_file or config.prompt is None
    out = Path(config.out_file or folder / "samples.jsonl") if writes else None
    if out and out.is_dir():
        raise InputError(f"--out_file {out}: is a folder")
    is_writer = out is not None and get_rank() == 0

    def check_new() -> None:
        if is_writer and out.exists() and not (config.overwrite or config.resume):
            raise InputError(f"--out_file {out}: exists; --overwrite replaces it, --resume continues it")

    check_new()
    model, tokenizer = load_model(config.model, str(get_device()), get_dtype())
    encoded, ends = encode(rows, config, model, tokenizer)
    if is_writer:
        lock(out.with_name(f".{out.name}.lock"))
        check_new()  # another process may have written it meanwhile

    count, total = config.num_samples, config.num_samples * len(rows)
    digests = {"model": digest_weights(config.model), "prompts": digest_json(encoded)} if is_writer else {}
    lines = lines_to_keep(out, config, digests) if is_writer else []
    done, rank, world = all_gather(len(lines) // count)[0], get_rank(), get_world_size()  # done: prompts
    results = sample_prompts(model, tokenizer, encoded, range(done + rank, len(rows), world), ends, config)
    # processes wait for each other at every gather, and a prompt takes one longer than another
    chunk = 1 if world == 1 else 4 * max(1, config.batch_size // count)
    bar = tqdm(total=len(rows), initial=done, unit="prompt", disable=None if is_writer else True)
    for first in range(done, len(rows), world * chunk):
        parts = all_gather(list(itertools.islice(results, chunk)))
        if is_writer and first == done:  # not earlier: a run that fails at once leaves the old file as it was
            with atomic_write(out, "wb") as file:
                file.writelines(lines[: done * count])
            write_json(f"{out}.flags.json", {"config": asdict(config)} | digests)
        in_turn = itertools.zip_longest(*parts, fillvalue=[])  # as prompts were dealt to the processes
        samples = list(itertools.chain.from_iterable(itertools.chain.from_iterable(in_turn)))
        if is_writer:
            with out.open("a", encoding="utf-8") as file:
                for i, (text, stats) in enumerate(samples, first * count):
                    file.write(
                        json.dumps(sample_row(rows[i // count], text, stats), ensure_ascii=False) + "\n"
                    )
        elif out is None:
            for text, stats in samples:
                print(f"--- {', '.join(f'{name} {value}' for name, value in stats.items())}\n{text}\n")
        bar.update(len(samples) // count)
    if out:
        print(f"{total:,} completions in {out}")


if __name__ == "__main__":
    run_command(main)
