"""The objective itself and its pairwise shortcut: do both reach one optimum (DPL paper, proposition A.2)?

Trains stories about a doctor in two ways, three seeds each: on the raters' pairs (train_dpl.py) and by
reinforcement learning on the raters' utility (train_rl.py). The exact probabilities of all 1,024 stories give
the total variation from the exact optimum, over whole stories, and the share of texts that are no story.
First both methods are run at three alpha / beta, then at three learning rates, without a tight clip, at
alpha / beta = 2.

The two do not know the same: raters choose at random, so the pairs tell the utilities with an error. What it
costs is the distance from the optimum for the utilities that fit the 24,000 choices best, without training.

    python experiments/objective.py     # 80 minutes on two cores; finished training runs are kept
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.files import ROOT
from common.flags import Flags, flag, parse, run_command
from common.rows import read_rows
from data.society.truth import list_stories, optimum, read_story, slot_distributions
from experiments import lab
from metrics.formulas import total_variation
from metrics.tables import mean_and_error, save_figure

BETA, RATES = 0.1, (5e-4, 1e-3, 2e-3)
RATIOS = {1: lab.BLUE, 2: lab.RED, 4: lab.ORANGE}  # alpha / beta: the color of its curves of J
RL = ["@recipes/society_rl.txt", "--data", "data/society/story.jsonl"]
RL += ["--batch_size", 1, "--num_samples", 128]
CAREFUL, PLAIN = {"--lr": 5e-4, "--max_grad_norm": 0.05}, {"--max_grad_norm": 1.0}
STYLES = {"pairs": ("s--", lab.ORANGE), "RL": ("o-", lab.BLUE)}


@dataclass
class ObjectiveConfig(Flags):
    """Flags of experiments/objective.py."""

    seeds: int = flag(3, "Training runs of each kind.", "[2, inf)")
    out_dir: str = flag("out/objective", "Folder of the policies; pairs at three alpha / beta: out/pareto.")
    out_file: str = flag("assets/objective.png", "The picture.")


def list_runs(config: ObjectiveConfig) -> list[tuple]:
    """(method, panel, alpha / beta or learning rate, seed, folder, flags) of every run."""
    out, runs = Path(config.out_dir), []
    for seed in range(config.seeds):
        for x in RATIOS:
            flags = CAREFUL | {"--alpha": round(BETA * x, 6), "--seed": seed}
            runs += [("pairs", "ratio", x, seed, Path(f"out/pareto/dpl{x}-seed{seed}"), flags)]
            runs += [("RL", "ratio", x, seed, out / f"rl{x}-seed{seed}", flags)]
        for x in RATES:
            flags = PLAIN | {"--lr": x, "--alpha": 2 * BETA, "--seed": seed}
            runs += [(m, "rate", x, seed, out / f"{m.lower()}-lr{x:g}-seed{seed}", flags) for m in STYLES]
    return runs


def train_policies(config: ObjectiveConfig) -> None:
    """Train what is not finished."""
    for method, _, _, _, folder, flags in list_runs(config):
        words = [word for pair in flags.items() for word in pair]
        if method == "RL":
            lab.train("train_rl.py", folder, *RL, *words)
        else:
            lab.train("train_dpl.py", folder, *lab.TRAIN_STORIES, *words)


def fitted_utilities(world: dict) -> np.ndarray:
    """The utilities, (1024,), under which the raters' choices are likeliest (Bradley-Terry).

    A story's utility is the sum of its slots' values; misspelt ones share one value per slot.
    """
    known = [(slot, value) for slot, values in world["slots"].items() for value in values]
    columns = {key: i for i, key in enumerate([*known, *world["slots"]])}

    def features(texts: list[str]) -> torch.Tensor:
        rows = torch.zeros(len(texts), len(columns), dtype=torch.float64)
        for row, text in zip(rows, texts, strict=True):
            for slot, value in read_story(text, world).items():
                row[columns.get((slot, value), columns[slot])] = 1
        return rows

    pairs = [pair for _, pair in read_rows(ROOT / "data/society/train.jsonl.gz")]
    difference = features([pair["chosen"] for pair in pairs]) - features([pair["rejected"] for pair in pairs])
    values = torch.zeros(difference.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([values], max_iter=1000, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -F.logsigmoid(difference @ values).mean()
        loss.backward()
        return loss

    optimizer.step(loss)
    return (features(list_stories(world)) @ values).detach().numpy()


def distances(p: np.ndarray, alpha: float) -> dict[str, float]:
    """How far stories of probabilities p (1024,) are from the optimum; what is missing to 1 is malformed."""
    world = lab.read_world()
    target = optimum(np.array(world["story_reference_logp"]), lab.story_utilities(world), alpha, BETA)
    names = (slot_distributions(x, world)["name"] for x in (p, target))
    other = 1 - p.sum()  # the optimum writes none
    return {
        "story": float(np.abs(p - target).sum() + other) / 2,
        "name": total_variation(*names),
        "malformed": float(other),
    }


def highest_objective(alpha: float) -> float:
    """J of its optimum, alpha log Z."""
    world = lab.read_world()
    score = BETA / alpha * np.array(world["story_reference_logp"]) + lab.story_utilities(world) / alpha
    return float(alpha * np.logaddexp.reduce(score))


def make_results(config: ObjectiveConfig) -> dict[tuple, list[dict[str, float]]]:
    """distances() of every run, {(method, panel, x): a dict per seed}; "labels": of the fitted optimum."""
    world = lab.read_world()
    logp, fitted = np.array(world["story_reference_logp"]), fitted_utilities(world)
    results = {
        ("labels", "ratio", x): [distances(optimum(logp, fitted, BETA * x, BETA), BETA * x)] for x in RATIOS
    }
    for method, panel, x, _, folder, flags in list_runs(config):
        p = lab.story_probs(folder, world)
        results.setdefault((method, panel, x), []).append(distances(p, flags["--alpha"]))
    return results


def print_table(results: dict[tuple, list[dict[str, float]]]) -> None:
    """Print means over seeds, with standard errors, and the largest share of malformed texts."""
    print(f"\n{'':18}{'TV of stories':>18}{'TV of the name':>18}{'malformed, %':>18}{'worst':>8}")
    for (method, panel, x), runs in results.items():
        line = f"{method:6} {'α/β' if panel == 'ratio' else 'lr'} = {x:<8g}"[:18].ljust(18)
        for name, scale, digits in (("story", 1, 3), ("name", 1, 3), ("malformed", 100, 2)):
            values = [scale * run[name] for run in runs]
            error = f" ± {mean_and_error(values)[1]:.{digits}f}" if len(runs) > 1 else ""
            line += f"{np.mean(values):.{digits}f}{error}".rjust(18)
        print(line + f"{100 * max(run['malformed'] for run in runs):8.2f}")


def draw(config: ObjectiveConfig, results: dict[tuple, list[dict[str, float]]]) -> None:
    """Draw J against steps, and TV and malformed texts against alpha / beta and the learning rate."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    for ratio, color in RATIOS.items():
        for seed in range(config.seeds):
            rows = [r for _, r in read_rows(Path(config.out_dir, f"rl{ratio}-seed{seed}/metrics.jsonl"))]
            y = [row["objective"] for row in rows]
            axes[0].plot([row["step"] for row in rows], y, ".", color=color, ms=3)
        best = highest_objective(BETA * ratio)
        axes[0].axhline(best, **lab.EXACT)
        axes[0].text(1, best, f" α/β = {ratio}", color=color, va="bottom", fontsize=8)
    axes[0].set(xlabel="step", ylabel="J, nats: mean of the step's 128 texts\n(one that is no story: −0.78)")
    axes[0].set_title("RL climbs to the highest J there is (grey)")
    for axis, panel, name in ((axes[1], "ratio", "story"), (axes[2], "rate", "malformed")):
        scale = 1 if name == "story" else 100
        for method, (style, color) in STYLES.items():
            runs = {x: r for (m, p, x), r in results.items() if (m, p) == (method, panel)}
            values = np.array([[scale * run[name] for run in seeds] for seeds in runs.values()])
            axis.plot(list(runs), values.mean(1), style, color=color, label=method, zorder=2)
            axis.plot(list(runs), values, style[0], color=color, ms=3, alpha=0.6, zorder=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.minorticks_off()
    labels = [results["labels", "ratio", x][0]["story"] for x in RATIOS]
    axes[1].plot(list(RATIOS), labels, **lab.EXACT, label="optimum for the labels")
    axes[1].set_xticks(list(RATIOS), list(RATIOS))
    axes[1].set(xlabel="α/β", ylabel="total variation of whole stories from the optimum")
    axes[1].set_title("RL ends nearer to the optimum than pairs")
    axes[2].set_xticks(RATES, [f"{x:g}" for x in RATES])
    axes[2].set(xlabel="learning rate, without a tight clip", ylabel="texts that are no story, %")
    axes[2].set_title("Too fast, both forget what a story is, RL sooner")
    axes[1].legend()
    axes[2].legend()
    save_figure(figure, config.out_file)


def main() -> None:
    """Train what is missing, print the table and draw the picture."""
    config = parse(ObjectiveConfig, __doc__)
    train_policies(config)
    results = make_results(config)
    print_table(results)
    draw(config, results)


if __name__ == "__main__":
    run_command(main)
