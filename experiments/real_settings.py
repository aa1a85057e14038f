"""What helps DPL on a real model? One change at a time, at alpha / beta = 2 and on few rankings.

Before the first step, DPL's margins are (alpha - beta) times the difference of two log-probabilities of the
reference. On open text that is many nats, of length and likelihood, and nothing of what the raters want. Each
setting trains on the same number of rankings by the raters of real_texts.py:

    learning rate, clip    smaller steps, or larger ones
    per token              --length_normalize, with weights 24 times as large: 24 tokens are a text
    similar length,        only rankings whose texts have nearly the same number of words,
    similar likelihood     or nearly the same probability under the reference
    off policy             texts of the model at token temperature 1, which the reference rarely writes
    RL                     train_rl.py, on as many texts of eight prompts; it knows utilities, no order

DPL is to maximise J = E[r] + alpha H(pi) - beta H(pi, pi_ref). Entropy grows with length, so a policy that
writes on until it is cut has a high J. The picture shows what a reader of its texts sees instead. The
reference and DPO have a row, too: a setting that does not pass them is not worth its training.

    python experiments/real_settings.py --model SMOLLM2 --embedder MINILM     # 1 to 3 hours on two cores
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.flags import flag, parse, run_command
from common.rows import read_prompts
from experiments import lab
from experiments.real import per_token, train_by_rl, train_on_rankings, weights
from experiments.real_texts import (
    MANY,
    RealConfig,
    Results,
    known_words,
    measure_texts,
    open_folder,
    over_prompts,
    print_table,
    slug,
    write_prompts,
    write_rankings,
    write_reference,
    write_texts,
)
from metrics.formulas import words
from metrics.tables import save_figure

RATIO = 2
SETTINGS = {  # name: (which texts are ranked, or "rl"; flags)
    "DPO": ("all", weights(1)),
    "DPL": ("all", {}),
    "lr 5e-5": ("all", {"--lr": 5e-5}),
    "lr 8e-4": ("all", {"--lr": 8e-4}),
    "clip 0.1": ("all", {"--max_grad_norm": 0.1}),
    "per token": ("all", per_token(RATIO)),
    "similar length": ("similar length", {}),
    "similar likelihood": ("similar likelihood", {}),
    "off policy": ("off policy", {}),
    "RL": ("rl", {}),
}
KEEP = {  # which texts may be ranked with a first one
    "all": lambda a, b: True,
    "similar length": lambda a, b: abs(len(words(a["text"])) - len(words(b["text"]))) <= 1,
    "similar likelihood": lambda a, b: abs(a["ref_logp"] - b["ref_logp"]) <= 2,
    "off policy": lambda a, b: True,
}


@dataclass
class SettingsConfig(RealConfig):
    """Flags of real_settings.py."""

    rankings: int = flag(250, "Orders of eight texts in each setting.", "[16, inf)")
    out_dir: str = flag("out/real_settings", "Folder of everything.")
    out_file: str = flag("assets/real_settings.png", "The picture.")


def make_results(config: SettingsConfig) -> Results:
    """Train and sample what is missing; returns measure() of each setting's prompts, (1, prompts)."""
    path = write_prompts(config)
    prompts, folder = [row["prompt"] for row in read_prompts(path)], write_reference(config)
    many = config.reference_samples
    texts = dict.fromkeys(KEEP, write_texts(config, MANY, folder, prompts, many, seed=99))
    texts["off policy"] = write_texts(config, "model, many", config.model, prompts, many, seed=97)
    known = known_words(texts["all"])
    rankings = {
        name: write_rankings(config, slug(name), prompts, texts[name], keep=keep)
        for name, keep in KEEP.items()
    }
    runs = {"reference": folder}
    for name, (learns, flags) in tqdm(SETTINGS.items(), desc="settings", unit="run", disable=None):
        runs[name], flags = Path(config.out_dir, slug(name)), weights(RATIO) | flags
        if learns == "rl":
            train_by_rl(config, runs[name], path, flags | {"--max_steps": config.rankings // 8})
        else:
            train_on_rankings(config, runs[name], rankings[learns], flags)
    drawn = {name: write_texts(config, name, run, prompts, config.samples) for name, run in runs.items()}
    return {name: [measure_texts(config, by_prompt, known)] for name, by_prompt in drawn.items()}


def draw(results: Results, path: Path) -> None:
    """Draw what each setting reaches; bars are standard errors over prompts."""
    figure, axes = plt.subplots(1, 4, figsize=(14, 4.6), sharey=True)
    titles = {"utility": "expected utility, nats", "features": "entropies of pronoun, name, opening, bits"}
    titles |= {"nats_per_token": "cross-entropy, nats a token", "tokens": "length, tokens a text"}
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
    open_folder(config)
    results = make_results(config)
    lab.write_arrays(Path(config.out_dir, "results.json"), results)
    print_table(results, ("DPO", "DPL"))
    draw(results, Path(config.out_file))


if __name__ == "__main__":
    run_command(main)
