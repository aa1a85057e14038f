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

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common.encode import decode_continuation, encode_answers, encode_prompts
from common.files import write_json
from common.flags import Flags, flag, parse, run_command
from common.rows import read_pairs
from data.society.truth import WORLD, optimum
from experiments.doctor import REFERENCE, run
from experiments.temperature import story_logits, story_logp
from hub import load_model
from metrics.answers import powers, samples_needed
from metrics.formulas import pass_at_k
from metrics.tables import mean_and_error
from sample import draw_seed, sample

BETA, ALPHAS = 0.1, (0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # token temperatures of DPO
DATA = "data/society/polls.jsonl.gz"
TRAIN = ["@recipes/society.txt", "--data", DATA, "--lora_rank", 0]
TRAIN += ["--lr", 5e-4, "--batch_size", 64, "--epochs", 8]
COVERED = {  # policies of the third picture: (alpha, token temperature, marker)
    "DPO": (0.1, 1.0, "o"),
    "DPL, α/β = 2": (0.2, 1.0, "s"),
    "DPL, α/β = 10": (1.0, 1.0, "^"),
    "DPO at token temperature 3": (0.1, 3.0, "x"),
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
        [ids], opinions = encode_prompts([prompt], tokenizer), list(poll["shares"])
        logits = story_logits(model, ids, encode_answers([prompt] * len(opinions), opinions, tokenizer))
        rows.append(story_logp(*logits, temperature=temperature).exp().tolist())
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
    model: Any,
    tokenizer: Any,
    polls: dict[str, dict],
    config: PopulationConfig,
    temperature: float,
    seed: int = 0,
) -> np.ndarray:
    """Chance that each opinion is among N samples, (polls, 4, len(powers(MOST))), estimated by pass_at_k."""
    rows = []
    generator = torch.Generator().manual_seed(seed)
    for prompt, poll in polls.items():
        [ids] = encode_prompts([prompt], tokenizer)
        params = {"temperature": temperature, "seed": draw_seed(generator)}
        drawn = sample(model, ids, config.samples, 16, tokenizer.eos_token_id, **params)
        texts = [decode_continuation(c.tokens[:-1], tokenizer) for c in drawn if c.finish == "eos"]
        counts = [texts.count(opinion) for opinion in poll["shares"]]
        rows.append([[pass_at_k(config.samples, c, k) for k in powers(MOST)] for c in counts])
    return np.array(rows)


def make_results(config: PopulationConfig) -> dict[str, Any]:
    """Train what is missing; returns opinion probabilities by policy, each (seeds, settings, polls, 4).

    "DPL" is at each of ALPHAS and "DPO" at each of TEMPERATURES. Without the axis of seeds: "optimum" and
    "label optimum" of DPL, "DPO optimum" with beta = alpha, all (alphas, polls, 4), and "reference" (polls,
    4). "measured" maps the names of COVERED to (seeds, polls, 4, numbers of samples).
    """
    polls = json.loads(WORLD.read_text())["polls"]
    results: dict[str, Any] = {"DPL": [], "DPO": [], "measured": {name: [] for name in COVERED}}
    for seed in range(config.seeds):
        folders = {a: Path(config.out_dir).resolve() / f"alpha{a}-seed{seed}" for a in ALPHAS}
        for alpha, folder in tqdm(folders.items(), desc=f"policies, seed {seed}", disable=None):
            if not (folder / "config.json").is_file():
                flags = ["--alpha", alpha, "--seed", seed, "--resume", "--out_dir", folder]
                run("train_dpl.py", *TRAIN, *flags)
        with torch.no_grad():
            models = {alpha: load_model(folder) for alpha, folder in folders.items()}
            results["DPL"].append([opinion_probs(*models[alpha], polls, 1.0) for alpha in ALPHAS])
            results["DPO"].append([opinion_probs(*models[BETA], polls, t) for t in TEMPERATURES])
            for name, (alpha, t, _) in COVERED.items():
                results["measured"][name].append(measured_coverage(*models[alpha], polls, config, t, seed))
    shares = [np.array(list(poll["shares"].values())) for poll in polls.values()]
    logp = [np.array(poll["reference_logp"]) for poll in polls.values()]
    constant, labels = [BETA] * len(ALPHAS), fit_labels(polls)
    for name, betas, weights in (
        ("optimum", constant, shares),
        ("label optimum", constant, labels),
        ("DPO optimum", ALPHAS, shares),
    ):
        results[name] = [
            [optimum(r, np.log(w), alpha, beta) for r, w in zip(logp, weights, strict=True)]
            for alpha, beta in zip(ALPHAS, betas, strict=True)
        ]
    results["reference"] = opinion_probs(*load_model(REFERENCE), polls, 1.0)
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
    print(
        f"{'':34}"
        + "".join(f"{s:>10.0%}" for s in shares)
        + "       shares      ECE            Brier    outside"
    )
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
    for opinion, title in [
        (None, "a person drawn from the population"),
        (3, "a person of the rarest opinion"),
    ]:
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


def draw_shares(results: dict[str, Any], path: Path) -> None:
    """Corollary 3.1: the probability of each opinion against alpha, over the exact optimum."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    mean, error = mean_and_error((results["DPL"] / results["DPL"].sum(-1, keepdims=True)).mean(2))
    lines = [
        ("optimum", "-", "exact optimum"),
        ("label optimum", "--", "optimum for the random labels of the data"),
    ]
    lines += [("DPO optimum", ":", "exact optimum of DPO with β = α")]
    for o, (share, marker) in enumerate(zip(results["shares"], "os^D", strict=True)):
        grey = str(0.15 * o)
        for name, style, label in lines:
            label = label if o == 0 else None
            axis.plot(ALPHAS, 100 * results[name].mean(1)[:, o], style, color=grey, lw=1, label=label)
        label = f"opinion of {share:.0%}"
        axis.errorbar(
            ALPHAS, 100 * mean[:, o], 100 * error[:, o], fmt=marker, color=grey, capsize=2, label=label
        )
        axis.plot([1.02, 1.15], [100 * share] * 2, color=grey, lw=3)
    axis.set_xscale("log")
    axis.set_xticks(ALPHAS, [f"{a:g}" for a in ALPHAS], minor=False)
    axis.set_xticks([], minor=True)
    axis.set(xlabel="α (β = 0.1; DPO is α = 0.1)", ylabel="probability of the opinion, %")
    axis.set_title("Markers: trained. Bars at the right: the population", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def draw_calibration(results: dict[str, Any], path: Path) -> None:
    """Figure 4: ECE, Brier score and other texts against the temperature, for DPL and DPO."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    shares = results["shares"]
    titles = {
        "ece": "calibration error of the favourite",
        "brier": "Brier score, 0 to 2",
        "outside": "other texts, share",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for probs, x, style, label in (
            (results["DPL"], np.array(ALPHAS) / BETA, "o-", "DPL at α/β"),
            (results["DPO"], TEMPERATURES, "s--", "DPO at token temperature t"),
        ):
            mean, error = scores(probs, shares, name)
            grey = "black" if probs is results["DPL"] else "0.5"
            axis.errorbar(x, mean, error, fmt=style, color=grey, capsize=2, ms=5, label=label)
        if name != "outside":
            best = [evaluate_probs(p, shares)[name] for p in results["optimum"]]
            axis.plot(
                np.array(ALPHAS) / BETA, best, color="0.75", lw=4, zorder=0, label="optimum of DPL, exact"
            )
            least = evaluate_probs(np.tile(shares, (len(results["reference"]), 1)), shares)[name]
            axis.axhline(least, color="0.6", lw=0.8, ls=":", label="the shares themselves")
        axis.set_xscale("log")
        axis.set_xticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
        axis.set_xticks([], minor=True)
        axis.set(xlabel="temperature: α/β, or t", ylabel=title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def draw_coverage(results: dict[str, Any], path: Path) -> None:
    """Figures 3 and 7 to 9: coverage of the population and by opinion; lines are exact, markers samples."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.4), layout="constrained")
    ks, marks, shares = np.arange(1, MOST + 1), powers(MOST), results["shares"]
    panels = [("a person drawn from the population", None)]
    panels += [(f"a person of the {shares[o]:.0%} opinion", o) for o in (0, 3)]
    for axis, (title, opinion) in zip(axes.flat, panels, strict=False):
        for i, (name, (_, _, marker)) in enumerate(COVERED.items()):
            mean, error = mean_and_error(over_people(results["measured"][name], shares, opinion))
            axis.plot(ks, coverage(results, name, opinion).mean(0), color=str(0.2 * i), lw=1)
            axis.errorbar(marks, mean, error, fmt=marker, color=str(0.2 * i), ms=5, capsize=2, label=name)
        best = best_temperature(results, opinion).mean(0)
        axis.plot(ks, best, color="0.8", lw=5, zorder=0, label=BEST)
        axis.set(title=title, ylabel="their opinion is among N samples")
    first = coverage(results, "DPO", None).mean(0)
    for i, (name, (_, _, marker)) in enumerate(COVERED.items()):
        curve = coverage(results, name, None).mean(0)
        for axis, values in ((axes[1, 0], curve / first), (axes[1, 1], samples_needed(curve, first))):
            axis.plot(ks, values, color=str(0.2 * i), marker=marker, markevery=[k - 1 for k in marks])
    axes[1, 0].set(title="relative to DPO, population (Figure 8)", ylabel="coverage / DPO's")
    axes[1, 1].set(
        title="samples needed for DPO's coverage (Figure 9)",
        ylabel="samples",
        yscale="log",
        xlabel="N of DPO",
    )
    for axis in axes.flat[:5]:
        axis.set_xscale("log", base=2)
        axis.set_xticks(marks, list(map(str, marks)))
        axis.set_xlabel(axis.get_xlabel() or "N, samples")
    p = np.linspace(0, 1, 300)
    for k, style in zip((1, 4, 64), ("-", "--", ":"), strict=True):
        axes[1, 2].plot(p, 1 - (1 - p) ** k, style, color="0.5", label=f"1 − (1 − p)^{k}")
        for name, (_, _, marker) in COVERED.items():
            probs, seen = covered_probs(results, name), results["measured"][name][..., marks.index(k)]
            axes[1, 2].plot(probs.ravel(), seen.ravel(), marker, color="black", ms=3, mfc="none")
    axes[1, 2].set(title="measured over the closed form (Figure 7)", xlabel="p, the opinion's probability")
    axes[1, 2].legend(frameon=False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train what is missing, evaluate, print the tables and draw the three pictures."""
    config = parse(PopulationConfig, __doc__)
    results = make_results(config)
    print_tables(results)
    as_lists = {
        k: {n: v.tolist() for n, v in x.items()} if isinstance(x, dict) else x.tolist()
        for k, x in results.items()
    }
    write_json(Path(config.out_dir) / "population.json", as_lists)
    Path(config.pictures).mkdir(parents=True, exist_ok=True)
    for name, function in (
        ("shares", draw_shares),
        ("calibration", draw_calibration),
        ("coverage", draw_coverage),
    ):
        path = Path(config.pictures) / f"population_{name}.png"
        function(results, path)
        print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
