"""Preference pairs from a policy's own samples, by their rewards (MallowsPO paper, section 5.5).

    best_worst      the sample with the highest reward of a prompt against the one with the lowest
    bradley_terry   two samples at random; the first is chosen with probability sigmoid(r_1 - r_2). The labels
                    then have the noise of people's choices, which alpha turns into diversity

    python sample.py --model POLICY --prompts prompts.jsonl --num_samples 5
    python data/make_pairs.py --samples POLICY/samples.jsonl --reward_model REWARD --out_file pairs.jsonl

Without --reward_model, the rows' key "reward" is read, which the samples/ of train_rl.py have.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.files import InputError, atomic_write, error_prefix
from common.flags import Flags, flag, parse, require, require_new, run_command
from common.rows import Sample, options_of, read_rows, read_sample, to_texts
from train_reward import load_scorer


@dataclass
class PairsConfig(Flags):
    """Flags of data/make_pairs.py."""

    samples: str = flag("out/dpl/samples.jsonl", "File that sample.py wrote.")
    reward_model: str | None = flag(None, "Folder or hub name of a decoder with a head 'score' of one label.")
    chat: bool = flag(False, "Put string prompts through the reward model's chat template.")
    how: str = flag("best_worst", "Which pairs.", ("best_worst", "bradley_terry"))
    pairs: int = flag(1, "For bradley_terry: pairs of a prompt.", "[1, inf)")
    out_file: str | None = flag(None, "File to write: rows of prompt, chosen, rejected.")
    overwrite: bool = flag(False, "Replace --out_file.")
    seed: int = flag(0, "Seed of bradley_terry's draws.", "[0, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "out_file", str(self.out_file).endswith(".jsonl"), "a name that ends in .jsonl")
        require_new(self, "out_file")


def read_rewards(config: PairsConfig, samples: list[Sample], rows: list[tuple[str, dict]]) -> np.ndarray:
    """The reward of each sample, (samples,). Raises InputError naming the row that has none."""
    if config.reward_model:
        with error_prefix("--reward_model"):
            return load_scorer(config.reward_model)(*to_texts(samples, config.chat))
    for where, row in rows:
        value = row.get("reward")
        if type(value) not in (int, float) or not math.isfinite(value):
            raise InputError(f"{where}: needs a finite number 'reward', or give --reward_model")
    return np.array([row["reward"] for _, row in rows], dtype=float)


def choose(rewards: np.ndarray, texts: list[str], config: PairsConfig, rng: np.random.Generator) -> list:
    """(chosen, rejected) indices of one prompt's samples. Texts that are equal make no pair."""
    if len(set(texts)) < 2:
        return []
    if config.how == "best_worst":
        best, worst = int(rewards.argmax()), int(rewards.argmin())
        return [(best, worst)] if rewards[best] > rewards[worst] and texts[best] != texts[worst] else []
    pairs = []
    for _ in range(config.pairs):
        a, b = rng.choice(len(texts), 2, replace=False).tolist()
        while texts[a] == texts[b]:
            a, b = rng.choice(len(texts), 2, replace=False).tolist()
        first = rng.random() < 1 / (1 + math.exp(min(rewards[b] - rewards[a], 700)))
        pairs.append((a, b) if first else (b, a))
    return pairs


def main() -> None:
    """Write --out_file."""
    config = parse(PairsConfig, __doc__)
    every = [(where, row, read_sample(row, where)) for where, row in read_rows(config.samples)]
    ended = [one for one in every if one[2].finish != "length" and one[2].text.strip()]
    if len(ended) < len(every):
        left_out = f"{len(every) - len(ended):,} of {len(every):,} texts"
        print(f"{config.samples}: {left_out} were cut at --max_new_tokens or are empty, and make no pairs")
    if not ended:
        raise InputError(f"{config.samples}: no text has an end; sample with more --max_new_tokens")
    samples, groups = [sample for *_, sample in ended], {json.dumps(s.prompt): [] for *_, s in every}
    _, answers, _ = to_texts(samples, False)
    rewards = read_rewards(config, samples, [(where, row) for where, row, _ in ended])
    for index, sample in enumerate(samples):
        groups[json.dumps(sample.prompt)].append(index)
    rng, pairs, without = np.random.default_rng(config.seed), [], 0
    for group in groups.values():
        texts = [samples[i].text for i in group]
        found = choose(rewards[group], texts, config, rng)
        without += not found
        for chosen, rejected in found:
            first = samples[group[0]]
            both = {"chosen": answers[group[chosen]], "rejected": answers[group[rejected]]}
            pairs.append({"prompt": first.prompt} | both | options_of(first.options))
    if not pairs:
        raise InputError(f"{config.samples}: no prompt has two different samples of different rewards")
    with atomic_write(config.out_file) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs)
    print(
        f"{len(pairs):,} pairs of {len(groups):,} prompts in {config.out_file}; {without:,} prompts gave none"
    )


if __name__ == "__main__":
    run_command(main)
