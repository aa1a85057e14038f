"""A real language model: does DPL do on open text what it says?

SmolLM2-135M, at token temperature 0.6, writes a sentence about a person (real_texts.py has the prompts and
the raters). Policies are trained on 600 rankings of eight of its sentences (train_dpl.py; every two of a
ranking are a pair: 16,800, not independent), or on the raters' utility itself (train_rl.py: 40 steps of 64
texts of its own, half as many, but it knows their utility, where choices are random), and sampled.

    DPO, larger beta    the other way to stay diverse: DPL's alpha for both weights
    DPO, sampled hotter at a token temperature, with min-p or top-p, or at a global temperature after min-p.
                        The last is sequential Monte Carlo: "effective texts" says how few it rests on
    DPL per token       --length_normalize averages log-probabilities over tokens, so a longer text has no
                        larger margin before training; both weights are multiplied by the 24 tokens of a
                        text. Its optimum is another: pi_ref^(beta / alpha) exp(tokens (u + c) / alpha), with
                        a constant c of the prompt

The truth. For alpha = beta, the optimum is pi_ref exp(u / beta) / Z: the reference's own sentences, weighted
by exp(u / beta). A policy's KL to it is (the highest J - its own J) / alpha. For alpha > beta, the weights
have pi_ref^(beta / alpha - 1) in them too, and a few unlikely sentences outweigh all others, above all long
ones: each further token multiplies the number of texts. So that optimum is unknown.

Another population chooses between a sentence about her and one about him: 62% want her, 38% him. Nothing says
how it likes one without a pronoun.

    python experiments/real.py --model SMOLLM2 --embedder MINILM       # 3 to 10 hours on two cores
    python experiments/real.py --model SMOLLM2 --rankings 120 --rl_steps 20 --seeds 1 --samples 32 \
        --out_dir out/short --out_file out/short.png                       # an hour

What is finished is kept: the same command goes on where it was stopped. real_settings.py tries what helps
DPL on pairs.
"""

import gc
import itertools
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_dpl
import train_rl
from common.encode import encode_rows
from common.flags import parse, run_command
from common.rows import read_prompts, read_rows
from core.model import Stats
from core.trainer import train
from experiments import lab
from experiments.real_texts import (
    BETA,
    HALVES,
    HALVES_BETA,
    LEARNING,
    MANY,
    RANKED,
    RATIOS,
    TOKENS,
    VALUES,
    RealConfig,
    Results,
    half_utility,
    known_words,
    measure,
    measure_texts,
    open_folder,
    over_prompts,
    print_table,
    slug,
    utility,
    write_prompts,
    write_rankings,
    write_reference,
    write_texts,
)
from metrics.tables import save_figure
from train_dpl import DPLConfig


def weights(ratio: float, beta: float = BETA) -> dict[str, object]:
    """The flags of alpha = ratio * beta."""
    return {"--alpha": f"{ratio * beta:g}", "--beta": f"{beta:g}"}


def per_token(ratio: float) -> dict[str, object]:
    """The same for log-probabilities averaged over tokens: a text has about TOKENS."""
    return {"--length_normalize": True} | weights(ratio, TOKENS * BETA)


POPULATIONS = {"one": (utility, BETA), "halves": (half_utility, HALVES_BETA)}
OPTIMUM = {"one": "optimum, α = β", "halves": "halves: optimum, α = β"}
DPO_RATIOS = (2, 4)  # DPO with a larger beta, in place of a larger alpha
PER_TOKEN_RATIOS = (1, 2, 4)
RL_RATIOS = (1, 1.5, 2)  # at 2 its texts are cut at the limit already
POLICIES = {  # name: (whose rankings it is trained on, or "rl"; flags)
    **{f"DPL, α/β = {x}" if x > 1 else "DPO": ("one", weights(x)) for x in RATIOS},
    **{f"DPL per token, α/β = {x}": ("one", per_token(x)) for x in PER_TOKEN_RATIOS},
    **{f"RL, α/β = {x}": ("rl", weights(x)) for x in RL_RATIOS},
    **{f"DPO, β = {x * BETA:g}": ("one", weights(1, x * BETA)) for x in DPO_RATIOS},
    "halves: DPO": ("halves", weights(1, HALVES_BETA)),
    "halves: DPL, α/β = 4": ("halves", weights(4, HALVES_BETA)),
}
SEEDS = ("DPO", "DPL, α/β = 2", "DPL per token, α/β = 2")  # trained with every seed, the others with one
COMPARED = ("DPO", "DPL per token, α/β = 2", "DPL per token, α/β = 4")  # others' differences are printed
SAMPLED = {  # way: how DPO is sampled besides plainly, {setting: options of write_texts()}
    "token temperature": {t: {"temperature": t} for t in (1.25, 1.5, 2)},
    "min-p": {t: {"temperature": t, "min_p": 0.1} for t in (1.5, 2, 3)},
    "top-p": {t: {"temperature": t, "top_p": 0.9} for t in (1.25, 1.5, 2)},
    "global temperature": {t: {"global_temperature": t, "min_p": 0.01, "particles": 128} for t in (1.5, 2)},
}


# ---- policies


def list_runs(config: RealConfig) -> list[tuple[str, int, Path]]:
    """(name, seed, folder) of every policy."""
    seeds = {name: range(config.seeds if name in SEEDS else 1) for name in POLICIES}
    return [(n, s, Path(config.out_dir, f"{slug(n)}-seed{s}")) for n, some in seeds.items() for s in some]


def run_flags(config: RealConfig, folder: Path, flags: dict[str, object]) -> list[str]:
    """The words of a training command: what all share, and `flags`."""
    flags = LEARNING | {"--model": Path(config.out_dir, "reference"), "--out_dir": folder} | flags
    return [*map(str, lab.flag_words(flags)), "--resume"]


def train_on_rankings(
    config: RealConfig,
    folder: Path,
    files: tuple[Path, Path],
    flags: dict[str, object],
) -> None:
    """Train a policy on `files` of rankings, to train on and held out, unless `folder` has it."""
    if not lab.is_finished(folder):
        flags = {"--data": files[0], "--eval_data": files[1], "--batch_size": 8, "--eval_every": 25} | flags
        run = parse(DPLConfig, None, run_flags(config, folder, flags))
        train(run, partial(ranking_objective, config=run), load=load_rankings)
        gc.collect()  # a model that was trained refers to itself


def train_by_rl(config: RealConfig, folder: Path, prompts: Path, flags: dict[str, object]) -> None:
    """Train a policy on its own texts, eight for each of all prompts in a step, unless `folder` has it."""
    if not lab.is_finished(folder):
        size = {"--batch_size": sum(1 for _ in read_rows(prompts)), "--num_samples": RANKED}
        flags = {"--data": prompts, "--max_new_tokens": config.max_new_tokens} | size | flags
        train_rl.train(parse(train_rl.RLConfig, None, run_flags(config, folder, flags)), reward)
        gc.collect()


def load_rankings(path: str, tokenizer: Any, max_length: int, _chat: bool) -> list[list[Sequence[int]]]:
    """Examples (prompt, best text, ..., worst text), as token ids."""
    rows = [{"prompt": row["prompt"], **dict(enumerate(row["ranking"]))} for _, row in read_rows(path)]
    return encode_rows(rows, ("prompt", *range(RANKED)), tokenizer, max_length)[0]


def ranking_objective(policy: Stats, reference: Stats, *, config: DPLConfig) -> dict[str, Tensor]:
    """DPL's loss and accuracy, as means over the 28 pairs of each ranking, (rankings,)."""
    pairs = torch.combinations(torch.arange(RANKED))  # (better, worse)
    split = (Stats(*(x[:, pairs].flatten(0, 1) for x in stats[:2])) for stats in (policy, reference))
    values = train_dpl.objective(*split, config=config)
    values = {"loss": values["loss"], "accuracy": (values["reward_margin"] > 0).float()}
    return {name: x.view(len(policy.logp), -1).mean(1) for name, x in values.items()}


def reward(rows: list[dict[str, Any]], texts: list[str]) -> list[float]:
    """The raters' utility, as train_rl.py asks for it."""
    return [utility(text) for text in texts]


def make_results(config: RealConfig) -> Results:
    """Train and sample what is missing; returns measure() of each policy's prompts, (seeds, prompts).

    So do the known optima, whose names are in OPTIMUM.
    """
    path = write_prompts(config)
    prompts, folder = [row["prompt"] for row in read_prompts(path)], write_reference(config)
    plain = write_texts(config, MANY, folder, prompts, config.reference_samples, seed=99)
    rankings = {name: write_rankings(config, name, prompts, plain, u) for name, (u, _) in POPULATIONS.items()}
    for name, seed, run in tqdm(list_runs(config), desc="policies", unit="run", disable=None):
        learns, flags = POLICIES[name]
        flags = flags | {"--seed": seed}
        if learns == "rl":
            train_by_rl(config, run, path, flags | {"--max_steps": config.rl_steps})
        else:
            train_on_rankings(config, run, rankings[learns], flags)
    known = known_words(plain)

    results: Results = {}
    for population, (u, beta) in POPULATIONS.items():
        tilts = [np.array([u(row["text"]) for row in rows]) / beta for rows in plain]
        values = [measure(rows, known, tilt) for rows, tilt in zip(plain, tilts, strict=True)]
        results[OPTIMUM[population]] = [values]
    runs = [("reference", 0, folder, {}), *((*run, {}) for run in list_runs(config))]
    dpo = Path(config.out_dir, "dpo-seed0")
    for way, settings in SAMPLED.items():
        runs += [(f"DPO, {way} {t}", 0, dpo, options) for t, options in settings.items()]
    for name, seed, policy, options in runs:
        texts = write_texts(config, name, policy, prompts, config.samples, seed, **options)
        results.setdefault(name, []).append(measure_texts(config, texts, known))
    for name in results:
        if name.startswith("halves"):  # these raters have other utilities
            for row in results[name][0]:
                both = sum(row[who] for who in HALVES) or math.nan  # nan: no text is about her or him
                row |= dict.fromkeys(("utility", "said", "features", *(f"J {x}" for x in RATIOS)), math.nan)
                row |= {who: row[who] / both for who in HALVES} | {"nobody": 0.0}
    return results


# ---- tables and pictures

CURVES = {  # of the picture: (policies, style, color)
    "DPL on pairs": (["DPO", *(f"DPL, α/β = {x}" for x in RATIOS[1:])], "o-", lab.BLUE),
    "DPL per token": ([f"DPL per token, α/β = {x}" for x in PER_TOKEN_RATIOS], "o--", lab.SKY),
    "RL": ([f"RL, α/β = {x}" for x in RL_RATIOS], "D-", lab.RED),
    "DPO, larger β": (["DPO", *(f"DPO, β = {x * BETA:g}" for x in DPO_RATIOS)], "s--", lab.ORANGE),
    **{
        f"DPO, {way}": (["DPO", *(f"DPO, {way} {t}" for t in SAMPLED[way])], style, color)
        for way, (style, color) in {
            "token temperature": ("x:", lab.ORANGE),
            "min-p": ("^:", lab.RED),
            "top-p": ("v:", lab.SKY),
            "global temperature": ("P:", lab.BLUE),
        }.items()
    },
    "reference": (["reference"], "*", "black"),
}


def print_texts(config: RealConfig, names: list[str]) -> None:
    """Print the first five texts of each policy, of the first prompt, as Markdown."""
    for name in names:
        if name in OPTIMUM.values():  # it has the reference's texts
            continue
        path = Path(config.out_dir, "texts", f"{slug(name)}-seed0.json")
        print(f"\n**{name}**\n")
        for row in json.loads(path.read_text())[0][:5]:
            print(f"- {' '.join(row['text'].split())}{'' if row['finish'] == 'eos' else ' [cut]'}")


def draw(results: Results, path: Path) -> None:
    """Draw quality against diversity; bars are standard errors over prompts."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 5))
    labels = {
        "features": "entropies of pronoun, name, opening, bits",
        "distance": "mean cosine distance of two texts",
        "utility": "expected utility, nats",
        "nats_per_token": "cross-entropy to the reference, nats a token (reversed)",
    }
    panels = [("features", "utility"), ("distance", "utility"), ("distance", "nats_per_token")]
    for axis, keys in zip(axes, panels, strict=True):
        for label, (names, style, color) in CURVES.items():
            (x, dx), (y, dy) = (np.array([over_prompts(results[n], key) for n in names]).T for key in keys)
            axis.errorbar(x, y, dy, dx, fmt=style, color=color, label=label, lw=1.2, elinewidth=0.6)
        axis.set(xlabel=labels[keys[0]], ylabel=labels[keys[1]])
    axes[2].invert_yaxis()
    best = [over_prompts(results[OPTIMUM["one"]], key)[0] for key in panels[0]]
    axes[0].plot(*best, "o", color="0.75", ms=14, zorder=0, label="optimum, α = β")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=10)
    save_figure(figure, path)


def draw_who(results: Results, path: Path) -> None:
    """Draw who the first prompt's person is, a bar per policy, for both populations."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=(3, 2))
    halves = [name for name in results if name.startswith("halves")]
    one = ["reference", OPTIMUM["one"], *(name for name in POLICIES if not name.startswith("halves"))]
    for axis, names in zip(axes, (one, halves), strict=True):
        for y, name in enumerate(names):
            shares = {who: 100 * np.mean([run[0][who] for run in results[name]]) for who in VALUES["who"]}
            lab.stack(axis, y, 0.7, shares, 9)
        axis.set_yticks(range(len(names)), [name.removeprefix("halves: ") for name in names])
        axis.invert_yaxis()
        axis.set(xlim=(0, 100), xlabel="share of the first prompt's texts, %")
    axes[1].set_xlabel("share of its texts about her or him, %")
    save_figure(figure, path)


def utility_loss(path: Path) -> float:
    """The loss of the raters' own utility on a file of their rankings, in nats a pair."""
    losses = []
    for _, row in read_rows(path):
        values = [utility(text if isinstance(text, str) else text[0]["content"]) for text in row["ranking"]]
        losses += [np.logaddexp(0, worse - better) for better, worse in itertools.combinations(values, 2)]
    return float(np.mean(losses))


def draw_runs(config: RealConfig, path: Path) -> None:
    """Draw the held-out loss of runs on pairs, and J of runs by RL, against steps."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5))
    dashes = ["--", ":", "-.", "-"]
    looks = {n: (c, dashes[i]) for names, _, c in CURVES.values() for i, n in enumerate(names)}
    for name, seed, folder in list_runs(config):
        learns, _ = POLICIES[name]
        if learns != "halves" and seed == 0:
            key, axis = ("objective", axes[1]) if learns == "rl" else ("eval_loss", axes[0])
            rows = [row for _, row in read_rows(folder / "metrics.jsonl") if key in row]
            points, (color, dash) = [[row[k] for row in rows] for k in ("step", key)], looks[name]
            axis.plot(*points, dash, color=color, label=name)
    least = utility_loss(Path(config.out_dir, "one_held_out.jsonl"))
    axes[0].axhline(least, **lab.EXACT, label=f"the raters' own utility: {least:.3f}")
    for axis, label in zip(axes, ("held-out loss, nats", "J, nats: mean of a step's texts"), strict=True):
        axis.set(xlabel="optimizer step", ylabel=label)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3)
    save_figure(figure, path)


def main() -> None:
    """Train and sample what is missing, print the table and the texts, draw the pictures."""
    config = parse(RealConfig, __doc__)
    open_folder(config)
    results = make_results(config)
    lab.write_arrays(Path(config.out_dir, "results.json"), results)
    print_table(results, COMPARED)
    print_texts(config, list(results))
    path = Path(config.out_file)
    draw(results, path)
    draw_who(results, path.with_name(f"{path.stem}_who{path.suffix}"))
    draw_runs(config, path.with_name(f"{path.stem}_runs{path.suffix}"))


if __name__ == "__main__":
    run_command(main)
