"""Does a policy speak for the population? The DPL paper's corollary 3.1, calibration and best-of-N, on polls.

Of every 100 people in the society, 55, 20, 15 and 10 hold the four opinions of a poll. DPL trained on their
preferences ends at

    pi  proportional to  pi_ref^(beta/alpha) * share^(1/alpha).          (propositions 3.2 and A.1)

With beta = 0.1, DPO (alpha = 0.1) gives the majority's opinion nearly always. As alpha rises to 1, each
opinion should be given as often as it is held. Three claims, each with a picture:

    shares       corollary 3.1: at alpha = 1 the policy's probabilities are the shares, times pi_ref^0.1
    calibration  Figure 4: the policy's confidence in an opinion is the share of people who hold it. (The
                 paper measures this on facts; here it is about opinions, and the truth is known.)
    coverage     Figures 3, 7 to 9: draw a person; is the person's opinion among N texts of the policy? For
                 opinion o the chance is 1 - (1 - pi(o))^N.

DPL is compared with DPO at a token temperature. All probabilities are exact; only the measured points of
coverage are from samples. Errors are over training seeds on one set of 4,000 pairs. Its labels are drawn at
random, so the optimum for this set ("label optimum") differs from the exact one.

The reference is nearly flat on the polls, so DPO with beta = alpha has almost the same optimum as DPL here.
experiments/pareto.py shows what separate alpha and beta are for.

    python experiments/population.py       # 18 short runs, 17 minutes; finished training runs are kept
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.files import ROOT
from common.flags import Flags, flag, parse, run_command
from common.rows import read_pairs
from core.hub import load_model
from data.society.make_world import draw_seed
from data.society.truth import optimum
from experiments import lab
from metrics.answers import powers, samples_needed
from metrics.formulas import pass_at_k
from metrics.tables import mean_and_error, save_figure

BETA, ALPHAS = 0.1, (0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # token temperatures of DPO
DATA = "data/society/polls.jsonl.gz"
TRAIN = ["@recipes/society.txt", "--data", DATA, "--lora_rank", 0]
TRAIN += ["--lr", 5e-4, "--batch_size", 64, "--epochs", 8]
COVERED = {  # policies of the third picture: (alpha, token temperature, style)
    "DPO": (0.1, 1.0, {"color": lab.ORANGE, "marker": "o"}),
    "DPL, α/β = 2": (0.2, 1.0, {"color": lab.RED, "marker": "s"}),
    "DPL, α/β = 10": (1.0, 1.0, {"color": lab.BLUE, "marker": "^"}),
    "DPO at token temperature 3": (0.1, 3.0, {"color": lab.SKY, "marker": "x"}),
}
BEST = "DPO at its best token temperature for each N"
MOST = 128  # samples per person


@dataclass
class PopulationConfig(Flags):
    """Flags of experiments/population.py."""

    seeds: int = flag(3, "Training runs of each policy.", "[2, inf)")
    samples: int = flag(1024, "Samples per poll and policy, for the measured points.", f"[{MOST}, inf)")
    out_dir: str = flag("out/population", "Folder of the policies and of population.json.")
    pictures: str = flag("assets", "Folder of the three pictures.")


def opinion_probs(model: Any, tokenizer: Any, polls: dict[str, dict], temperature: float) -> np.ndarray:
    """Probability of each poll's opinions at a token temperature, (polls, 4); what is left is other texts."""
    rows = []
    for prompt, poll in polls.items():
        logits = lab.completion_logits(model, tokenizer, prompt, list(poll["shares"]))
        rows.append(lab.completion_logp(*logits, temperature=temperature).exp().tolist())
    return np.array(rows)


def evaluate_probs(probs: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    """How well probabilities (polls, 4), normalised, forecast the opinion of a person; means over polls.

    tv        total variation to the shares (4,)
    ece       |largest probability - share of people with that opinion|
    brier     mean over people of sum_k (p_k - [k is the person's opinion])^2
    outside   probability of texts that are none of the opinions
    """
    p = probs / probs.sum(1, keepdims=True)
    return {
        "tv": abs(p - shares).sum(1).mean() / 2,
        "ece": abs(p.max(1) - shares[p.argmax(1)]).mean(),
        "brier": ((p**2).sum(1) - 2 * p @ shares + 1).mean(),
        "outside": 1 - probs.sum(1).mean(),
    }


def fit_labels(polls: dict[str, dict]) -> list[np.ndarray]:
    """Bradley-Terry strengths of each poll's opinions, (4,), fitted to the labelled pairs of DATA.

    DPL's loss is the Bradley-Terry loss with the reward alpha log pi - beta log pi_ref. So a policy with free
    probabilities ends at DPL's optimum for these strengths in place of the shares. The fit is the fixed-point
    iteration of Zermelo (1929). Pairs with a text that is no opinion are left out, because it always loses.
    """
    rows, strengths = read_pairs(ROOT / DATA), []
    for prompt, poll in polls.items():
        names = list(poll["shares"])
        wins = np.zeros((len(names), len(names)))  # wins[i, j]: pairs in which i was preferred to j
        for row in rows:
            if row["prompt"] == prompt and {row["chosen"], row["rejected"]} <= set(names):
                wins[names.index(row["chosen"]), names.index(row["rejected"])] += 1
        strength = np.ones(len(names))
        for _ in range(1000):
            strength = wins.sum(1) / ((wins + wins.T) / (strength[:, None] + strength)).sum(1)
        strengths.append(strength)
    return strengths


def measured_coverage(
    model: Any, tokenizer: Any, polls: dict[str, dict], samples: int, temperature: float, seed: int = 0
) -> np.ndarray:
    """Chance that each opinion is among N samples, (polls, 4, len(powers(MOST))), estimated by pass_at_k."""
    rows, generator = [], torch.Generator().manual_seed(seed)
    for prompt, poll in polls.items():
        params = {"temperature": temperature, "seed": draw_seed(generator)}
        drawn, texts = lab.sample_texts(model, tokenizer, prompt, samples, 16, **params)
        ended = [text for c, text in zip(drawn, texts, strict=True) if c.finish == "eos"]
        counts = [ended.count(opinion) for opinion in poll["shares"]]
        rows.append([[pass_at_k(samples, c, k) for k in powers(MOST)] for c in counts])
    return np.array(rows)


def make_results(config: PopulationConfig) -> dict[str, Any]:
    """Train what is missing; returns opinion probabilities by policy, each (seeds, settings, polls, 4).

    "DPL" is at each of ALPHAS and "DPO" at each of TEMPERATURES. Without the axis of seeds: "optimum" and
    "label optimum" of DPL, "DPO optimum" with beta = alpha, all (alphas, polls, 4), and "reference" (polls,
    4). "measured" maps the names of COVERED to (seeds, polls, 4, numbers of samples).
    """
    polls = lab.read_world()["polls"]
    results: dict[str, Any] = {"DPL": [], "DPO": [], "measured": {name: [] for name in COVERED}}
    for seed in range(config.seeds):
        folders = {a: Path(config.out_dir) / f"alpha{a}-seed{seed}" for a in ALPHAS}
        for alpha, folder in tqdm(folders.items(), desc=f"policies, seed {seed}", disable=None):
            lab.train("train_dpl.py", folder, *TRAIN, "--alpha", alpha, "--seed", seed)
        with torch.no_grad():
            models = {alpha: load_model(folder) for alpha, folder in folders.items()}
            results["DPL"].append([opinion_probs(*models[alpha], polls, 1.0) for alpha in ALPHAS])
            results["DPO"].append([opinion_probs(*models[BETA], polls, t) for t in TEMPERATURES])
            for name, (alpha, t, _) in COVERED.items():
                seen = measured_coverage(*models[alpha], polls, config.samples, t, seed)
                results["measured"][name].append(seen)
    shares = [np.array(list(poll["shares"].values())) for poll in polls.values()]
    logp = [np.array(poll["reference_logp"]) for poll in polls.values()]
    constant, labels = [BETA] * len(ALPHAS), fit_labels(polls)
    targets = {"optimum": (constant, shares), "label optimum": (constant, labels)}
    for name, (betas, weights) in (targets | {"DPO optimum": (ALPHAS, shares)}).items():
        results[name] = [
            [optimum(r, np.log(w), alpha, beta) for r, w in zip(logp, weights, strict=True)]
            for alpha, beta in zip(ALPHAS, betas, strict=True)
        ]
    results["reference"] = opinion_probs(*load_model(lab.REFERENCE), polls, 1.0)
    results["shares"] = shares[0]
    results["measured"] = {name: np.array(rows) for name, rows in results["measured"].items()}
    return {name: x if isinstance(x, dict) else np.array(x) for name, x in results.items()}


def scores(probs: np.ndarray, shares: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and error over seeds of one of evaluate_probs' values; `probs` is (seeds, settings, polls, 4)."""
    return mean_and_error([[evaluate_probs(p, shares)[name] for p in seed] for seed in probs])


def print_tables(results: dict[str, Any]) -> None:
    """Print shares, calibration and coverage of every policy, with standard errors over seeds."""
    shares = results["shares"]
    print(f"\n{'':34}{'probability of the opinion held by':^38}    TV to the")
    columns = "".join(f"{s:>10.0%}" for s in shares) + "       shares      ECE            Brier    outside"
    print(f"{'':34}{columns}")
    rows = [(f"DPL, alpha {a:g}", results["DPL"][:, i]) for i, a in enumerate(ALPHAS)]
    for name in ("optimum", "label optimum", "DPO optimum"):
        rows += [(f"{name}, alpha {a:g}", results[name][None, i]) for i, a in enumerate(ALPHAS)]
    rows += [(f"DPO, token temperature {t:g}", results["DPO"][:, i]) for i, t in enumerate(TEMPERATURES)]
    for label, probs in [("reference", results["reference"][None]), *rows]:
        share = (probs / probs.sum(-1, keepdims=True)).mean((0, 1))
        line = f"{label:34}" + "".join(f"{x:10.3f}" for x in share)
        for name in ("tv", "ece", "brier", "outside"):
            mean, error = scores(probs[:, None], shares, name)
            line += f"  {mean[0]:.3f}" + (f" ± {error[0]:.3f}" if len(probs) > 1 else " " * 8)
        print(line)
    people = {None: "a person drawn from the population", 3: "a person of the rarest opinion"}
    for opinion, title in people.items():
        print(f"\ncoverage of {title}, exact (measured)" + "".join(f"{f'N = {k}':>16}" for k in powers(MOST)))
        for name in COVERED:
            exact = coverage(results, name, opinion)[:, np.array(powers(MOST)) - 1]
            seen = over_people(results["measured"][name], shares, opinion)
            cells = (f"{a:.3f} ({b:.3f})" for a, b in zip(exact.mean(0), seen.mean(0), strict=True))
            print(f"  {name:48}" + "".join(f"{cell:>16}" for cell in cells))
        cells = best_temperature(results, opinion)[:, np.array(powers(MOST)) - 1].mean(0)
        print(f"  {BEST:48}" + "".join(f"{cell:>16.3f}" for cell in cells))


def covered_probs(results: dict[str, Any], name: str) -> np.ndarray:
    """Opinion probabilities of a policy of COVERED, (seeds, polls, 4)."""
    alpha, t, _ = COVERED[name]
    return results["DPL"][:, ALPHAS.index(alpha)] if t == 1 else results["DPO"][:, TEMPERATURES.index(t)]


def over_people(values: np.ndarray, shares: np.ndarray, opinion: int | None) -> np.ndarray:
    """Mean of (seeds, polls, 4, n) over polls, for one opinion or a person drawn from the population."""
    return values.mean(1).swapaxes(1, 2) @ (shares if opinion is None else np.eye(len(shares))[opinion])


def exact_coverage(probs: np.ndarray, shares: np.ndarray, opinion: int | None) -> np.ndarray:
    """Chance that a person's opinion is among N samples of a policy, (seeds, MOST), from its probabilities.

    `probs` is (seeds, polls, 4). The person holds opinion number `opinion`, or is drawn from the population.
    """
    return over_people(1 - (1 - probs[..., None]) ** np.arange(1, MOST + 1), shares, opinion)


def coverage(results: dict[str, Any], name: str, opinion: int | None) -> np.ndarray:
    """exact_coverage() of a policy of COVERED."""
    return exact_coverage(covered_probs(results, name), results["shares"], opinion)


def best_temperature(results: dict[str, Any], opinion: int | None) -> np.ndarray:
    """exact_coverage() of DPO at the best of TEMPERATURES for each N."""
    by_temperature = results["DPO"].swapaxes(0, 1)
    return np.max([exact_coverage(p, results["shares"], opinion) for p in by_temperature], axis=0)


def log_ticks(axis: Axes, ticks: Sequence[float]) -> None:
    """A log scale on x with these ticks and no other."""
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.set_xticks([], minor=True)


def draw_shares(results: dict[str, Any], path: Path) -> None:
    """Corollary 3.1: the probability of each opinion against alpha, over the exact optimum."""
    figure, axis = plt.subplots(figsize=(7, 4.2))
    mean, error = mean_and_error((results["DPL"] / results["DPL"].sum(-1, keepdims=True)).mean(2))
    lines = [
        ("optimum", "-", "exact optimum"),
        ("label optimum", "--", "optimum for the data's random labels"),
    ]
    lines += [("DPO optimum", ":", "exact optimum of DPO with β = α")]
    colors = (lab.BLUE, lab.RED, lab.ORANGE, lab.SKY)
    for o, (share, color, marker) in enumerate(zip(results["shares"], colors, "os^D", strict=True)):
        for name, style, label in lines:
            label = label if o == 0 else None
            axis.plot(ALPHAS, 100 * results[name].mean(1)[:, o], style, color=color, lw=1, label=label)
        points = {"fmt": marker, "color": color, "capsize": 2, "label": f"opinion of {share:.0%}"}
        axis.errorbar(ALPHAS, 100 * mean[:, o], 100 * error[:, o], **points)
        axis.plot([1.02, 1.15], [100 * share] * 2, color=color, lw=3)
    log_ticks(axis, ALPHAS)
    axis.set(xlabel="α (β = 0.1; DPO is α = 0.1)", ylabel="probability of the opinion, %")
    axis.set_title("At α = 1 each opinion gets its share (markers: trained; bars at the right: the people)")
    axis.legend()
    save_figure(figure, path)


def draw_calibration(results: dict[str, Any], path: Path) -> None:
    """Figure 4: ECE, Brier score and other texts against the temperature, for DPL and DPO."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9))
    shares, ratios = results["shares"], np.array(ALPHAS) / BETA
    panels = {
        "ece": ("calibration error of the favourite", "DPL's confidence becomes the share of the people"),
        "brier": ("Brier score, 0 to 2", "Its Brier score falls to the least possible"),
        "outside": ("other texts, share", "A hot token temperature writes other texts"),
    }
    ways = [("DPL", ratios, {"fmt": "o-", "color": lab.BLUE, "label": "DPL at α/β"})]
    dpo = {"fmt": "s--", "color": lab.ORANGE, "label": "DPO at token temperature t"}
    ways += [("DPO", TEMPERATURES, dpo)]
    for axis, (name, (label, title)) in zip(axes, panels.items(), strict=True):
        for way, x, style in ways:
            axis.errorbar(x, *scores(results[way], shares, name), capsize=2, ms=5, **style)
        if name != "outside":
            best = [evaluate_probs(p, shares)[name] for p in results["optimum"]]
            axis.plot(ratios, best, **lab.EXACT, label="optimum of DPL, exact")
            least = evaluate_probs(np.tile(shares, (len(results["reference"]), 1)), shares)[name]
            axis.axhline(least, color="0.6", lw=0.8, ls=":", label="the shares themselves")
        log_ticks(axis, (1, 2, 3, 5, 10))
        axis.set(title=title, xlabel="temperature: α/β, or t", ylabel=label)
    axes[0].legend()
    save_figure(figure, path)


def draw_coverage(results: dict[str, Any], path: Path) -> None:
    """Figures 3 and 7 to 9: coverage of the population and by opinion; lines are exact, markers samples."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.4))
    marks, shares = powers(MOST), results["shares"]
    panels = [(None, "A person drawn from the population: DPL passes DPO")]
    panels += [(0, f"A person of the {shares[0]:.0%} opinion: DPO is first")]
    panels += [(3, f"A person of the {shares[3]:.0%} opinion: DPL finds it")]
    ks, first = np.arange(1, MOST + 1), coverage(results, "DPO", None).mean(0)
    for axis, (opinion, title) in zip(axes[0], panels, strict=True):
        for name, (_, _, style) in COVERED.items():
            mean, error = mean_and_error(over_people(results["measured"][name], shares, opinion))
            axis.plot(ks, coverage(results, name, opinion).mean(0), color=style["color"], lw=1)
            axis.errorbar(marks, mean, error, ls="none", ms=5, capsize=2, label=name, **style)
        axis.plot(ks, best_temperature(results, opinion).mean(0), **lab.EXACT, label=BEST)
        axis.set(title=title, ylabel="their opinion is among N samples")
    relative, needed, closed = axes[1]
    for name, (_, _, style) in COVERED.items():
        curve, points = coverage(results, name, None).mean(0), {"markevery": [k - 1 for k in marks]}
        relative.plot(ks, curve / first, **style, **points)
        needed.plot(ks, samples_needed(curve, first), **style, **points)
    relative.set(title="Figure 8: relative to DPO, population", ylabel="coverage / DPO's")
    needed.set(title="Figure 9: a few samples reach what DPO does with N", yscale="log")
    needed.set(ylabel="samples for DPO's coverage")
    for axis in axes.flat[:5]:
        log_ticks(axis, marks)
        axis.set_xlabel("N of DPO, samples" if axis is needed else "N, samples")
    p = np.linspace(0, 1, 300)
    for k, line in zip((1, 4, 64), ("-", "--", ":"), strict=True):
        closed.plot(p, 1 - (1 - p) ** k, line, color="0.5", label=f"1 − (1 − p)^{k}")
        for name, (_, _, style) in COVERED.items():
            probs, seen = covered_probs(results, name), results["measured"][name][..., marks.index(k)]
            closed.plot(probs.ravel(), seen.ravel(), ls="none", ms=3, mfc="none", **style)
    closed.set(title="Figure 7: samples follow the closed form", xlabel="p, the opinion's probability")
    closed.set_ylabel("the opinion is among N samples")
    closed.legend()
    axes[0, 0].legend()
    save_figure(figure, path)


def main() -> None:
    """Train what is missing, evaluate, print the tables and draw the three pictures."""
    config = parse(PopulationConfig, __doc__)
    results = make_results(config)
    print_tables(results)
    lab.write_arrays(Path(config.out_dir) / "population.json", results)
    draw_shares(results, Path(config.pictures) / "population_shares.png")
    draw_calibration(results, Path(config.pictures) / "population_calibration.png")
    draw_coverage(results, Path(config.pictures) / "population_coverage.png")


if __name__ == "__main__":
    run_command(main)
