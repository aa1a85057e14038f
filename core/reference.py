"""The reference pass: log-probabilities of the reference policy, computed once and cached on disk.

The DPL and MallowsPO losses compare the policy with a fixed reference. Before training, one pass without
gradients computes the reference's log-probability, length and entropy of every completion. A safetensors
file stores them for later runs on the same model and data. So no second model is in memory, and a sweep
over alpha runs the reference only once.

score_completions does the same for texts that a policy wrote. Nothing is cached, and many completions share
their prompt in one row.
"""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import PreTrainedModel

from common.files import InputError, digest_json, digest_tensors, is_writable, write_tensors
from common.parallel import all_reduce, get_rank, get_world_size
from core.checks import max_positions
from core.model import Stats, pair_stats
from core.pairs import micro_batches, pack

EXCHANGE_EVERY = 16  # micro-batches between all_reduces of the results
SAVE_SECONDS = 60  # between saves of an unfinished pass
NOT_COMPUTED = math.nan


def cache_folder(out: Path) -> Path:
    """Where the reference's numbers are kept for the run in `out`: beside it, for all runs of a sweep.

    Inside it, if there is no writing beside it, as in a mounted volume.
    """
    beside = out.parent / "reference_cache"
    return beside if is_writable(beside) else out / "reference_cache"


def digest_model(model: PreTrainedModel) -> str:
    """SHA-256 of what a model computes with: its config and every weight."""
    config = {k: v for k, v in model.config.to_dict().items() if k[0] != "_" and k != "transformers_version"}
    weights = [digest_tensors({name: weight}) for name, weight in model.state_dict().items()]
    return digest_json([config, weights])


@torch.no_grad()
def reference_stats(
    model: PreTrainedModel, examples: Sequence, folder: Path, max_tokens: int, key: str | None = None
) -> Stats:
    """The reference's Stats of every example, (examples, completions) on the CPU, from the cache in `folder`.

    What the cache lacks is computed, in micro-batches of at most `max_tokens` tokens, shared between the
    processes. `key` stands for the model in the cache's key: give it if the model got an adapter since it was
    loaded, or if the numbers depend on more than its weights. An interrupted pass goes on where it stopped. A
    file that is damaged, or not of this model and these examples, is written again.
    """
    key = digest_json([key or digest_model(model), examples])
    path = folder / f"{key[:32]}.safetensors"
    stats = torch.full((len(Stats._fields), len(examples), len(examples[0]) - 1), NOT_COMPUTED)
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        cached = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        layout = {name: (x.shape, x.dtype) for name, x in cached.items()}
        expected = dict.fromkeys(Stats._fields, (stats[0].shape, stats.dtype))
        if layout == expected and file.metadata() == {"key": key, "sha256": digest_tensors(cached)}:
            stats = torch.stack([cached[name] for name in Stats._fields])
    stats = all_reduce(stats if get_rank() == 0 else torch.zeros_like(stats))  # what rank 0 could read

    missing = stats[0].isnan().any(1)
    count = int(missing.sum())
    # every process needs a row: if fewer are missing, some are computed again
    rows = (~missing).argsort(stable=True).tolist()[: max(count, get_world_size())] if count else []
    batches = micro_batches(rows, examples, max_tokens, get_rank(), get_world_size()) if rows else []
    bar = tqdm(total=count, desc="reference pass", unit="pair", disable=get_rank() > 0 or None)
    new, saved = torch.zeros_like(stats), time.monotonic()
    for index, batch in enumerate(batches, 1):
        computed = pair_stats(model, pack([examples[row] for row in batch]), entropy=True)
        new[:, batch] = torch.stack(computed).float().cpu()
        bar.update(len(batch) * get_world_size())
        last = index == len(batches)
        if index % EXCHANGE_EVERY and not last:
            continue
        new = all_reduce(new)
        is_new = Stats(*new).length > 0
        stats = torch.where(is_new, new, stats)
        new.zero_()
        if get_rank() == 0 and (last or time.monotonic() - saved > SAVE_SECONDS):
            tensors = dict(zip(Stats._fields, stats, strict=True))
            write_tensors(path, tensors, {"key": key, "sha256": digest_tensors(tensors)})
            saved = time.monotonic()
    bar.close()
    return Stats(*stats)


@torch.no_grad()
def score_completions(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    max_tokens: int = 1024,
) -> np.ndarray:
    """log pi(completion | prompt) of every completion in nats, or its reward under a reward model; (n,).

    Prompts and completions are token ids. A prompt is computed once for all of its completions that fit into
    a row of `max_tokens` tokens, and equal completions are computed once, so that they tie. Raises InputError
    for a text that is too long for the model.
    """
    lengths = [len(p) + len(c) - 1 for p, c in zip(prompts, completions, strict=True)]  # the last is not fed
    if max(lengths, default=0) > max_positions(model):
        raise InputError(f"a text has {max(lengths)} tokens, and the model {max_positions(model)} positions")
    by_prompt: dict[tuple, dict[tuple, None]] = defaultdict(dict)
    for prompt, completion in zip(prompts, completions, strict=True):
        by_prompt[tuple(prompt)][tuple(completion)] = None
    examples = defaultdict(list)  # by number of completions: pack() wants examples that have equally many
    for prompt, different in by_prompt.items():
        parts, size = [], 0
        for completion in different:
            if not parts or size + len(completion) > max_tokens:
                parts.append([])
                size = len(prompt)
            parts[-1].append(completion)
            size += len(completion)
        for part in parts:
            examples[len(part)].append((prompt, *part))
    count = sum(map(len, by_prompt.values()))
    scores = {}
    bar = tqdm(total=count, desc="scores", unit="text", leave=False, disable=get_rank() > 0 or None)
    for some in examples.values():
        for batch in micro_batches(range(len(some)), some, max_tokens):
            values = pair_stats(model, pack([some[i] for i in batch])).logp.tolist()
            for (prompt, *part), row in zip((some[i] for i in batch), values, strict=True):
                scores |= {(prompt, completion): x for completion, x in zip(part, row, strict=True)}
                bar.update(len(part))
    bar.close()
    return np.array([scores[tuple(p), tuple(c)] for p, c in zip(prompts, completions, strict=True)])
