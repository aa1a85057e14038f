"""Seconds and memory that rows of data take before the first step of training.

The rows of --data are repeated. Then they are read, put through the chat template, tokenised and hashed, as a
training run of one process does. (Several share the tokenising.)

    python bench/rows.py --model MODEL --data hh.jsonl.gz --chat --rows 1000 10000 100000
"""

import itertools
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from machine import apart

from common.files import digest_json
from common.flags import Flags, flag, parse, run_command
from common.logs import peak_memory
from common.rows import read_rows
from core.pairs import count_tokens, load_pairs
from data.society.make_world import write_rows


@dataclass
class BenchConfig(Flags):
    """Flags of bench/rows.py."""

    model: str = flag("data/society/reference", "Folder or hub name of a model.")
    data: str = flag("data/society/debates.jsonl.gz", "Pairs to repeat.")
    chat: bool = flag(False, "Put rows of strings through the chat template.")
    rows: list[int] | None = flag(None, "Numbers of rows (default: 1000 10000 100000).", "[1, inf)")


def repeat(config: BenchConfig, count: int, path: Path) -> None:
    """Write `count` rows."""
    rows = [row for _, row in read_rows(config.data)]
    write_rows(path, itertools.islice(itertools.cycle(rows), count))


def load(config: BenchConfig, path: Path) -> tuple[float, float, float]:
    """(seconds, GB added at the peak, tokens of a pair) of reading and hashing a file of pairs."""
    tokenizer, cpu = AutoTokenizer.from_pretrained(config.model), torch.device("cpu")
    before, began = peak_memory(cpu), time.perf_counter()
    pairs = load_pairs(str(path), tokenizer, 1024, config.chat)
    digest_json(pairs)
    seconds, added = time.perf_counter() - began, peak_memory(cpu) - before
    return seconds, added, sum(map(count_tokens, pairs)) / len(pairs)


def main() -> None:
    """Measure each number of rows, in a process of its own, and print a line."""
    config = parse(BenchConfig, __doc__)
    counts = config.rows or [1000, 10_000, 100_000]
    print(f"{'rows':>9} {'seconds':>8} {'ms a row':>9} {'GB':>6} {'KB a row':>9} {'tokens a pair':>14}")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.jsonl")
            apart(repeat, config, count, path)  # a child's peak begins at its parent's
            seconds, added, tokens = apart(load, config, path)
        per_row = f"{1e3 * seconds / count:9.2f} {added:6.2f} {1e6 * added / count:9.2f}"
        print(f"{count:9,} {seconds:8.1f} {per_row} {tokens:14.1f}", flush=True)


if __name__ == "__main__":
    run_command(main)
