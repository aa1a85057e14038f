"""Does entropy estimate how much people disagree? MallowsPO's section 3.3 and Figure 3, with known truth.

Rankings of n items are drawn from a Mallows-phi model. The first item of each is its winner, the last its
loser. With H the entropy of the winners and of the losers over the n items, equation 10 estimates

    -log phi  ~  -phi* log( (H(Y_w) + H(Y_l)) / (2 log n) )

with one scale phi* for all dispersions. The paper does not say which; here it gives estimate and truth the
same mean, so the scale is fitted to the truth. With ten items the estimate of -log phi is then right within
6% from 0.8 on; where people disagree more it is too small (0.09 for 0.2). With five items it exaggerates the
differences between dispersions, with a hundred it compresses them.

For a language model, train_mallows.py replaces H by the reference's mean token entropy over a completion. The
society's debates test that: the dispersion of their raters is known. It is a favourable case, because the
reference was trained on texts of the same raters.

A second picture shows the links that this dispersion decides, and the phi link's two smooth stand-ins, as
train_mallows.py computes them (the paper's Figures 2 and 4 to 6).

    python experiments/dispersion.py        # a minute; writes out/dispersion.json and two pictures
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.files import ROOT, write_json
from common.flags import Flags, flag, parse, run_command
from common.rows import read_pairs
from core.hub import load_model
from core.pairs import tokenize
from core.reference import reference_stats
from experiments import lab
from metrics.tables import save_figure
from train_mallows import log_link, neg_log_dispersion

TRUTH = np.arange(1, 21) / 5  # -log phi, from 0.2 (phi = 0.82) to 4 (phi = 0.018)
STYLE = {5: (lab.ORANGE, "^:"), 10: (lab.BLUE, "o-"), 100: (lab.RED, "s--")}


@dataclass
class DispersionConfig(Flags):
    """Flags of experiments/dispersion.py."""

    rankings: int = flag(10_000, "Rankings drawn from each Mallows model.", "[1, inf)")
    out_file: str = flag("out/dispersion.json", "File for the numbers.")
    picture: str = flag("assets/dispersion.png", "File for the picture of the estimates.")
    links: str = flag("assets/links.png", "File for the picture of the links.")


def mallows_rankings(phi: float, items: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Sample rankings, (count, items), best first, with P proportional to phi^(number of inversions).

    This is equation 5 with Kendall's tau and the central ranking 0, 1, ..., items - 1, sampled by repeated
    insertion: each item in turn is inserted k places above the end, which makes k inversions, with
    probability proportional to phi^k. Raises ValueError unless 0 < phi <= 1.
    """
    if not 0 < phi <= 1:
        raise ValueError(f"phi = {phi} is outside (0, 1]")
    place = np.zeros((count, items), dtype=np.int64)
    for item in range(items):
        weights = phi ** np.arange(item + 1.0)
        place[:, item] = item - rng.choice(item + 1, count, p=weights / weights.sum())
        place[:, :item] += place[:, :item] >= place[:, item, None]
    return place.argsort(1)


def entropy(samples: NDArray[np.int64]) -> float:
    """Entropy in nats of the frequencies of the values of `samples`, (count,)."""
    p = np.bincount(samples) / len(samples)
    p = p[p > 0]
    return -(p @ np.log(p))


def estimate(items: int, rankings: int) -> dict:
    """Estimate every value of TRUTH from sampled rankings; also the scale phi*, and the correlation."""
    rng = np.random.default_rng(0)
    sampled = [mallows_rankings(np.exp(-truth), items, rankings, rng) for truth in TRUTH]
    entropies = [[entropy(ranking[:, 0]), entropy(ranking[:, -1])] for ranking in sampled]
    unscaled = neg_log_dispersion(torch.tensor(entropies), items).numpy()
    scale = TRUTH.mean() / unscaled.mean()
    correlation = np.corrcoef(unscaled, TRUTH)[0, 1]
    return {
        "scale": scale,
        "correlation": correlation,
        "truth": TRUTH.tolist(),
        "estimate": (scale * unscaled).tolist(),
    }


def ranks(values: NDArray) -> NDArray[np.int64]:
    """Rank of each value, 0 for the smallest; the values must be distinct."""
    return np.argsort(np.argsort(values))


def estimate_society() -> dict:
    """Estimate -log phi of the society's debates, each by the mean over its training pairs."""
    debates = lab.read_world()["debates"]
    model, tokenizer = load_model(lab.REFERENCE)
    rows = read_pairs(ROOT / "data/society/debates.jsonl.gz")
    stats = reference_stats(model, tokenize(rows, tokenizer, 512), ROOT / "out/reference_cache", 4096)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    unscaled = neg_log_dispersion(stats.entropy.double(), vocab_size).numpy()
    prompts = np.array([row["prompt"] for row in rows])
    unscaled = np.array([unscaled[prompts == prompt].mean() for prompt in debates])
    truth = -np.log([debate["phi"] for debate in debates.values()])
    scale = truth.mean() / unscaled.mean()
    return {
        "scale": scale,
        "rank_correlation": np.corrcoef(ranks(unscaled), ranks(truth))[0, 1],
        "truth": truth.tolist(),
        "estimate": (scale * unscaled).tolist(),
    }


def draw_society(axis: Axes, result: dict) -> None:
    """Plot truth against the language model's estimate, one point per debate."""
    axis.axline((0, 0), slope=1, **lab.EXACT, label="estimate = truth")
    axis.plot(result["estimate"], result["truth"], "o", color=lab.BLUE, ms=5, label="a debate")
    axis.set(xlabel="estimate of −log φ, from token entropies", ylabel="−log φ of the debate's raters")
    correlation = f"rank correlation {result['rank_correlation']:.3f}"
    axis.set_title(f"A language model orders debates ({correlation}),\nbut compresses the range")
    axis.legend(loc="upper left")


def draw_mallows(axis: Axes, results: dict[int, dict]) -> None:
    """Plot truth against estimate, one line per number of items (Figure 3)."""
    axis.axline((0, 0), slope=1, **lab.EXACT, label="estimate = truth")
    for items, result in results.items():
        (color, style), label = STYLE[items], f"{items} items, φ* = {result['scale']:.2f}"
        axis.plot(result["estimate"], result["truth"], style, color=color, ms=4, lw=1, label=label)
    axis.set(xlabel="estimate of −log φ, from winners and losers", ylabel="−log φ of the Mallows model")
    axis.set_title("Rankings from a Mallows model: right for ten items;\nfive exaggerate, a hundred compress")
    axis.set(xlim=(0, 5), ylim=(0, 4.2))
    axis.legend(loc="lower right")


def draw_links(axes: list[Axes]) -> None:
    """Plot the probability of a preference against the difference of ranks (Figures 2 and 4 to 6).

    First the links theta and phi at three dispersions; then, at phi = 0.5, each stand-in over the exact link.
    """
    s = torch.linspace(-4, 4, 801, dtype=torch.float64)
    s = s[s != 0]  # the phi link jumps there

    def link(name: str, phi: float, epsilon: float | str = "auto") -> NDArray:
        return log_link(s, phi, name, epsilon).exp().numpy()

    for phi, style in ((0.1, "-"), (0.5, "--"), (0.9, ":")):
        theta = torch.sigmoid(-2 * np.log(phi) * s)
        axes[0].plot(s, theta, style, color=lab.ORANGE, label=f"θ, φ = {phi}")
        axes[0].plot(s, link("exact", phi), style, color=lab.BLUE, label=f"φ link, φ = {phi}")
    axes[0].set(title="Figure 2: the φ link jumps at 0", ylabel="P(y₁ is preferred to y₂)")
    stand_ins = [("sigmoid", "auto", "Figure 4: the sigmoid is smooth")]
    stand_ins += [("polynomial", 0.5, "Figure 5: the cubic at ε = 0.5 is nearly exact")]
    stand_ins += [("polynomial", "auto", "Figure 6: at ε = −2 log φ it is smoother")]
    for axis, (name, epsilon, title) in zip(axes[1:], stand_ins, strict=True):
        axis.plot(s, link("exact", 0.5), **lab.EXACT, label="exact, φ = 0.5")
        axis.plot(s, link(name, 0.5, epsilon), color=lab.BLUE, lw=1.2, label=name)
        axis.set_title(title)
    for axis in axes:
        axis.set(xlabel="s: rank of y₂ − rank of y₁", ylim=(0, 1))
        axis.legend(loc="upper left")


def main() -> None:
    """Estimate both; print and write the numbers, and draw both pictures."""
    config = parse(DispersionConfig, __doc__)
    results = {items: estimate(items, config.rankings) for items in STYLE}
    for items, result in results.items():
        print(f"{items:3} items: phi* {result['scale']:.3f}, correlation {result['correlation']:.4f}")
    society = estimate_society()
    print(
        f"society's debates: phi* {society['scale']:.3f}, rank correlation {society['rank_correlation']:.4f}"
    )
    write_json(config.out_file, {"rankings": config.rankings, "mallows": results, "society": society})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4))
    draw_mallows(left, results)
    draw_society(right, society)
    save_figure(figure, config.picture)
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), sharey=True)
    draw_links(list(axes))
    save_figure(figure, config.links)


if __name__ == "__main__":
    run_command(main)
