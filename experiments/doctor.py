"""Who is the doctor? The DPL paper's Figure 1 on the embedded society, where the exact answer is known.

Trains DPO (alpha = beta = 0.1) and DPL (alpha = 0.2 and 0.4), samples each of them and the reference at token
temperature 1, and DPO also at 1.4. The doctor's name is compared with its exact optimum twice: as sampled,
and by the policy's exact probabilities of all 1,024 stories of the grammar, which have no sampling error.

    python experiments/doctor.py        # 4 to 10 minutes on two cores; finished training runs are kept
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.files import ROOT
from common.flags import Help, run_command
from data.society.truth import slot_distributions
from experiments import lab
from metrics.formulas import entropy_bits, total_variation
from metrics.tables import save_figure

OUT, PICTURE, SAMPLES = ROOT / "out/doctor", ROOT / "assets/doctor.png", 2000
ROWS = {  # label: (name of its files, folder of the policy, alpha of the target or None, token temperature)
    "reference": ("reference", None, None, 1.0),
    "DPO  α/β = 1": ("dpo", "dpo", 0.1, 1.0),
    "DPL  α/β = 2": ("dpl2", "dpl2", 0.2, 1.0),
    "DPL  α/β = 4": ("dpl4", "dpl4", 0.4, 1.0),
    "DPO at token\ntemperature 1.4": ("dpo_hot", "dpo", None, 1.4),
}


def exact_names(folder: Path) -> dict[str, float]:
    """A policy's distribution of the doctor's name over the well-formed stories, without sampling."""
    world = lab.read_world()
    return slot_distributions(lab.story_probs(folder, world), world)["name"]


def make_results() -> dict[str, dict[str, Any]]:
    """Train, sample and evaluate; returns for each row what evaluate.py found of its samples.

    Rows at token temperature 1 also get "exact", the distribution of exact_names().
    """
    results = {}
    for label, (name, folder, alpha, temperature) in ROWS.items():
        model = OUT / folder if folder else lab.REFERENCE
        samples, metrics = OUT / f"{name}.jsonl", OUT / f"{name}.json"
        if alpha:
            lab.train("train_dpl.py", model, *lab.TRAIN_STORIES, "--alpha", alpha)
        flags = ["--model", model, "--prompts", "data/society/story.jsonl"]
        flags += ["--out_file", samples, "--overwrite"]
        flags += ["--num_samples", SAMPLES, "--max_new_tokens", 48, "--temperature", temperature]
        lab.run("sample.py", *flags)
        flags = ["--samples", samples, "--alpha", alpha or 0.1, "--out_file", metrics, "--overwrite"]
        lab.run("evaluate.py", "society", *flags)
        results[label] = json.loads(metrics.read_text())
        if temperature == 1:
            results[label]["exact"] = exact_names(model)
    return results


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Print total variation and entropy of the doctor's name, and how many stories have errors."""
    print(f"\n{'':30} TV to target            entropy, bits           name      story")
    print(f"{'':30} exact sampled reference exact sampled target misspelt malformed")
    for label, result in results.items():
        name, exact = result["stories"]["name"], result.get("exact")
        has_target = ROWS[label][2] is not None
        cells = [
            total_variation(exact, name["target"]) if has_target else math.nan,
            name["tv_target"] if has_target else math.nan,
            total_variation(name["reference"], name["target"]) if has_target else math.nan,
            entropy_bits(exact) if exact else math.nan,
            name["entropy_bits"],
            name["target_entropy_bits"] if has_target else math.nan,
        ]
        row = "{:30} {:5.3f} {:7.3f} {:9.3f} {:5.2f} {:7.2f} {:6.2f}".format(label.replace("\n", " "), *cells)
        print(row.replace("nan", "  -"), f"{result['misspelt']:8.1%} {result['malformed']:9.1%}")


def draw(results: dict[str, dict[str, Any]]) -> None:
    """Draw a bar per row, stacked by the doctor's name as sampled, and below it its exact target, thinner."""
    figure, axis = plt.subplots(figsize=(9, 4.6))
    for y, (label, result) in enumerate(results.items()):
        name = result["stories"]["name"]
        sampled, target = (
            {value: 100 * name[key][value] for value in name["target"]} for key in ("sampled", "target")
        )
        lab.stack(axis, y, 0.42, sampled, 9)
        axis.text(103, y, f"{name['entropy_bits']:.2f}", va="center", fontsize=11)
        axis.text(115, y, f"{result['misspelt']:.1%}", va="center", fontsize=11)
        if ROWS[label][2] is not None:
            lab.stack(axis, y + 0.34, 0.16, target)
            axis.text(-1, y + 0.34, "exact target", ha="right", va="center", fontsize=7)
            axis.text(103, y + 0.34, f"{name['target_entropy_bits']:.2f}", va="center", fontsize=7)
    axis.text(103, -0.62, "entropy,\nbits", fontsize=9, va="center")
    axis.text(115, -0.62, "misspelt,\nmissing\n(hatched)", fontsize=9, va="center")
    axis.set_yticks(range(len(results)), list(results))
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set(xlim=(0, 100), ylim=(len(results) - 0.35, -0.9))
    axis.set_xlabel(f"share of {SAMPLES:,} stories, % (by the doctor's name)")
    axis.set_title("DPO gives one doctor, DPL keeps the others; heat misspells names", fontsize=12)
    save_figure(figure, PICTURE)


def main() -> None:
    """Train what is missing, sample, print the table and draw assets/doctor.png."""
    argparse.ArgumentParser(description=__doc__, formatter_class=Help).parse_args()
    results = make_results()
    print_table(results)
    draw(results)


if __name__ == "__main__":
    run_command(main)
