"""Does weighting by dispersion help? MallowsPO's question, asked where the truth is known.

The society's debates have five answers each, a central ranking, and raters drawn from a Mallows law whose
dispersion phi runs from 0.05 (one mind) to 0.95. DPO, MallowsPO-theta, MallowsPO-phi, DPL and Mallows-DPL
train on the same pairs with the same settings; each policy is read off exactly over the five answers:

    utility     P(a rater prefers the policy's answer to the reference's), a tie counting half
    KL          KL(pi || pi_ref), in nats
    distance    total variation between the policy and the shares of raters whose favourite each answer is

    python experiments/weighting.py     # 15 short runs, six minutes; those already there are not run again
"""

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
from files import write_json
from model import load_model, pair_stats
from preferences import encode_answers, encode_prompts, pack

OUT = ROOT / "out" / "weighting"
METHODS = {  # label: (folder, flags of train_mallows.py)
    "DPO": ("dpo", ["--loss", "theta", "--dispersion", "off"]),
    "MallowsPO-θ": ("theta", ["--loss", "theta"]),
    "MallowsPO-φ": ("phi", ["--loss", "phi"]),
    "DPL": ("dpl", ["--loss", "dpl", "--dispersion", "off"]),
    "Mallows-DPL": ("mallows_dpl", ["--loss", "dpl"]),
}
SETTINGS = ["--beta", "0.1", "--alpha", "0.2", "--lora_rank", "0", "--lr", "5e-4", "--epochs", "3"]
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
    """Each debate's utility, KL and distance among its answers, and the mass outside them, (debates,)."""
    found = {"utility": [], "kl": [], "distance": [], "outside": []}
    for law, debate in zip(np.exp(logp), debates.values(), strict=True):
        phi, items = debate["phi"], range(len(law))
        found["outside"].append(1 - law.sum())
        law = law / law.sum()
        reference = np.exp(debate["reference_logp"])
        reference /= reference.sum()
        wins = [[0.5 if i == j else mallows_pair(abs(j - i), phi) for j in items] for i in items]
        wins = np.array([[w if i <= j else 1 - w for j, w in enumerate(row)] for i, row in enumerate(wins)])
        found["utility"].append(law @ wins @ reference)
        found["kl"].append(law @ np.log(law / reference))
        found["distance"].append(abs(law - mallows_favourites(phi, len(law))).sum() / 2)
    return {name: np.array(values) for name, values in found.items()}


def make_results() -> dict[str, dict]:
    """Train what is not there yet; means over debates and their standard errors over seeds."""
    debates = json.loads((ROOT / "data/society/world.json").read_text())["debates"]
    contested = np.array([debate["phi"] > 0.5 for debate in debates.values()])
    policies = {"reference": [answer_logp(ROOT / "data/society/reference", debates)]}
    for label, (name, flags) in METHODS.items():
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
        results[label] = {}
        for name in found[0]:
            for part, rows in (("", slice(None)), ("_agreed", ~contested), ("_contested", contested)):
                values = np.array([run[name][rows].mean() for run in found])
                error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
                results[label][name + part] = [float(values.mean()), float(error)]
    return results


def draw(results: dict[str, dict], path: Path) -> None:
    """Utility against KL, and the distance to the population where raters agree and where they do not."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for label, marker in zip(METHODS, "os^Dv", strict=True):
        (x, dx), (y, dy) = results[label]["kl"], results[label]["utility"]
        style = {"marker": marker, "ls": "", "ms": 9, "color": "0.2", "mfc": "0.8", "capsize": 3}
        left.errorbar(x, 100 * y, 100 * dy, dx, label=label, **style)
    left.set(xlabel="KL(policy || reference), nats", ylabel="preferred to the reference's answer, %")
    left.legend(frameon=False, fontsize=9, loc="lower right")
    places = np.arange(len(results))
    for shift, part, shade, label in (
        (-0.2, "_agreed", "0.35", "debates with φ < 0.5"),
        (0.2, "_contested", "0.75", "debates with φ > 0.5"),
    ):
        means, errors = zip(*(found["distance" + part] for found in results.values()), strict=True)
        right.bar(
            places + shift, means, 0.38, yerr=errors, color=shade, edgecolor="0.1", capsize=3, label=label
        )
    right.set_xticks(places, results, rotation=20)
    right.set(ylabel="total variation to the raters' favourites")
    right.legend(frameon=False, fontsize=9)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    """Train, measure, print the table, draw assets/weighting.png."""
    results = make_results()
    write_json(OUT / "weighting.json", results)
    names = ["utility", "kl", "distance", "distance_agreed", "distance_contested", "outside"]
    print(f"{'':12}", *(f"{name:>20}" for name in names))
    for label, found in results.items():
        print(f"{label:12}", *("{:11.4f} ± {:.4f}".format(*found[name]).rjust(20) for name in names))
    draw(results, ROOT / "assets" / "weighting.png")


if __name__ == "__main__":
    main()
