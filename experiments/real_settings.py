"""What helps DPL on a real model? One change at a time, at alpha / beta = 2 and on few pairs.

Before the first step, DPL's margins are (alpha - beta) times the difference of two log-probabilities of the
reference. On open text that is many nats, of length and likelihood, and nothing of what the raters want. Each
setting trains on the same number of choices of the raters of experiments/real.py:

    learning rate, clip    smaller steps, or larger ones
    warm start             alpha rises from beta to its value over the first half of the pairs
    length_normalize       log-probabilities per token; both weights times the mean number of tokens
    similar length,        only pairs whose texts have nearly the same number of words,
    similar likelihood     or nearly the same probability under the reference
    off policy             texts of the model at token temperature 1, which the reference rarely writes
    RL                     train_rl.py, on as many texts

What counts is J = E[r] + alpha H(pi) - beta H(pi, pi_ref), which DPL is to maximise; DPO has a row, too.

    python experiments/real_settings.py --model SMOLLM2 --embedder MINILM --pairs 1000     # 2 hours

It reads the reference and its texts from experiments/real.py's --out_dir, and makes them if there are none.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_dpl
from common.flags import flag, parse, run_command
from common.rows import read_prompts
from experiments import lab
from experiments.real import MANY, train_policy
from experiments.real_texts import (
    BETA,
    RealConfig,
    known_words,
    measure,
    over_prompts,
    print_table,
    slug,
    write_pairs,
    write_prompts,
    write_reference,
    write_texts,
)
from metrics.formulas import words
from metrics.tables import save_figure
from model import Stats
from train_dpl import DPLConfig, dpl_loss, dpl_margin

ALPHA, TOKENS = 2 * BETA, 23  # a text of the reference has 23 tokens on average
PER_TOKEN = {"--length_normalize": True, "--alpha": ALPHA * TOKENS, "--beta": BETA * TOKENS}
SETTINGS = {  # name: (method, which texts are compared, flags)
    "DPO": ("pairs", "all", {"--alpha": BETA}),
    "DPL": ("pairs", "all", {}),
    "lr / 4": ("pairs", "all", {"--lr": 5e-5}),
    "lr × 4": ("pairs", "all", {"--lr": 8e-4}),
    "clip 0.1": ("pairs", "all", {"--max_grad_norm": 0.1}),
    "warm start": ("warm", "all", {}),
    "length_normalize": ("pairs", "all", PER_TOKEN),
    "similar length": ("pairs", "similar length", {}),
    "similar likelihood": ("pairs", "similar likelihood", {}),
    "off policy": ("pairs", "off policy", {}),
    "RL": ("rl", "", {}),
}
KEEP = {  # which two texts may be compared
    "all": lambda a, b: True,
    "similar length": lambda a, b: abs(len(words(a["text"])) - len(words(b["text"]))) <= 1,
    "similar likelihood": lambda a, b: abs(a["ref_logp"] - b["ref_logp"]) <= 2,
    "off policy": lambda a, b: True,
}


@dataclass
class SettingsConfig(RealConfig):
    """Flags of experiments/real_settings.py."""

    pairs: int = flag(1000, "Choices of the raters in each setting.", "[32, inf)")
    out_file: str = flag("assets/real_settings.png", "The picture.")


def warm_objective(steps: int) -> Callable[..., dict[str, Tensor]]:
    """The loss of DPL, with alpha rising linearly from beta to its value over the first `steps` steps.

    It counts the pairs that it is called with, so for one process only.
    """
    seen = 0

    def objective(policy: Stats, reference: Stats, *, config: DPLConfig) -> dict[str, Tensor]:
        nonlocal seen
        alpha = config.beta + min(1, seen // config.batch_size / steps) * (config.alpha - config.beta)
        seen += len(policy.logp) if policy.logp.requires_grad else 0
        loss, margin = (f(policy, reference, alpha, config.beta) for f in (dpl_loss, dpl_margin))
        return {"loss": loss, "reward_margin": margin}

    return objective


def make_results(config: RealConfig) -> dict[str, list[list[dict[str, float]]]]:
    """Train and sample what is missing; returns measure() of each setting's prompts, with J, (1, prompts)."""
    path = write_prompts(config)
    prompts, folder = [row["prompt"] for row in read_prompts(path)], write_reference(config)
    many = config.reference_samples
    texts = dict.fromkeys(KEEP, write_texts(config, MANY, folder, prompts, many, seed=99))
    texts["off policy"] = write_texts(config, "model, many", config.model, prompts, many, seed=97)
    known, results = known_words(texts["all"]), {}
    for name, (method, compared, flags) in tqdm(SETTINGS.items(), desc="settings", unit="run", disable=None):
        run, flags = Path(config.out_dir, "settings", slug(name)), {"--alpha": ALPHA} | flags
        if method == "rl":
            train_policy(config, run, "rl", path, flags | {"--max_steps": max(1, config.pairs // 32)})
        else:
            pairs = write_pairs(config, slug(compared), prompts, texts[compared], keep=KEEP[compared])
            loss = warm_objective(config.pairs // 64) if method == "warm" else train_dpl.objective
            train_policy(config, run, "pairs", pairs, flags, loss)
        drawn = write_texts(config, f"setting {name}", run, prompts, config.samples)
        rows = [measure(texts, known) for texts in drawn]
        for row in rows:
            alpha = BETA if name == "DPO" else ALPHA
            row["J"] = row["utility"] + alpha * row["entropy"] - BETA * row["cross_entropy"]
        results[name] = [rows]
    return results


def draw(results: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Draw what each setting reaches; bars are standard errors over prompts."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), sharey=True)
    titles = {
        "J": "J, nats (DPO: with α = β)",
        "entropy": "entropy, nats a text",
        "new_words": "new words, share",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        values = [over_prompts(runs, key) for runs in results.values()]
        means, errors = np.array(values).T
        axis.errorbar(means, range(len(values)), xerr=errors, fmt="o", color=lab.BLUE, capsize=2)
        axis.axvline(means[list(results).index("DPL")], **lab.EXACT | {"lw": 2})
        axis.set(xlabel=title)
    axes[0].set_yticks(range(len(results)), list(results))
    axes[0].invert_yaxis()
    save_figure(figure, path)


def main() -> None:
    """Train and sample what is missing, print the table, draw the picture."""
    config = parse(SettingsConfig, __doc__)
    config.out_dir = str(Path(config.out_dir).resolve())
    results = make_results(config)
    lab.write_arrays(Path(config.out_dir, "settings.json"), results)
    print_table(results)
    draw(results, Path(config.out_file))


if __name__ == "__main__":
    run_command(main)
