"""Does entropy tell how much people disagree? MallowsPO's section 3.3 and Figure 3, where the truth is known.

Rankings of n items are drawn from a Mallows-phi model about a central one; the first of each is its winner,
the last its loser. With H the entropy of the winners and of the losers over the n items, the paper's
equation 10 guesses the dispersion that drew them,

    -log phi  ~  -phi* log( (H(Y_w) + H(Y_l)) / (2 log n) ),

with one phi* for all dispersions, here the one that gives estimate and truth the same mean. Ten items make
the two nearly proportional; the fewer the items, the more the estimate exaggerates how dispersions differ.

For a language model train_mallows.py takes the reference's mean token entropy over the two completions. The
society's debates test that: their raters' dispersions are known, and the reference learned from such raters.

    python experiments/dispersion.py        # seconds; writes out/dispersion.json and assets/dispersion.png
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from files import InputError, atomic_write, flag, parse, run_command, write_json
from model import load_model
from preferences import read_pairs, tokenize
from reference import reference_stats
from train_mallows import neg_log_dispersion

TRUTH = np.arange(1, 21) / 5  # -log phi, from 0.2 (phi = 0.82) to 4 (phi = 0.018)
STYLE = {5: {"marker": "^", "ls": ":"}, 10: {"marker": "o", "ls": "-"}, 100: {"marker": "s", "ls": "--"}}


@dataclass
class DispersionConfig:
    """The experiment's flags."""

    rankings: int = flag(10_000, "Rankings drawn from each Mallows model.")
    out_file: str = flag("out/dispersion.json", "Where the numbers go.")
    picture: str = flag("assets/dispersion.png", "Where the picture goes.")

    def __post_init__(self) -> None:
        if self.rankings < 1:
            raise InputError(f"--rankings {self.rankings}: needs a positive number")


def mallows_rankings(phi: float, items: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rankings with P ~ phi^(inversions), equation 5 with Kendall's tau about 0, 1, ..., items - 1.

    Returns (count, items), the best first. Drawn by repeated insertion: each item in turn enters k places
    above the end of those before it, which costs k inversions, with probability ~ phi^k. Raises ValueError
    unless 0 < phi <= 1.
    """
    if not 0 < phi <= 1:
        raise ValueError(f"phi = {phi} is outside (0, 1]")
    place = np.zeros((count, items), dtype=np.int64)
    for item in range(items):
        weight = phi ** np.arange(item + 1.0)
        place[:, item] = item - rng.choice(item + 1, count, p=weight / weight.sum())
        place[:, :item] += place[:, :item] >= place[:, item, None]
    return place.argsort(1)


def entropy(draws: NDArray[np.int64]) -> float:
    """Entropy in nats of the observed frequencies of draws (count,)."""
    share = np.bincount(draws) / len(draws)
    share = share[share > 0]
    return -(share @ np.log(share))


def estimate(items: int, rankings: int) -> dict:
    """The estimate of every TRUTH, its scale phi*, and its correlation with the truth."""
    rng = np.random.default_rng(0)
    drawn = [mallows_rankings(np.exp(-truth), items, rankings, rng) for truth in TRUTH]
    entropies = [[entropy(ranking[:, 0]), entropy(ranking[:, -1])] for ranking in drawn]
    raw = neg_log_dispersion(torch.tensor(entropies), items).numpy()
    scale = TRUTH.mean() / raw.mean()
    correlation = np.corrcoef(raw, TRUTH)[0, 1]
    return {
        "scale": scale,
        "correlation": correlation,
        "truth": TRUTH.tolist(),
        "estimate": (scale * raw).tolist(),
    }


def ranks(values: NDArray) -> NDArray[np.int64]:
    """Place of each of distinct values, from 0 for the smallest."""
    return np.argsort(np.argsort(values))


def estimate_society() -> dict:
    """-log phi of each of the society's debates: the truth, and the mean estimate over its training pairs."""
    folder = ROOT / "data/society"
    debates = json.loads((folder / "world.json").read_text())["debates"]
    model, tokenizer = load_model(folder / "reference")
    rows = read_pairs(folder / "debates.jsonl.gz")
    stats = reference_stats(model, tokenize(rows, tokenizer, 512), ROOT / "out/reference_cache", 4096)
    raw = neg_log_dispersion(stats.entropy.double(), len(tokenizer)).numpy()
    prompts = np.array([row["prompt"] for row in rows])
    raw_mean = np.array([raw[prompts == prompt].mean() for prompt in debates])
    truth = -np.log([debate["phi"] for debate in debates.values()])
    return {
        "scale": truth.mean() / raw_mean.mean(),
        "rank_correlation": np.corrcoef(ranks(raw_mean), ranks(truth))[0, 1],
        "truth": truth.tolist(),
        "estimate": (raw_mean * truth.mean() / raw_mean.mean()).tolist(),
    }


def draw_society(axis: Axes, found: dict) -> None:
    """Truth against the language model's estimate, a point a debate."""
    axis.axline((0, 0), slope=1, color="0.7", lw=6, label="estimate = truth")
    axis.plot(found["estimate"], found["truth"], "o", color="black", ms=5)
    axis.set(xlabel="estimate of −log φ, from token entropies", ylabel="−log φ of the debate's raters")
    axis.legend(frameon=False, loc="upper left")
    axis.set_title(f"the society's debates (rank correlation {found['rank_correlation']:.3f})", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def draw_mallows(axis: Axes, results: dict[int, dict]) -> None:
    """Truth against estimate, one line for each number of items (Figure 3)."""
    axis.axline((0, 0), slope=1, color="0.7", lw=6, label="estimate = truth")
    for items, found in results.items():
        label = f"{items} items, φ* = {found['scale']:.2f}"
        axis.plot(found["estimate"], found["truth"], color="black", ms=4, lw=1, label=label, **STYLE[items])
    axis.set(xlabel="estimate of −log φ, from winners and losers", ylabel="−log φ of the Mallows model")
    axis.set(xlim=(0, 5), ylim=(0, 4.2))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")


def main() -> None:
    """Estimate, print, write the numbers and draw."""
    config = parse(DispersionConfig, __doc__)
    results = {items: estimate(items, config.rankings) for items in STYLE}
    for items, found in results.items():
        print(f"{items:3} items: phi* {found['scale']:.3f}, correlation {found['correlation']:.4f}")
    society = estimate_society()
    print(
        f"society's debates: phi* {society['scale']:.3f}, rank correlation {society['rank_correlation']:.4f}"
    )
    write_json(config.out_file, {"rankings": config.rankings, "mallows": results, "society": society})
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_mallows(left, results)
    draw_society(right, society)
    with atomic_write(config.picture, "wb") as file:
        figure.savefig(file, format="png", dpi=150)
    print(f"wrote {config.out_file} and {config.picture}")


if __name__ == "__main__":
    run_command(main)
