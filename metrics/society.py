"""Samples of the embedded society against its exact optimum (DPL paper, equation 35), slot by slot.

The defaults continue from those of train_dpl.py and sample.py.

    python evaluate.py society
"""

import json
from dataclasses import dataclass

from common.files import write_json
from common.flags import Flags, flag, require_new
from common.rows import last_turn, read_rows, read_sample
from data.society.truth import WORLD, compare_samples, print_comparison


@dataclass
class Config(Flags):
    """Flags of evaluate.py society."""

    samples: str = flag("out/dpl/samples.jsonl", "File that sample.py wrote.")
    alpha: float = flag(0.2, "The policy was trained with this alpha.", "(0, inf)")
    beta: float = flag(0.1, "The policy was trained with this beta.", "(0, inf)")
    out_file: str | None = flag(None, "Also write all results to this file, as JSON.")
    overwrite: bool = flag(False, "Replace --out_file.")


def run(config: Config) -> None:
    """Compare the samples with the best policy for alpha and beta."""
    require_new(config, "out_file")
    samples = [read_sample(row, where) for where, row in read_rows(config.samples)]
    pairs = [(last_turn(sample.prompt), sample.text) for sample in samples]
    result = compare_samples(pairs, json.loads(WORLD.read_bytes()), config.alpha, config.beta)
    print_comparison(result)
    if config.out_file:
        write_json(config.out_file, result)
