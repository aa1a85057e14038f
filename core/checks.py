"""Checks before training: refuse data, models and losses that would fail later or give wrong results.

- check_overwrite: models and data that --overwrite would remove
- check_memory: models that are too large for the device
- check_inputs: token ids without an embedding, texts that are too long, too few pairs for the processes
- check_packable: models whose log-probabilities change when pairs are packed into one row
- check_compile: models whose layers --compile cannot compile
- check_objective: losses that return a mean, mix pairs, or have no gradient
"""

import contextlib
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.checkpoint import old_files
from common.files import InputError
from common.parallel import all_gather, get_world_size
from core.attention import dense_masks
from core.hub import loading, read_config
from core.lora import model_folders
from core.model import Stats, pair_stats
from core.pairs import pack


def check_inputs(
    config: Any,
    model: PreTrainedModel,
    examples: Sequence,
    held_out: Sequence,
    digests: dict,
    length: str = "max_length",
) -> None:
    """Raise InputError unless model, data and number of processes fit together.

    `length` is the flag that limits the length of a text.
    """
    every = [*examples, *held_out]
    largest = max(max(map(max, example)) for example in every)
    if largest >= model.get_input_embeddings().weight.shape[0]:
        raise InputError(f"--model {config.model}: has no embedding for the tokenizer's id {largest}")
    longest = max(len(prompt) + max(map(len, answers)) - 1 for prompt, *answers in every)
    if longest > max_positions(model):
        raise InputError(f"--{length} {getattr(config, length)}: more positions than {config.model} has")
    processes = get_world_size()
    if processes > min(config.batch_size, len(examples), len(held_out) or processes):
        raise InputError(f"{processes} processes: --batch_size, --data and --eval_data need a pair for each")
    if any(other != digests for other in all_gather(digests)):
        flags = ", ".join(f"--{name} {getattr(config, name)}" for name in digests)
        raise InputError(f"{flags}: not the same for all processes")


def check_overwrite(config: Any) -> None:
    """Raise InputError if --overwrite would remove what the run reads: a model, the base of one, or data."""
    old = [path.resolve() for path in old_files(Path(config.out_dir))] if config.overwrite else []
    values = {name: getattr(config, name, None) for name in ("model", "reward_model", "data", "eval_data")}
    for name, value in values.items():
        if not value:
            continue
        for read in model_folders(value) if name.endswith("model") else [Path(value).resolve()]:
            if any(path.parent == read or read.is_relative_to(path) for path in old):
                raise InputError(f"--{name} {value}: --overwrite would remove {read}; name another --out_dir")


def check_objective(
    objective: Callable[..., dict[str, Tensor]], completions: int, has_reference: bool, device: torch.device
) -> bool:
    """Try an objective on random Stats of three examples; returns whether it uses policy.entropy.

    Raises InputError if it breaks the contract of `Objective`: in training it would go wrong in silence.
    """
    generator, shape = torch.Generator().manual_seed(0), (3, completions)
    length = torch.randint(1, 20, shape, generator=generator).float().to(device)
    random = [torch.rand(shape, generator=generator).to(device) for _ in range(4)]
    logp, entropy = (-length * random[0]).requires_grad_(), random[1].requires_grad_()
    reference = Stats(-length * random[2], length, random[3]) if has_reference else None

    def evaluate(rows: slice, with_entropy: bool) -> dict[str, Tensor]:
        policy = Stats(logp[rows], length[rows], entropy[rows] if with_entropy else None)
        return objective(policy, reference and Stats(*(x[rows] for x in reference)))

    try:
        values, uses_entropy = evaluate(slice(None), False), False
    except (TypeError, AttributeError):  # policy.entropy was None
        values, uses_entropy = evaluate(slice(None), True), True
    if not isinstance(values, dict) or "loss" not in values:
        raise InputError('the objective must return a dict with the key "loss"')
    for name, value in values.items():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != (3,):
            raise InputError(f'objective: "{name}" must have shape (pairs,), one value per pair, not {shape}')
    if not values["loss"].requires_grad:
        raise InputError('objective: "loss" does not depend on the policy: it has no gradient')
    for i in range(3):
        for name, value in evaluate(slice(i, i + 1), uses_entropy).items():
            alone = value.shape == (1,) and torch.allclose(value, values[name][i : i + 1], 1e-4, 1e-5)
            if not (alone or values[name][i].isnan()):
                reason = "depends on the other pairs of its micro-batch (no batch statistics, no squeeze())"
                raise InputError(f'objective: "{name}" of a pair {reason}')
    return uses_entropy


def max_positions(model: PreTrainedModel) -> float:
    """The longest text in tokens that the model allows; infinity if it names no limit.

    LongRoPE (Phi-3) changes its factors for the whole row once any text in it passes the original length, so
    no text may pass it.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [getattr(config, "max_position_embeddings", None)]
    if rope.get("rope_type") == "longrope":
        limits.append(rope.get("original_max_position_embeddings"))
    return min(filter(None, limits), default=math.inf)


def check_memory(config: Any, device: torch.device) -> None:
    """Raise InputError if the model's training state does not fit the device, before loading the weights.

    The model's config gives the number of weights; activations are not counted. With LoRA, a weight takes 2
    bytes in bfloat16 or 4 in float32; the adapter is not counted. Without LoRA it takes 16 bytes (weight,
    gradient and AdamW's two averages in float32), or 12 with RMSprop.
    """
    name, folder = config.model, Path(config.model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        return  # an adapter's folder: it has no config.json, and its base is not checked
    with loading(f"--model {name}"), torch.device("meta"):
        files = read_config(name)
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(files).parameters())
    dtype = "bfloat16" if config.dtype == "auto" and device.type == "cuda" else config.dtype
    loaded = count * (2 if dtype == "bfloat16" and config.lora_rank else 4)
    needed = loaded * (1 if config.lora_rank else 3 if config.optimizer == "rmsprop" else 4)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that share this machine's memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // here

    def refuse_above(total: int, needed: int, place: str, hint: str) -> None:
        if needed > total:
            have = f"about {needed / 1e9:.0f} GB without activations, and {place} has {total / 1e9:.0f} GB"
            raise InputError(f"--model {name}: training needs {have}: try {hint}")

    hint = "--parallel fsdp on more processes" if config.lora_rank else "--lora_rank 16, or --parallel fsdp"
    if config.parallel == "fsdp":
        needed //= get_world_size()
        # Each process loads all weights on the host and keeps a shard. An adapter's base in the dtype of its
        # files is not loaded but mapped, and processes share that memory
        if device.type == "cuda" and not (config.lora_rank and str(files.dtype).endswith(dtype)):
            refuse_above(host, loaded, "each process on the host", "fewer processes on each machine")
    if device.type == "cuda":
        refuse_above(torch.cuda.mem_get_info(device)[1], needed, "the GPU", hint)
    else:
        refuse_above(host, needed, "each process", hint)


@contextlib.contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn whatever a model raises in the block into an InputError that begins with `what`."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what}: {reason}") from error


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Turn a failure of torch.compile in the block into an InputError that begins with `what`."""
    try:
        yield
    except TorchDynamoException as error:
        raise InputError(f"{what}: torch.compile failed: {str(error).splitlines()[0]}") from error


def probe_ids(model: PreTrainedModel) -> list[int]:
    """Token ids for probe_pairs, without the padding token: 12, and as many more as a short window hides.

    Windows, chunks and the top-k of sparse attention change nothing in texts that are shorter. A longer probe
    may have 1e11 / (the model's weights) tokens: that takes seconds on a CPU, and leaves none for a 7B model.
    """
    config, count = model.config.get_text_config(), 12
    limit = min(1e11 / model.num_parameters(), max_positions(model)) - count
    spans = [
        v for k, v in vars(config).items() if re.search("window|chunk|block|topk", k) and isinstance(v, int)
    ]
    count += max((span for span in spans if span <= limit), default=0)
    # from the middle of the vocabulary, where words are: hidden states of special tokens can be so large that
    # bfloat16 rounds them to others
    words = range(config.vocab_size // 2, config.vocab_size)
    ids = [i for i in words if i != getattr(config, "pad_token_id", None)][:count]
    return list(itertools.islice(itertools.cycle(ids), count))


def probe_pairs(ids: list[int]) -> list[tuple[list[int], list[int], list[int]]]:
    """Two pairs of different lengths, made of 12 token ids; of more ids, a third pair with a long prompt."""
    pairs = [(ids[:4], ids[4:8], ids[5:10]), (ids[2:5], ids[6:7], ids[7:12])]
    return pairs + [(ids[5:], ids[:4], ids[1:5])] * (len(ids) > 12)


def own_values(model: PreTrainedModel, pairs: Sequence[Sequence[list[int]]]) -> Tensor:
    """The model's own log-probability of every text of pairs, (texts,): one plain forward for each.

    Of a reward model, what its head reads at the last token: the hidden state, (texts, D), of length 1.
    """
    model.set_attn_implementation("eager")  # under "packed", sparse attention would be dense in both
    values, mixed, is_reward_model = [], getattr(model, "mixed", False), model.get_output_embeddings() is None
    for prompt, completion in ((prompt, text) for prompt, *both in pairs for text in both):
        row = torch.tensor([prompt + completion], device=model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed), read_by_score(model) as hidden:
            logits = model(row[:, :-1] if is_reward_model else row).logits.float()
        if is_reward_model:
            values.append(hidden[0][0, -1])
            continue
        logp = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        values.append(logp.gather(1, row[0, len(prompt) :, None]).sum())
    return torch.stack(values)


@contextlib.contextmanager
def read_by_score(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Yields a list of the hidden states, scaled to length 1, that a reward model's head reads in the block.

    The rewards themselves show nothing while the head is new, zeros.
    """
    hidden: list[Tensor] = []
    score = getattr(model, "score", None)
    if score is None:
        yield hidden
        return
    own = score.forward
    score.forward = lambda x: hidden.append(F.normalize(x.float(), dim=-1)) or own(x)
    try:
        yield hidden
    finally:
        score.forward = own


@torch.no_grad()
def packing_gap(model: PreTrainedModel, pairs: Sequence[Sequence[list[int]]]) -> float:
    """Largest difference, over the texts of pairs, of the packed forward from own_values().

    Of log-probabilities in nats; of a reward model's hidden states, 0 to 2. Its exceptions are not caught.
    """
    plain = own_values(model, pairs)
    with read_by_score(model) as hidden:
        packed = pair_stats(model, pack(pairs)).logp.flatten()
    if hidden:
        return (hidden[0] - plain).norm(dim=-1).max().item()
    return (packed - plain).abs().max().item()


def check_packable(model: PreTrainedModel, path: str) -> None:
    """Raise InputError unless the packed forward computes what this model's own does, up to rounding.

    Compares it with one plain forward for each text, on a few token ids. This finds what would be silently
    wrong: recurrent layers, biases by index, attention sinks, windows known to the mask alone, unusual heads.
    """
    is_reward_model = model.get_output_embeddings() is None
    exact = model.dtype == torch.float32 and not getattr(model, "mixed", False)
    # bfloat16 moves SmolLM2's log-probabilities by 0.35 nats, its hidden states by 0.04; if completions saw
    # the other one of their pair, that would be 6.5 nats and 0.5
    limit = 1e-2 if exact else 0.2 if is_reward_model else 2.0
    with refused(f"--model {path}: {type(model).__name__} cannot be packed"), compiling(f"--model {path}"):
        gap = packing_gap(model, probe_pairs(probe_ids(model)))
        if not gap <= limit:
            what = "hidden states" if is_reward_model else "log-probabilities, in nats,"
            raise ValueError(f"{what} move by {gap:.2g}")


def check_compile(model: PreTrainedModel) -> None:
    """Compile the layers' forward and backward pass; raises InputError if that fails, or with dense masks.

    They are a list, a mask for each example: layers would be compiled for every number of examples.
    """
    if any(make_mask is dense_masks for make_mask, _ in model.mask_kinds):
        raise InputError("--compile: needs FlexAttention, so a GPU and --attention flex")
    with compiling("--compile"):
        pair_stats(model, pack(probe_pairs(probe_ids(model)))).logp.sum().backward()
    model.zero_grad()
