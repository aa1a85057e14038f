"""Preference pairs: tokenise them, pack them into a row without padding, split a batch into micro-batches.

A completion includes its end token (unless it was truncated), because a policy's probability of a text
includes the decision to stop. common/encode.py makes the token ids.

A micro-batch is one row. Prompt A B C, chosen D E, rejected F G H become

    index      0  1  2  3  4  5     A completion's last token (E, H) is predicted but not fed.
    ids        A  B  C  D  F  G     The hidden states at source predict the targets:
    position   0  1  2  3  3  4     source  2  3  2  4  5
    branch     0  0  0  1  2  2     target  D  E  F  G  H
    example    0  0  0  0  0  0     counts  2  3            (two targets are chosen's, three rejected's)

A token attends to those tokens of its example, up to its own position, whose branch is 0 or its own: F sees
A B C F, and not D (attention.py).
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.encode import encode_rows
from common.files import InputError, error_prefix
from common.parallel import to_device
from common.rows import read_pairs

SEED_STRIDE = 1000003  # between the seeds of epochs (their order) and of steps (their dropout)


class Pair(NamedTuple):
    """Token ids of one preference: arrays in a run."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]


class Packed(NamedTuple):
    """Examples end to end in one row, `[prompt | chosen | rejected | prompt | ...]`, each prompt once.

    T tokens are fed to the model and M are predicted.
    """

    ids: Tensor  # (T,) token ids
    position: Tensor  # (T,) position within its own text: every completion restarts at len(prompt)
    example: Tensor  # (T,) which example the token belongs to
    branch: Tensor  # (T,) 0 prompt, 1 first completion (chosen), 2 second completion (rejected)
    source: Tensor  # (M,) index into the row: the hidden state at source[m] predicts ...
    target: Tensor  # (M,) ... the token id target[m]
    counts: Tensor  # (examples * completions,) targets of each completion, in order
    lengths: list[int]  # tokens fed, per example
    completions: int  # number per example: 2 for pairs, 1 for SFT, 0 for prompts alone

    def to(self, device: torch.device) -> "Packed":
        """The same on a device. A GPU gets all tensors in one copy, for which the CPU does not wait."""
        if self.ids.device == device:
            return self
        tensors = self[:7]
        flat = to_device(torch.cat(tensors), device)
        return Packed(*flat.split([len(x) for x in tensors]), *self[7:])


# ---- packing and micro-batches


def batch_indices(step: int, size: int, count: int, seed: int) -> list[int]:
    """The global batch of a step, as indices: a slice of an endless stream of shuffles of range(count)."""
    first, last = step * size, (step + 1) * size
    epochs = range(first // count, (last - 1) // count + 1)
    stream = torch.cat([shuffled(count, seed + SEED_STRIDE * epoch) for epoch in epochs])
    skip = epochs[0] * count
    return stream[first - skip : last - skip].tolist()


@lru_cache(maxsize=2)  # of a million examples, making it takes as long as a step
def shuffled(count: int, seed: int) -> Tensor:
    """The numbers 0 to count - 1 in random order, (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def pack(examples: Sequence[Sequence[Sequence[int]]]) -> Packed:
    """Lay examples (prompt, *completions), all with the same number of completions, end to end in one row."""
    ids, position, example, branch, source, target, counts, lengths = ([] for _ in range(8))
    for index, (prompt, *completions) in enumerate(examples):
        start = len(ids)
        ids += prompt
        position += range(len(prompt))
        branch += [0] * len(prompt)
        for number, completion in enumerate(completions):
            # the prompt's last token predicts each completion's first; every fed token predicts the next one
            source += [start + len(prompt) - 1, *range(len(ids), len(ids) + len(completion) - 1)]
            target += completion
            counts.append(len(completion))
            ids += completion[:-1]
            position += range(len(prompt), len(prompt) + len(completion) - 1)
            branch += [number + 1] * (len(completion) - 1)
        lengths.append(len(ids) - start)
        example += [index] * lengths[-1]
    columns = (ids, position, example, branch, source, target, counts)
    tensors = (torch.tensor(values, dtype=torch.long) for values in columns)
    return Packed(*tensors, lengths=lengths, completions=len(examples[0]) - 1)


def count_tokens(example: Sequence[Sequence[int]]) -> int:
    """Tokens that pack() feeds for (prompt, *completions): all but each completion's last."""
    return sum(map(len, example)) - len(example) + 1


def micro_batches(
    indices: Sequence[int], examples: Sequence, max_tokens: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Split a global batch, `indices` into `examples`; returns the micro-batches of process `rank`.

    A micro-batch holds examples of similar length, at most `max_tokens` tokens together, or one longer
    example. Processes get nearly equal numbers of tokens and the same number of micro-batches, because under
    FSDP they must run every forward pass together; to make the numbers equal, two examples may share a
    micro-batch beyond `max_tokens`. Needs at least `world_size` indices.
    """
    tokens = {index: count_tokens(examples[index]) for index in indices}
    by_length = sorted(indices, key=tokens.__getitem__)

    shares = [split(by_length[start::world_size], tokens, max_tokens) for start in range(world_size)]
    count, mine = min(max(map(len, shares)), len(indices) // world_size), shares[rank]
    if len(mine) > count:  # by one at most, because shares differ by one example
        mine[:2] = [mine[0] + mine[1]]
    while len(mine) < count:
        largest = max(mine, key=len)
        mine.remove(largest)
        mine += [largest[::2], largest[1::2]]
    return mine


def split(
    indices: Sequence[int], tokens: Mapping[int, int] | Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Cut a list of indices into parts of at most `max_tokens` tokens, or one index with more of them."""
    parts, size = [], 0
    for index in indices:
        if not parts or size + tokens[index] > max_tokens:
            parts.append([])
            size = 0
        parts[-1].append(index)
        size += tokens[index]
    return parts


def default_micro_batch_tokens(device: torch.device) -> int:
    """Tokens per forward pass: enough to keep the device busy, and no more than its memory holds for 7B."""
    if device.type == "cpu":
        return 512  # as fast as 2,048, in half the memory
    return 8192 if torch.cuda.get_device_properties(device).total_memory >= 80e9 else 2048


# ---- tokenising


def load_pairs(
    path: str, tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool = False
) -> Sequence:
    """Tokenised preference pairs of a file. Raises InputError naming the file."""
    rows = read_pairs(path, chat)
    with error_prefix(path):
        return tokenize(rows, tokenizer, max_length)


def tokenize(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Pair]:
    """Token ids of the rows of read_pairs, each prompt + completion at most `max_length` tokens.

    A longer pair is truncated. A pair whose completions are equal, before or after that, is dropped. Prints
    how many. Raises InputError if max_length is under 4 or if no pair is left.
    """
    encoded, cut = encode_rows(rows, Pair._fields, tokenizer, max_length)
    pairs = [pair for pair in map(Pair._make, encoded) if pair.chosen != pair.rejected]
    dropped = f"dropped {len(rows) - len(pairs):,} with chosen equal to rejected"
    if not pairs:
        raise InputError(f"no pair left of {len(rows):,}: {dropped}")
    print(f"{len(pairs):,} pairs: truncated {cut:,} to {max_length} tokens, {dropped}")
    return pairs


def describe(example: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, width: int = 300) -> str:
    """The parts of an example, decoded, a line each: what the model reads and what it is trained to write."""
    names = Pair._fields if len(example) == 3 else ("prompt", *["completion"] * (len(example) - 1))
    texts = [json.dumps(tokenizer.decode(ids), ensure_ascii=False) for ids in example]
    texts = [t if len(t) <= width else f"{t[: width // 2]} ... {t[-width // 2 :]}" for t in texts]
    return "\n".join(f"  {name:10} {text}" for name, text in zip(names, texts, strict=True))
