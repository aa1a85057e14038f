"""Does a policy speak for the population? The DPL paper's corollary 3.1, calibration and best-of-N, on polls.

55, 20, 15 and 10% of the society hold the four opinions of each poll. A policy trained on its preferences has

    pi  proportional to  pi_ref^(beta/alpha) * share^(1/alpha)                             (proposition 3.2)

so with beta = 0.1, alpha from 0.1 (DPO) up to 1 should lead from a landslide of the majority to the shares.
Three claims, each with a picture, for DPL and for DPO at a token temperature:

    shares       corollary 3.1: at alpha = 1 the policy's probabilities are the shares
    calibration  Figure 4: the policy's confidence in an opinion is the share of people who hold it
    coverage     Figures 3, 7 to 9: a person drawn from the population finds the own opinion in N samples

A person with opinion o does with the chance 1 - (1 - pi(o))^N. The rarer the opinion, the harder.
All probabilities are exact; only the measured points of coverage are from samples.

    python experiments/population.py       # 18 short runs; finished training runs are kept
"""

import json
import math
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

from best_of_n import powers, samples_needed
from data.society.truth import optimum
from decode import decode_continuation
from evaluate import WORLD
from experiments.doctor import REFERENCE, run
from experiments.temperature import story_logits, story_logp
from files import flag, parse, require, run_command, write_json
from metrics import brier_score, expected_calibration_error, pass_at_k
from model import load_model
from preferences import encode_answers, encode_prompts
from sample import sample

BETA, ALPHAS = 0.1, (0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # token temperatures of DPO
TRAIN = ["@recipes/society.txt", "--data", "data/society/polls.jsonl.gz", "--lora_rank", 0]
TRAIN += ["--lr", 5e-4, "--batch_size", 64, "--epochs", 8]
COVERED = {  # policies of the third picture: (alpha, token temperature, marker)
    "DPO": (0.1, 1.0, "o"),
    "DPL, α/β = 2": (0.2, 1.0, "s"),
    "DPL, α/β = 10": (1.0, 1.0, "^"),
    "DPO at token temperature 3": (0.1, 3.0, "x"),
}
MOST = 128  # samples per person


@dataclass
class PopulationConfig:
    """Flags of experiments/population.py."""

    seeds: int = flag(3, "Training runs of each policy.")
    samples: int = flag(1024, "Samples per poll and policy, for the measured points of coverage.")
    out_dir: str = flag("out/population", "Folder of the policies and of population.json.")
    pictures: str = flag("assets", "Folder of the three pictures.")

    def __post_init__(self) -> None:
        require(self, "seeds", self.seeds >= 2, "at least 2")
        require(self, "samples", self.samples >= MOST, f"at least {MOST}")


def opinion_probs(model: Any, tokenizer: Any, polls: dict[str, dict], temperature: float) -> np.ndarray:
    """Probability of each poll's opinions at a token temperature, (polls, 4); what is left is other texts."""
    rows = []
    for prompt, poll in polls.items():
        [ids], opinions = encode_prompts([prompt], tokenizer), list(poll["shares"])
        logits = story_logits(model, ids, encode_answers([prompt] * len(opinions), opinions, tokenizer))
        rows.append(story_logp(*logits, temperature=temperature).exp().tolist())
    return np.array(rows)


def evaluate_probs(probs: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    """Calibration of normalised probabilities (polls, 4) as forecasts of a person's opinion, and `outside`.

    Every poll is put to 100 people, whose opinions have exactly the shares (4,), whole percents.
    """
    people = np.tile(np.repeat(np.arange(len(shares)), np.round(100 * shares).astype(int)), len(probs))
    forecast = np.repeat(probs / probs.sum(1, keepdims=True), 100, axis=0)
    return {
        "tv": abs(probs / probs.sum(1, keepdims=True) - shares).sum(1).mean() / 2,
        "ece": expected_calibration_error(forecast.max(1), forecast.argmax(1) == people),
        "brier": brier_score(forecast, people),
        "outside": 1 - probs.sum(1).mean(),
    }


def measured_coverage(
    model: Any, tokenizer: Any, polls: dict[str, dict], config: PopulationConfig, temperature: float
) -> np.ndarray:
    """Chance that each opinion is among N samples, (polls, 4, len(powers(MOST))), estimated by pass_at_k."""
    rows = []
    for prompt, poll in polls.items():
        [ids] = encode_prompts([prompt], tokenizer)
        generator = torch.Generator().manual_seed(0)
        drawn = sample(
            model,
            ids,
            config.samples,
            16,
            tokenizer.eos_token_id,
            temperature=temperature,
            generator=generator,
        )
        texts = [decode_continuation(c.tokens[:-1], tokenizer) for c in drawn if c.finish == "eos"]
        counts = [texts.count(opinion) for opinion in poll["shares"]]
        rows.append([[pass_at_k(config.samples, c, k) for k in powers(MOST)] for c in counts])
    return np.array(rows)


def make_results(config: PopulationConfig) -> dict[str, Any]:
    """Train what is missing; returns probabilities {"DPL": (seeds, alphas, polls, 4), "DPO": ..., "optimum"}.

    "DPO" is at each of TEMPERATURES; "measured" maps COVERED to (seeds, polls, 4, numbers of samples).
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
                results["measured"][name].append(measured_coverage(*models[alpha], polls, config, t))
    shares = [np.array(list(poll["shares"].values())) for poll in polls.values()]
    logp = [np.array(poll["reference_logp"]) for poll in polls.values()]
    results["optimum"] = [
        [optimum(r, np.log(s), alpha, BETA) for r, s in zip(logp, shares, strict=True)] for alpha in ALPHAS
    ]
    results["reference"] = opinion_probs(*load_model(REFERENCE), polls, 1.0)
    results["shares"] = shares[0]
    results["measured"] = {name: np.array(rows) for name, rows in results["measured"].items()}
    return {name: x if isinstance(x, dict) else np.array(x) for name, x in results.items()}


def mean_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the first axis, which is seeds, and its standard error, which is 0 for a single seed."""
    single = len(values) == 1
    return values.mean(0), values.std(0, ddof=0 if single else 1) / math.sqrt(len(values))


def scores(probs: np.ndarray, shares: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and error over seeds of one of evaluate_probs' values; `probs` is (seeds, settings, polls, 4)."""
    return mean_error(np.array([[evaluate_probs(p, shares)[name] for p in seed] for seed in probs]))


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
    rows += [(f"optimum, alpha {a:g}", results["optimum"][None, i]) for i, a in enumerate(ALPHAS)]
    rows += [(f"DPO, token temperature {t:g}", results["DPO"][:, i]) for i, t in enumerate(TEMPERATURES)]
    for label, probs in [("reference", results["reference"][None]), *rows]:
        share = (probs / probs.sum(-1, keepdims=True)).mean((0, 1))
        line = f"{label:34}" + "".join(f"{x:10.3f}" for x in share)
        for name in ("tv", "ece", "brier", "outside"):
            mean, error = scores(probs[:, None], shares, name)
            line += f"  {mean[0]:.3f} ± {error[0]:.3f}"
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


def covered_probs(results: dict[str, Any], name: str) -> np.ndarray:
    """Opinion probabilities of a policy of COVERED, (seeds, polls, 4)."""
    alpha, t, _ = COVERED[name]
    return results["DPL"][:, ALPHAS.index(alpha)] if t == 1 else results["DPO"][:, TEMPERATURES.index(t)]


def over_people(values: np.ndarray, shares: np.ndarray, opinion: int | None) -> np.ndarray:
    """Mean of (seeds, polls, 4, n) over polls, for one opinion or a person drawn from the population."""
    return values.mean(1).swapaxes(1, 2) @ (shares if opinion is None else np.eye(len(shares))[opinion])


def coverage(results: dict[str, Any], name: str, opinion: int | None) -> np.ndarray:
    """Exact chance that N samples of a policy of COVERED cover a person, (seeds, MOST), mean over polls.

    The person holds opinion number `opinion`, or is drawn from the population.
    """
    hit = 1 - (1 - covered_probs(results, name)[..., None]) ** np.arange(1, MOST + 1)
    return over_people(hit, results["shares"], opinion)


def draw_shares(results: dict[str, Any], path: Path) -> None:
    """Corollary 3.1: the probability of each opinion against alpha, over the exact optimum."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    mean, error = mean_error((results["DPL"] / results["DPL"].sum(-1, keepdims=True)).mean(2))
    optimum_ = results["optimum"].mean(1)
    for o, (share, marker) in enumerate(zip(results["shares"], "os^D", strict=True)):
        grey = str(0.15 * o)
        axis.plot(ALPHAS, 100 * optimum_[:, o], color=grey, lw=1)
        label = f"opinion of {share:.0%}"
        axis.errorbar(
            ALPHAS, 100 * mean[:, o], 100 * error[:, o], fmt=marker, color=grey, capsize=2, label=label
        )
        axis.plot([1.02, 1.15], [100 * share] * 2, color=grey, lw=3)
    axis.set_xscale("log")
    axis.set_xticks(ALPHAS, [f"{a:g}" for a in ALPHAS], minor=False)
    axis.set_xticks([], minor=True)
    axis.set(xlabel="α (β = 0.1; DPO is α = 0.1)", ylabel="probability of the opinion, %")
    axis.set_title("Lines: exact optimum. Bars at the right: the population", fontsize=10, loc="left")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def draw_calibration(results: dict[str, Any], path: Path) -> None:
    """Figure 4: ECE, Brier score and other texts against the temperature, for DPL and DPO."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    shares = results["shares"]
    titles = {
        "ece": "expected calibration error",
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
            mean, error = mean_error(over_people(results["measured"][name], shares, opinion))
            axis.plot(ks, coverage(results, name, opinion).mean(0), color=str(0.2 * i), lw=1)
            axis.errorbar(marks, mean, error, fmt=marker, color=str(0.2 * i), ms=5, capsize=2, label=name)
        axis.set(title=title, ylabel="finds the own opinion among N")
    first = coverage(results, "DPO", None).mean(0)
    for i, name in enumerate(COVERED):
        curve = coverage(results, name, None).mean(0)
        axes[1, 0].plot(
            ks, curve / first, color=str(0.2 * i), marker=COVERED[name][2], markevery=[k - 1 for k in marks]
        )
        needed = samples_needed(curve, first)
        axes[1, 1].plot(
            ks, needed, color=str(0.2 * i), marker=COVERED[name][2], markevery=[k - 1 for k in marks]
        )
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
