"""The reference pass: what the reference policy thinks of every pair, computed once.

Every loss compares the policy with the reference, which never changes. One sweep without gradients writes
its log-probabilities, lengths and entropies to a cache that later runs on the same model and data share: no
second model is in memory, and a sweep over alpha computes nothing twice.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from files import write_whole
from model import Stats, pair_stats
from preferences import pack

SAVE_SECONDS = 60  # between saves of an unfinished reference pass


def count_tokens(example: Sequence[list[int]]) -> int:
    """Tokens fed for (prompt, *completions): all but each completion's last."""
    return sum(map(len, example)) - len(example) + 1


def micro_batches(rows: Sequence[int], examples: Sequence, budget: int) -> Iterator[list[int]]:
    """Split rows into groups of at most `budget` tokens (a larger example goes alone), alike in length."""
    group, size = [], 0
    for row in sorted(rows, key=lambda row: count_tokens(examples[row])):
        tokens = count_tokens(examples[row])
        if group and size + tokens > budget:
            yield group
            group, size = [], 0
        group.append(row)
        size += tokens
    if group:
        yield group


def fingerprint(model: PreTrainedModel, examples: Sequence[Sequence[list[int]]]) -> str:
    """What a reference cache depends on: every weight, its dtype, and every token id."""
    config = {k: v for k, v in model.config.to_dict().items() if k[0] != "_" and k != "transformers_version"}
    digest = hashlib.sha256(json.dumps([config, torch.is_autocast_enabled(model.device.type)]).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for example in examples:
        digest.update(json.dumps(example).encode())
    return digest.hexdigest()


@torch.no_grad()
def reference_stats(model: PreTrainedModel, examples: Sequence, folder: Path, budget: int) -> Stats:
    """The reference's Stats of every example, (examples, 2) on the CPU, from the cache in `folder` if there.

    The file is named by its fingerprint, so another model's or data set's is never read. A pass that was
    interrupted goes on where it stood; a damaged file is computed anew.
    """
    key = fingerprint(model, examples)
    path = folder / f"{key[:32]}.safetensors"
    stats = {name: torch.full((len(examples), 2), math.nan) for name in Stats._fields}
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in Stats._fields}
            if file.metadata()["fingerprint"] == key and all(found[k].shape == stats[k].shape for k in stats):
                stats = found
    except (OSError, SafetensorError, KeyError, TypeError):
        pass

    def save() -> None:
        with write_whole(path, "wb") as file:
            save_file(stats, file.name, metadata={"fingerprint": key})

    missing = stats["logp"].isnan().any(1).nonzero().flatten().tolist()
    bar = tqdm(total=len(missing), desc="reference pass", unit="pair", disable=None)
    saved = time.monotonic()
    for rows in micro_batches(missing, examples, budget):
        found = pair_stats(model, pack([examples[row] for row in rows]), entropy=True)
        for name, value in found._asdict().items():
            stats[name][rows] = value.float().cpu()
        bar.update(len(rows))
        if time.monotonic() - saved > SAVE_SECONDS:
            save()
            saved = time.monotonic()
    bar.close()
    if missing:
        save()
    return Stats(**stats)


def take(stats: Stats | None, rows: list[int], device: torch.device) -> Stats | None:
    """The rows of cached Stats, on `device`."""
    return stats and Stats(*(value[rows].to(device) for value in stats))
