"""Diversity against quality: the DPL paper's Figure 2 on the embedded society, where the truth is known.

DPL is trained at eight values of alpha / beta. DPO is trained once and sampled at the paper's temperatures:
plain, and truncated by min-p, top-p and top-k (k is the paper's share of the vocabulary). One point is one
way to write stories:

    diversity   entropy of the distribution over the 1,024 well-formed stories, in bits, exact
                mean cosine distance of pairs of 500 samples, embedded by the reference's hidden states
    quality     expected utility of the well-formed stories for the raters, in nats, exact
                cross-entropy of all 500 samples to the reference, in nats per text (lower is better)
                share of well-formed stories, exact (at a global temperature: of the samples)

Three curves show what could be reached: the exact optimum of DPL's objective, DPO^(1/tau) over well-formed
stories, and DPO at global temperature tau by Sequential Monte Carlo after min-p 0.01, without training.

    python experiments/pareto.py        # 45 minutes on two cores; what is finished is kept
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

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.encode import encode_prompts
from common.files import write_json
from common.flags import Flags, flag, parse, run_command
from core.hub import load_model
from core.reference import score_completions
from data.society.truth import list_stories, optimum
from experiments import lab
from metrics.embedding import embed
from metrics.formulas import cosine_diversity, unit_vectors
from metrics.tables import mean_and_error, save_figure

BETA, RATIOS = 0.1, (1, 1.1, 1.2, 1.3, 1.5, 2, 4, 11)  # alpha / beta
# The two stories of a pair share most of their words, and the loss does not see the shared probability: large
# steps can break it. At twice this learning rate 5 of 24 runs forgot how a story ends.
TOP_K = 180 / 32000  # of the vocabulary
SAMPLED = {  # curve: temperatures of DPO and the truncation (DPL paper, section 4.1 and B.3)
    "DPO, token temperature": ((1, 1.1, 1.2, 1.3, 1.4, 1.5), {}),
    "DPO, min-p": ((1.3, 1.5, 2, 2.5, 3, 3.5, 4), {"min_p": 0.1}),
    "DPO, top-p": ((1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7), {"top_p": 0.9}),
    "DPO, top-k": ((1.1, 1.2, 1.3, 1.5, 2, 2.5), {"top_k": 0}),
}
DIVERSITIES = {  # name: (label, what utility shows at equal diversity)
    "entropy": ("entropy of well-formed stories, bits", "At equal entropy utility is nearly the same"),
    "cosine": ("mean cosine distance of 500 samples", "Broken stories are far from all others"),
}
QUALITIES = {  # name: (label, +1 if more is better, else -1)
    "utility": ("expected utility of the well-formed, nats", 1),
    "cross_entropy": ("cross-entropy to the reference,\nnats per text (reversed log axis)", -1),
    "well_formed": ("well-formed stories, %", 1),
}
STYLES = {  # curve: (line and marker, color)
    "DPL": ("o-", lab.BLUE),
    "DPO, token temperature": ("s--", lab.ORANGE),
    "DPO, min-p": ("^--", lab.RED),
    "DPO, top-p": ("v:", lab.RED),
    "DPO, top-k": ("x:", lab.ORANGE),
    "DPO, global temperature after min-p": ("D-.", lab.SKY),
    "DPO^(1/τ), exact": ("-", "0.7"),
    "optimum of DPL, exact": ("--", "0.8"),
}


@dataclass
class ParetoConfig(Flags):
    """Flags of experiments/pareto.py."""

    seeds: int = flag(3, "Training runs of each policy.", "[2, inf)")
    samples: int = flag(500, "Samples at each point; also the number of particles.", "[2, inf)")
    out_dir: str = flag("out/pareto", "Folder of the policies and of one file of results per seed.")
    out_file: str = flag("assets/pareto.png", "The picture; NAME_cosine.png is drawn beside it.")


def train_policies(config: ParetoConfig) -> None:
    """Train what is not finished; a finished run ends at once."""
    runs = [(seed, ratio) for seed in range(config.seeds) for ratio in RATIOS]
    for seed, ratio in tqdm(runs, desc="policies", unit="run", disable=None):
        flags = [*lab.TRAIN_STORIES, "--alpha", round(BETA * ratio, 6), "--seed", seed]
        lab.train("train_dpl.py", Path(config.out_dir) / f"dpl{ratio}-seed{seed}", *flags)


def evaluate_policies(config: ParetoConfig, seed: int) -> dict[str, list[dict[str, float]]]:
    """The points of every curve, {curve: [point]}, for the policies of one seed.

    A point holds "x" (temperature or alpha / beta) and the values that DIVERSITIES and QUALITIES name.
    """
    world = lab.read_world()
    stories, prompt = list_stories(world), world["story_prompt"]
    reference, tokenizer = load_model(lab.REFERENCE)
    prompt_ids = encode_prompts([prompt], tokenizer)
    rewards = lab.story_utilities(world)
    reference_logp = np.array(world["story_reference_logp"])
    directions = unit_vectors(embed(stories, str(lab.REFERENCE)))

    def exact(logp: np.ndarray) -> dict[str, float]:
        """Values over well-formed stories alone, from their log-probabilities (1024,) up to a constant."""
        p = optimum(logp, np.zeros_like(logp), 1.0, 1.0)  # exp(logp), normalised
        return {
            "entropy": float(-(p[p > 0] * np.log2(p[p > 0])).sum()),
            "utility": float(p @ rewards),
            "cosine": float(1 - np.square(p @ directions).sum()),
            "cross_entropy": float(-p @ reference_logp),
            "well_formed": 1.0,
        }

    def sampled(model: Any, logits: Any, tau: float | None = None, **params: float) -> dict[str, float]:
        """exact(), but cosine and cross-entropy are those of the sampled texts.

        well_formed is the exact probability, or at a global temperature the share of the samples.
        """
        options = {"seed": seed, "global_temperature": tau, **params}
        completions, texts = lab.sample_texts(model, tokenizer, prompt, config.samples, 48, **options)
        logp = lab.completion_logp(*logits, **params).numpy()
        point = exact(logp / (tau or 1))
        is_story = [text in stories for text in texts]
        point["well_formed"] = float(np.exp(logp).sum() if tau is None else np.mean(is_story))
        vectors = embed([text for text in texts if text], str(lab.REFERENCE))  # an empty one has none
        point["cosine"] = cosine_diversity(vectors, distinct=True)
        nats = -score_completions(reference, prompt_ids * len(texts), [c.tokens for c in completions])
        return point | {"cross_entropy": nats.mean()}

    curves: dict[str, list[dict[str, float]]] = {"DPL": []}
    for ratio in RATIOS:
        model, _ = load_model(Path(config.out_dir) / f"dpl{ratio}-seed{seed}")
        logits = lab.completion_logits(model, tokenizer, prompt, stories)
        curves["DPL"].append({"x": ratio} | sampled(model, logits))
        if ratio == 1:
            dpo, dpo_logits = model, logits
    for curve, (temperatures, params) in SAMPLED.items():
        if "top_k" in params:
            params = {"top_k": max(2, round(TOP_K * len(tokenizer)))}
        curves[curve] = [{"x": t} | sampled(dpo, dpo_logits, temperature=t, **params) for t in temperatures]
    curves["DPO, global temperature after min-p"] = [
        {"x": tau} | sampled(dpo, dpo_logits, tau, **lab.MIN_P) for tau in RATIOS
    ]
    logp, grid = lab.completion_logp(*dpo_logits).numpy(), np.geomspace(1, 11, 25).tolist()
    curves["DPO^(1/τ), exact"] = [{"x": tau} | exact(logp / tau) for tau in grid]
    curves["optimum of DPL, exact"] = [
        {"x": tau} | exact(np.log(optimum(reference_logp, rewards, BETA * tau, BETA))) for tau in grid
    ]
    return curves


def results_by_seed(config: ParetoConfig) -> list[dict[str, list[dict[str, float]]]]:
    """evaluate_policies() for every seed; finished ones are read from <out_dir>/seed<N>.json."""
    results = []
    for seed in tqdm(range(config.seeds), desc="evaluation", unit="seed", disable=None):
        path = Path(config.out_dir) / f"seed{seed}.json"
        saved = json.loads(path.read_text()) if path.is_file() else {}
        if saved.get("samples") != config.samples:
            saved = {"samples": config.samples, "curves": evaluate_policies(config, seed)}
            write_json(path, saved)
        results.append(saved["curves"])
    return results


def column(curve: list[dict[str, float]], name: str) -> np.ndarray:
    """One value of every point of a curve, (points,)."""
    return np.array([point[name] for point in curve])


def gaps(results: list[dict[str, Any]], curve: str, diversity: str, quality: str) -> np.ndarray:
    """DPL's quality minus that of each point of `curve` at equal diversity, (seeds, points), + is better.

    DPL's curve is interpolated linearly; nan where the point's diversity is outside its range.
    """
    rows = []
    for curves in results:
        x, y = (column(curves["DPL"], name) for name in (diversity, quality))
        order = x.argsort()
        at = column(curves[curve], diversity)
        dpl = np.interp(at, x[order], y[order], left=math.nan, right=math.nan)
        rows.append(QUALITIES[quality][1] * (dpl - column(curves[curve], quality)))
    return np.array(rows)


def print_tables(results: list[dict[str, Any]]) -> None:
    """Print every curve, mean and standard error over seeds, and DPL's lead at equal diversity."""
    names = [*DIVERSITIES, *QUALITIES]
    for curve in STYLES:
        print(f"\n{curve:36}" + "".join(f"{name:>17}" for name in names))
        for i in range(0, len(results[0][curve]), 1 if "exact" not in curve else 8):
            values = np.array([[curves[curve][i][name] for name in names] for curves in results])
            cells = (f"{m:9.3f} ± {e:5.3f}" for m, e in zip(*mean_and_error(values), strict=True))
            print(f"  {results[0][curve][i]['x']:<34.4g}" + "".join(f"{cell:>17}" for cell in cells))
    print("\nDPL's lead in quality at equal diversity, per point of the other curve: + DPL is better by two")
    print("standard errors (82% sure with 3 seeds), - worse, = neither, . DPL does not have this diversity")
    for curve in SAMPLED:
        for diversity in DIVERSITIES:
            marks = []
            for quality in QUALITIES:
                lead, error = mean_and_error(gaps(results, curve, diversity, quality))
                signs = np.select([np.isnan(lead), lead > 2 * error, lead < -2 * error], [".", "+", "-"], "=")
                marks.append(f"{quality} {''.join(signs)}")
            print(f"{curve:24} by {diversity:8}", "   ".join(marks))


def draw(results: list[dict[str, Any]], diversity: str, path: Path) -> None:
    """Draw each quality against one of DIVERSITIES; bars are standard errors over seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 5))
    for axis, (quality, (ylabel, sign)) in zip(axes, QUALITIES.items(), strict=True):
        for curve, (style, color) in STYLES.items():
            is_exact = "exact" in curve
            if is_exact and quality == "well_formed":
                continue  # 100% by construction
            x, y = (np.array([column(c[curve], n) for c in results]) for n in (diversity, quality))
            y = 100 * y if quality == "well_formed" else y
            bars = [None if is_exact else mean_and_error(v)[1] for v in (y, x)]
            options = {"color": color, "label": curve, "ms": 5} | (
                {"lw": 2, "zorder": 1} if is_exact else {"lw": 1.3}
            )
            axis.errorbar(x.mean(0), y.mean(0), *bars, fmt=style, elinewidth=0.8, **options)
        axis.set(xlabel=DIVERSITIES[diversity][0], ylabel=ylabel)
        if sign < 0:
            axis.set_yscale("log")
            axis.invert_yaxis()
    axes[0].set_title(DIVERSITIES[diversity][1])
    axes[1].set_title("DPL's diverse stories stay likely under the reference")
    axes[2].set_title("DPL's diverse stories are well-formed")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10)
    figure.suptitle("Stories about a doctor: diversity (right is more) against quality (up is better)")
    save_figure(figure, path)


def main() -> None:
    """Train what is missing, evaluate it, print the tables and draw the picture."""
    config = parse(ParetoConfig, __doc__)
    train_policies(config)
    with torch.no_grad():
        results = results_by_seed(config)
    print_tables(results)
    path = Path(config.out_file)
    draw(results, "entropy", path)
    draw(results, "cosine", path.with_name(f"{path.stem}_cosine.png"))


if __name__ == "__main__":
    run_command(main)
