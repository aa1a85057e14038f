"""The reference pass: what the reference policy thinks of every pair, computed once.

Every loss compares the policy with the reference, which never changes. One sweep without gradients writes
its log-probabilities, lengths and entropies to a cache that later runs on the same model and data share: no
second model is in memory, and a sweep over alpha computes nothing twice.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import PreTrainedModel

from files import digest, write_tensors
from model import Stats, pair_stats
from parallel import rank, summed, world
from preferences import pack

EXCHANGE = 16  # micro-batches between exchanges of what the processes found
SAVE_SECONDS = 60  # between saves of an unfinished reference pass


def count_tokens(example: Sequence[list[int]]) -> int:
    """Tokens fed for (prompt, *completions): all but each completion's last."""
    return sum(map(len, example)) - len(example) + 1


def micro_batches(
    rows: Sequence[int], examples: Sequence, budget: int, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """One process's micro-batches: rows of similar length, at most `budget` tokens (a longer row goes alone).

    Processes get nearly equal numbers of tokens and equally many micro-batches, because in every forward pass
    FSDP needs them all; for that, two rows may share a micro-batch beyond the budget. Needs at least `world`
    rows.
    """
    tokens = {row: count_tokens(examples[row]) for row in rows}
    order = sorted(rows, key=tokens.__getitem__)
    shares = [_fill(order[first::world], tokens, budget) for first in range(world)]
    count, mine = min(max(map(len, shares)), len(order) // world), shares[rank]
    if len(mine) > count:  # by one at most: shares differ by a row
        mine[:2] = [mine[0] + mine[1]]
    while len(mine) < count:
        most = max(mine, key=len)
        mine.remove(most)
        mine += [most[::2], most[1::2]]
    return mine


def _fill(rows: Sequence[int], tokens: dict[int, int], budget: int) -> list[list[int]]:
    groups, size = [], math.inf
    for row in rows:
        if size + tokens[row] > budget:
            groups.append([])
            size = 0
        groups[-1].append(row)
        size += tokens[row]
    return groups


def digest_model(model: PreTrainedModel, autocast: bool = False) -> str:
    """SHA-256 of what a model computes with: its configuration, every weight, and whether under autocast."""
    config = {k: v for k, v in model.config.to_dict().items() if k[0] != "_" and k != "transformers_version"}
    found = hashlib.sha256(json.dumps([config, autocast]).encode())
    for name, weight in model.state_dict().items():
        found.update(digest({name: weight}).encode())
    return found.hexdigest()


def digest_examples(examples: Sequence[Sequence[list[int]]]) -> str:
    """SHA-256 of every token id."""
    return hashlib.sha256(json.dumps(list(examples)).encode()).hexdigest()


@torch.no_grad()
def reference_stats(
    model: PreTrainedModel, examples: Sequence, folder: Path, budget: int, model_key: str | None = None
) -> Stats:
    """The reference's Stats of every example, (examples, 2) on the CPU, from the cache in `folder` if there.

    The file is named by a digest of the examples and the model (`model_key`, if taken before an adapter was
    added), so another's is never read. An interrupted pass goes on where it stood; a damaged file is written
    anew. Processes share the work.
    """
    keys = f"{model_key or digest_model(model)} {digest_examples(examples)}"
    key = hashlib.sha256(keys.encode()).hexdigest()
    path = folder / f"{key[:32]}.safetensors"
    stats = torch.full((len(Stats._fields), len(examples), 2), math.nan)
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in Stats._fields}
        if file.metadata() == {"sha256": digest(found)}:
            stats = torch.stack(list(found.values()))
    stats = summed(stats if rank() == 0 else torch.zeros_like(stats))  # what rank 0 could read

    missing = stats[0].isnan().any(1)
    count = int(missing.sum())
    # every process needs a row: where too few are missing, known ones are computed again
    rows = (~missing).argsort(stable=True).tolist()[: max(count, world())] if count else []
    groups = micro_batches(rows, examples, budget, rank(), world()) if rows else []
    bar = tqdm(total=count, desc="reference pass", unit="pair", disable=rank() > 0 or None)
    new, saved = torch.zeros_like(stats), time.monotonic()
    for index, group in enumerate(groups, 1):
        found = pair_stats(model, pack([examples[row] for row in group]), entropy=True)
        new[:, group] = torch.stack(found).float().cpu()
        bar.update(len(group) * world())
        if index % EXCHANGE and index < len(groups):
            continue
        new = summed(new)
        stats = torch.where(new[1] > 0, new, stats)  # a length is never 0
        new.zero_()
        if rank() == 0 and (index == len(groups) or time.monotonic() - saved > SAVE_SECONDS):
            tensors = dict(zip(Stats._fields, stats, strict=True))
            write_tensors(path, tensors, {"sha256": digest(tensors)})
            saved = time.monotonic()
    bar.close()
    return Stats(*stats)
