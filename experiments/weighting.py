"""Does weighting by dispersion help? MallowsPO's question, on debates whose truth is known.

The society's debates have five answers each, a central ranking, and raters drawn from a Mallows model with
dispersion phi between 0.05 (nearly all agree) and 0.95. DPO, the phi link and DPL train on the same pairs
with the same settings, each with and without the weight. DPO also trains at larger beta, because any loss
that keeps the policy nearer the reference improves KL and distance below. Each policy is evaluated exactly,
as a distribution over six outcomes: the five answers, and any other text, which loses to them all.

    utility     P(a rater prefers the policy's text to the reference's), a tie counting half
    KL          KL(policy || reference) of the six outcomes, in nats. It is a lower bound of the KL of texts:
                other texts count as one outcome
    distance    total variation between the policy and the share of raters whose favourite each answer is
    outside     the policy's probability of other texts

Runs with one seed see the same batches, so the effect of the weight is the difference within a seed. A mean
over three seeds of one data set says nothing about differences smaller than its error.

    python experiments/weighting.py     # 24 short runs, eleven minutes; finished training runs are kept
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data.society.make_world import exact_logp
from data.society.truth import mallows_favourites, mallows_pair
from evaluate import WORLD
from experiments.doctor import run
from files import Help, run_command, write_json
from model import load_model

OUT, PICTURE, REFERENCE = (
    ROOT / "out/weighting",
    ROOT / "assets/weighting.png",
    ROOT / "data/society/reference",
)
OFF = ["--dispersion", "off"]
METHODS = {  # label: (folder, flags of train_mallows.py, marker, its fill: dark if weighted)
    "DPO": ("dpo", ["--loss", "theta", *OFF], "o", "white"),
    "DPO, β = 0.2": ("dpo_2", ["--loss", "theta", *OFF, "--beta", 0.2], "o", "white"),
    "DPO, β = 0.3": ("dpo_3", ["--loss", "theta", *OFF, "--beta", 0.3], "o", "white"),
    "MallowsPO-θ": ("theta", ["--loss", "theta"], "o", "0.2"),
    "φ link, no weight": ("phi_off", ["--loss", "phi", *OFF], "^", "white"),
    "MallowsPO-φ": ("phi", ["--loss", "phi"], "^", "0.2"),
    "DPL": ("dpl", ["--loss", "dpl", "--alpha", 0.2, *OFF], "D", "white"),
    "Mallows-DPL": ("mallows_dpl", ["--loss", "dpl", "--alpha", 0.2], "D", "0.2"),
}
# each method's baseline: the same without the weight; and for DPL, DPO at about the same KL
BASELINES = {"MallowsPO-θ": "DPO", "MallowsPO-φ": "φ link, no weight", "Mallows-DPL": "DPL", "DPL": "DPO"}
TRAIN = ["@recipes/debates.txt", "--lora_rank", 0, "--lr", 5e-4, "--epochs", 3]
SEEDS = (0, 1, 2)
METRICS = {  # key: title
    "utility": "utility",
    "kl": "KL, six outcomes",
    "distance": "distance",
    "dispersed": "where phi > 0.5",
    "outside": "outside",
}


def answer_logp(folder: Path, debates: dict[str, dict]) -> np.ndarray:
    """A policy's log-probability of each debate's answers, best ranked first, (debates, 5)."""
    model, tokenizer = load_model(folder)
    return np.array([exact_logp(model, tokenizer, prompt, d["ranking"]) for prompt, d in debates.items()])


def evaluate_policy(logp: np.ndarray, debates: dict[str, dict]) -> dict[str, float]:
    """Means over debates of the METRICS of a policy with these log-probabilities, (debates, 5)."""
    rows = []
    for policy, debate in zip(np.exp(logp), debates.values(), strict=True):
        phi, other = debate["phi"], len(policy)
        wins = np.full((other + 1, other + 1), 0.5)  # wins[i, j] = P(a rater prefers outcome i to outcome j)
        for i, j in itertools.combinations(range(other + 1), 2):  # i is ranked before j
            wins[i, j] = 1.0 if j == other else mallows_pair(j - i, phi)
            wins[j, i] = 1 - wins[i, j]
        policy, reference = (np.append(p, 1 - p.sum()) for p in (policy, np.exp(debate["reference_logp"])))
        distance = abs(policy - np.append(mallows_favourites(phi, other), 0)).sum() / 2
        row = {"utility": policy @ wins @ reference, "kl": policy @ np.log(policy / reference)}
        row |= {
            "distance": distance,
            "dispersed": distance if phi > 0.5 else math.nan,
            "outside": policy[other],
        }
        rows.append(row)
    return {name: float(np.nanmean([row[name] for row in rows])) for name in METRICS}


def make_results() -> dict[str, dict[str, list[float]]]:
    """Train what is missing; returns {label: {metric: one value per seed}}."""
    debates = json.loads(WORLD.read_text())["debates"]
    runs = {"reference": [evaluate_policy(answer_logp(REFERENCE, debates), debates)]}
    for label, (name, flags, *_) in METHODS.items():
        runs[label] = []
        for seed in SEEDS:
            out = OUT / f"{name}_{seed}"
            run("train_mallows.py", *TRAIN, *flags, "--seed", seed, "--out_dir", out, "--resume")
            runs[label].append(evaluate_policy(answer_logp(out, debates), debates))
    return {label: {name: [row[name] for row in rows] for name in METRICS} for label, rows in runs.items()}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error, which is 0 for a single seed."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(error)


def print_table(results: dict[str, dict[str, list[float]]]) -> None:
    """Print the mean of every metric, then its differences to BASELINES within a seed."""
    rows = dict(results)
    for label, baseline in BASELINES.items():
        differences = {k: np.subtract(results[label][k], results[baseline][k]).tolist() for k in METRICS}
        rows[f"{label} - {baseline}"] = differences
    print(f"{'':31}", *(f"{title:>18}" for title in METRICS.values()))
    for label, row in rows.items():
        cells = ("{:9.4f} ± {:.4f}".format(*mean_and_error(row[name])).rjust(18) for name in METRICS)
        print(f"{label:31}", *cells)


def draw(results: dict[str, dict[str, list[float]]]) -> None:
    """Plot utility against the KL to the reference, and against the distance to the raters' favourites."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    for axis, metric in zip(axes, ("kl", "distance"), strict=True):
        dpo = [results[label] for label in METHODS if METHODS[label][0].startswith("dpo")]
        line = [(np.mean(row[metric]), 100 * np.mean(row["utility"])) for row in dpo]
        axis.plot(*zip(*line, strict=True), color="0.6", linewidth=1, zorder=0)
        for label, (_, _, marker, fill) in METHODS.items():
            (x, dx), (y, dy) = (mean_and_error(results[label][name]) for name in (metric, "utility"))
            style = {"marker": marker, "ls": "", "ms": 8, "color": "0.2", "mfc": fill, "capsize": 2}
            name = "DPO, β = 0.1, 0.2, 0.3" if label == "DPO" else None if "β" in label else label
            axis.errorbar(x, 100 * y, 100 * dy, dx, label=name, **style)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_xlabel("KL(policy || reference) of six outcomes, a lower bound, nats")
    axes[0].set_ylabel("preferred to the reference's answer, %")
    axes[1].set_xlabel("total variation to the raters' favourites")
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)
    print(f"wrote {PICTURE}")


def main() -> None:
    """Train what is missing, evaluate, print the table and draw assets/weighting.png."""
    argparse.ArgumentParser(description=__doc__, formatter_class=Help).parse_args()
    results = make_results()
    write_json(OUT / "weighting.json", results)
    print_table(results)
    draw(results)


if __name__ == "__main__":
    run_command(main)
