"""Who is the doctor? The DPL paper's Figure 1 on the embedded society, where the exact answer is known.

Trains DPO (alpha = beta = 0.1) and DPL (alpha = 0.2 and 0.4), samples each and the reference at token
temperature 1, and DPO also at 1.4; compares every slot with its exact target; draws assets/doctor.png.

    python experiments/doctor.py        # a few minutes on two cores; what is already there is not done again
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from files import Help

OUT, REFERENCE = Path("out/doctor"), "data/society/reference"
SAMPLES = 2000
# row of the picture: (folder, model, alpha of its target or None, token temperature)
ROWS = {
    "reference": ("reference", REFERENCE, None, 1.0),
    "DPO  α/β = 1": ("dpo", OUT / "dpo", 0.1, 1.0),
    "DPL  α/β = 2": ("dpl2", OUT / "dpl2", 0.2, 1.0),
    "DPL  α/β = 4": ("dpl4", OUT / "dpl4", 0.4, 1.0),
    "DPO at token\ntemperature 1.4": ("dpo_hot", OUT / "dpo", None, 1.4),
}


def run(*command: object) -> None:
    """Run one of the project's scripts and show the command."""
    print("$ python", *command, flush=True)
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)


def make_results() -> dict[str, dict]:
    """Train, sample and evaluate; returns each row's metrics."""
    prompt = OUT / "prompt.jsonl"
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    (ROOT / prompt).write_text((ROOT / "data/society/prompts.jsonl").read_text().splitlines(keepends=True)[0])
    results = {}
    for label, (name, model, alpha, temperature) in ROWS.items():
        if alpha:
            # all weights: a model this small chooses its words in the head, which LoRA leaves alone
            flags = ["--lora_rank", 0, "--lr", 1e-3, "--eval_data", "data/society/test.jsonl.gz", "--resume"]
            run("train_dpl.py", "--alpha", alpha, "--out_dir", model, *flags)
        samples = OUT / f"{name}.jsonl"
        law = ["--num_samples", SAMPLES, "--max_new_tokens", 48, "--temperature", temperature]
        run("sample.py", "--model", model, "--prompts", prompt, "--out_file", samples, *law, "--overwrite")
        metrics = OUT / f"{name}_metrics.json"
        run("evaluate.py", "society", "--samples", samples, "--alpha", alpha or 0.1, "--out_file", metrics)
        results[label] = json.loads((ROOT / metrics).read_text())
    return results


def stack(axis: Axes, y: float, height: float, shares: dict[str, float], least: float = math.inf) -> None:
    """One bar of shares in percent, each a shade, named if above `least`; what is left to 100 is hatched."""
    left = 0.0
    for i, (name, share) in enumerate(shares.items()):
        shade = 0.15 + 0.72 * i / (len(shares) - 1)
        axis.barh(y, share, height, left=left, color=str(shade), edgecolor="white", linewidth=0.6)
        if share > least:
            color = "white" if shade < 0.5 else "black"
            axis.text(left + share / 2, y, name, ha="center", va="center", fontsize=8, color=color)
        left += share
    axis.barh(y, max(0, 100 - left), height, left=left, color="white", edgecolor="black", hatch="////")


def draw(results: dict[str, dict], path: Path) -> None:
    """One bar a policy, cut by the doctor's name, its exact target thinner below; misspelling at right."""
    figure, axis = plt.subplots(figsize=(9, 4.6))
    for row, (label, result) in enumerate(results.items()):
        found = result["stories"]["name"]
        laws = (found["sampled"], found["target"])
        sampled, target = ({name: 100 * law[name] for name in found["target"]} for law in laws)
        stack(axis, row, 0.42, sampled, 9)
        axis.text(103, row, f"{100 * result['misspelt']:.1f}%", va="center", fontsize=11)
        if ROWS[label][2] is not None:
            stack(axis, row + 0.34, 0.16, target)
            axis.text(-1, row + 0.34, "exact target", ha="right", va="center", fontsize=7)
    axis.text(103, -0.62, "misspelt,\nmissing\n(hatched)", fontsize=9, va="center")
    axis.set_yticks(range(len(results)), list(results))
    axis.tick_params(axis="y", length=0)
    axis.set(xlim=(0, 100), ylim=(len(results) - 0.35, -0.9))
    axis.set_xlabel(f"share of {SAMPLES:,} stories, % (by the doctor's name)")
    axis.set_title("Who is the doctor?", loc="left")
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    """Make what is missing, and draw assets/doctor.png."""
    argparse.ArgumentParser(description=__doc__, formatter_class=Help).parse_args()
    draw(make_results(), ROOT / "assets" / "doctor.png")


if __name__ == "__main__":
    main()
