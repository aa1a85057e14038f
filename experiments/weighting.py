"""Does weighting by dispersion help? MallowsPO's question, asked where the truth is known.

The society's debates have five answers each, a central ranking, and raters drawn from a Mallows law whose
dispersion phi runs from 0.05 (one mind) to 0.95. DPO, the phi link and DPL train on the same pairs with the
same settings, each with and without the weight, and DPO also at larger beta, since a loss that pulls less
hard stays nearer everything. Each policy is read off exactly, as a law over the five answers and, as a sixth
that loses to them all, any other text:

    utility     P(a rater prefers the policy's text to the reference's), a tie counting half
    KL          KL(pi || pi_ref), in nats
    distance    total variation between the policy and the shares of raters whose favourite each answer is
    outside     what the policy gives to other texts

Runs of one seed see the same batches, so the weight's effect is the difference within a seed.

    python experiments/weighting.py     # 24 short runs, eleven minutes; those already there are not run again
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data.society.truth import mallows_favourites, mallows_pair
from files import Help, write_json
from model import load_model, pair_stats
from preferences import encode_answers, encode_prompts, pack

OUT = ROOT / "out" / "weighting"
OFF = ["--dispersion", "off"]
METHODS = {  # label: (folder, flags of train_mallows.py, marker, filled where weighted)
    "DPO": ("dpo", ["--loss", "theta", *OFF], "o", "white"),
    "DPO, β = 0.2": ("dpo_2", ["--loss", "theta", *OFF, "--beta", "0.2"], "o", "white"),
    "DPO, β = 0.3": ("dpo_3", ["--loss", "theta", *OFF, "--beta", "0.3"], "o", "white"),
    "MallowsPO-θ": ("theta", ["--loss", "theta"], "o", "0.2"),
    "φ link, no weight": ("phi_off", ["--loss", "phi", *OFF], "^", "white"),
    "MallowsPO-φ": ("phi", ["--loss", "phi"], "^", "0.2"),
    "DPL": ("dpl", ["--loss", "dpl", "--alpha", "0.2", *OFF], "D", "white"),
    "Mallows-DPL": ("mallows_dpl", ["--loss", "dpl", "--alpha", "0.2"], "D", "0.2"),
}
# what the weight changes; and DPL against DPO at about its KL
PAIRS = {"MallowsPO-θ": "DPO", "MallowsPO-φ": "φ link, no weight", "Mallows-DPL": "DPL", "DPL": "DPO"}
SETTINGS = ["--lora_rank", "0", "--lr", "5e-4", "--epochs", "3"]
SEEDS = (0, 1, 2)


def answer_logp(folder: Path, debates: dict[str, dict]) -> np.ndarray:
    """A policy's log-probability of each debate's answers, best ranked first, (debates, 5)."""
    model, tokenizer = load_model(folder)
    rows = []
    for prompt, debate in debates.items():
        answers = debate["ranking"]
        encoded = encode_answers([prompt] * len(answers), answers, tokenizer)
        rows += [(encode_prompts([prompt], tokenizer)[0], ids) for ids in encoded]
    with torch.no_grad():
        logp = pair_stats(model, pack(rows)).logp.view(len(debates), -1)
    return logp.double().numpy()


def measures(logp: np.ndarray, debates: dict[str, dict]) -> dict[str, np.ndarray]:
    """Each debate's utility, KL, distance, and mass outside its answers, (debates,); logp (debates, 5)."""
    found = {"utility": [], "kl": [], "distance": [], "outside": []}
    for law, debate in zip(np.exp(logp), debates.values(), strict=True):
        phi, other = debate["phi"], len(law)
        wins = np.full((other + 1, other + 1), 0.5)
        for i, j in itertools.combinations(range(other + 1), 2):  # i is ranked before j
            wins[i, j] = 1.0 if j == other else mallows_pair(j - i, phi)
            wins[j, i] = 1 - wins[i, j]
        reference = np.exp(debate["reference_logp"])
        law, reference = (np.append(p, 1 - p.sum()) for p in (law, reference))
        favourites = np.append(mallows_favourites(phi, other), 0)
        found["utility"].append(law @ wins @ reference)
        found["kl"].append(law @ np.log(law / reference))
        found["distance"].append(abs(law - favourites).sum() / 2)
        found["outside"].append(law[other])
    return {name: np.array(values) for name, values in found.items()}


def make_results() -> dict[str, dict[str, list[float]]]:
    """Train what is not there yet; each policy's means over debates, one a seed."""
    debates = json.loads((ROOT / "data/society/world.json").read_text())["debates"]
    contested = np.array([debate["phi"] > 0.5 for debate in debates.values()])
    policies = {"reference": [answer_logp(ROOT / "data/society/reference", debates)]}
    for label, (name, flags, *_) in METHODS.items():
        policies[label] = []
        for seed in SEEDS:
            out = OUT / f"{name}_{seed}"
            command = ["train_mallows.py", *flags, *SETTINGS, "--seed", str(seed), "--out_dir", str(out)]
            print("$ python", *command, flush=True)
            subprocess.run([sys.executable, *command, "--resume"], cwd=ROOT, check=True)
            policies[label].append(answer_logp(out, debates))
    results = {}
    for label, runs in policies.items():
        found = [measures(logp, debates) for logp in runs]
        results[label] = {name: [float(run[name].mean()) for run in found] for name in found[0]}
        results[label]["contested"] = [float(run["distance"][contested].mean()) for run in found]
    return results


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error, 0 for a single one."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(error)


def print_table(results: dict[str, dict[str, list[float]]]) -> None:
    """Every policy's means, then the differences of PAIRS, seed by seed."""
    names = ["utility", "kl", "distance", "contested", "outside"]
    print(f"{'':31}", *(f"{name:>18}" for name in names))
    rows = dict(results)
    for label, plain in PAIRS.items():
        pairs = {name: np.subtract(results[label][name], results[plain][name]).tolist() for name in names}
        rows[f"{label} - {plain}"] = pairs
    for label, found in rows.items():
        cells = ("{:9.4f} ± {:.4f}".format(*mean_and_error(found[name])).rjust(18) for name in names)
        print(f"{label:31}", *cells)


def draw(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    """What each policy earns against how far it goes: from the reference, and from the population."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    for axis, measure in zip(axes, ("kl", "distance"), strict=True):
        dpo = [results[label] for label in METHODS if METHODS[label][0].startswith("dpo")]
        line = [[100 * np.mean(found["utility"]), np.mean(found[measure])] for found in dpo]
        axis.plot([x for _, x in line], [y for y, _ in line], color="0.6", linewidth=1, zorder=0)
        for label, (_, _, marker, fill) in METHODS.items():
            (x, dx), (y, dy) = (mean_and_error(results[label][name]) for name in (measure, "utility"))
            style = {"marker": marker, "ls": "", "ms": 8, "color": "0.2", "mfc": fill, "capsize": 2}
            name = "DPO, β = 0.1, 0.2, 0.3" if label == "DPO" else None if "β" in label else label
            axis.errorbar(x, 100 * y, 100 * dy, dx, label=name, **style)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(xlabel="KL(policy || reference), nats", ylabel="preferred to the reference's answer, %")
    axes[1].set(xlabel="total variation to the raters' favourites")
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    """Train, measure, print the table, draw assets/weighting.png."""
    argparse.ArgumentParser(description=__doc__, formatter_class=Help).parse_args()
    results = make_results()
    write_json(OUT / "weighting.json", results)
    print_table(results)
    draw(results, ROOT / "assets" / "weighting.png")


if __name__ == "__main__":
    main()
