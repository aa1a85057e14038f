"""Does weighting by dispersion help? MallowsPO's question, on debates whose truth is known.

The society's debates have five answers each, a central ranking, and raters drawn from a Mallows model. Their
dispersion phi lies between 0.05 (a settled debate: nearly all raters agree) and 0.95 (a contested one). DPO,
the phi link and DPL train on the same pairs at three values of beta, with three weights: none, the estimate
from the reference's entropies, and the true -log phi of each debate, scaled to the mean 1. The estimate lies
between 0.90 and 1.23 only; the true weight between 0.05 and 3.2.

The policy's probabilities of the five answers are exact. All other texts lose to every answer; what they add
to KL and entropy is estimated from 256 samples of each debate.

    utility          P(a rater prefers the policy's text to the reference's), a tie counting half
    KL               KL(policy || reference) of whole texts, in nats
    KL, answers      the same among the five answers: of probabilities that are normalised over them
    entropy          of the policy's whole texts, in nats
    entropy, answers of the probabilities normalised over the answers: diversity without broken texts
    distance         total variation between the policy and the share of raters who favour each answer
    outside          the policy's probability of other texts

What an exact weight does. Write d for a difference of ranks and L = -log phi. Take MallowsPO's corollary 2 at
its word: raters prefer the better of two texts with probability sigmoid(2 L d). Then their Bradley-Terry
reward is 2 L times the negative rank, and the optimum of DPO is pi ~ pi_ref exp(-2 L rank / beta): far from
the reference in settled debates, near it in contested ones. MallowsPO-theta fits sigmoid(2 L beta Delta) to
the same probability, and L cancels:

    beta Delta = d,     pi ~ pi_ref exp(-rank / beta)     on every prompt, contested or settled.

The phi link does the same for raters of corollary 3, as in this society, if it is given the true phi. (Here
-log phi is scaled to the mean 1, by 1.08.) With the theta link and such raters L cancels nearly: the logit of
a preference is L for neighbours and between (2d + 1) L / 3 (phi near 1) and d L - log d (phi near 0) for
others. In DPO, contested debates stay diverse because their labels say little. An exact weight undoes that.
The right panel shows it at the largest beta, beside the optimum of each loss, found by minimising it over a
table. At smaller betas three epochs end far from the optimum, most of all where c(x) is small: it scales the
gradient too.

Runs with the same seed see the same batches, so a weighted run is compared with the unweighted run of its
seed. With three seeds, a difference is beyond chance (95%) from 4.3 standard errors on; and the table has 18
rows of differences, so look for what all three betas agree on.

    python experiments/weighting.py     # 81 short runs, an hour; finished training runs are kept
"""

import itertools
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.encode import encode_prompts
from common.files import ROOT
from common.flags import Flags, flag, parse, run_command
from core.hub import load_model
from core.model import Stats
from core.reference import score_completions
from core.trainer import train
from data.society.make_world import draw_seed, exact_logp
from data.society.truth import mallows_favourites, mallows_pair
from experiments import lab
from metrics.tables import mean_and_error, save_figure
from train_mallows import MallowsConfig, fit_dispersion, mallows_dpl_loss, mallows_phi_loss, objective

BETAS = (0.1, 0.2, 0.4)
LOSSES = {"DPO": "theta", "φ link": "phi", "DPL, α = 2β": "dpl"}
WEIGHTS = ("none", "estimate", "true")
STYLES = {"DPO": (lab.ORANGE, "o"), "φ link": (lab.RED, "^"), "DPL, α = 2β": (lab.BLUE, "D")}
FILLS = {"none": {"mfc": "white"}, "estimate": {"fillstyle": "left", "mfcalt": "white"}, "true": {}}
TRAIN = ["--model", lab.REFERENCE, "--data", ROOT / "data/society/debates.jsonl.gz"]
TRAIN += ["--lora_rank", 0, "--lr", 5e-4, "--epochs", 3]
RECIPE = f"@{ROOT}/recipes/debates.txt"
METRICS = {  # key: title
    "utility": "utility",
    "kl": "KL, nats",
    "answers_kl": "KL, answers",
    "entropy": "entropy, nats",
    "answers_entropy": "entropy, answers",
    "contested_entropy": "the same, phi > 0.5",
    "distance": "distance",
    "outside": "outside",
}


@dataclass
class WeightingConfig(Flags):
    """Flags of experiments/weighting.py."""

    seeds: int = flag(3, "Training runs of each policy.", "[2, inf)")
    samples: int = flag(256, "Samples per debate, for what a policy writes besides the answers.", "[2, inf)")
    out_dir: str = flag("out/weighting", "Folder of the policies and of weighting.json.")
    out_file: str = flag("assets/weighting.png", "The picture.")


# ---- training


def fit_true_dispersion(
    model: Any, tokenizer: Any, examples: Any, reference: Stats, *, config: MallowsConfig
) -> dict[str, Any]:
    """fit_dispersion with the true phi of the debates in place of the estimate.

    Overwrites reference.entropy with phi log V. Equation 10 divides the entropy by log V, which gives phi.
    """
    debates = lab.read_world()["debates"]
    ids = encode_prompts(list(debates), tokenizer)
    phi = {tuple(prompt): d["phi"] for prompt, d in zip(ids, debates.values(), strict=True)}
    truth = torch.tensor([phi[tuple(prompt)] for prompt, *_ in examples])
    vocab_size = model.get_input_embeddings().weight.shape[0]
    reference.entropy[:] = (truth * math.log(vocab_size))[:, None]
    return fit_dispersion(model, tokenizer, examples, reference, config=config)


def train_policy(folder: Path, loss: str, weight: str, beta: float, seed: int) -> None:
    """Train one policy unless its folder is finished."""
    flags = [RECIPE, *TRAIN, "--loss", LOSSES[loss], "--beta", beta, "--seed", seed]
    flags += ["--alpha", 2 * beta] if LOSSES[loss] == "dpl" else []
    flags += ["--dispersion", "off" if weight == "none" else "on"]
    if weight != "true":
        lab.train("train_mallows.py", folder, *flags)
    elif not lab.is_finished(folder):
        config = parse(MallowsConfig, None, [*map(str, flags), "--out_dir", str(folder), "--resume"])
        train(config, partial(objective, config=config), prepare=partial(fit_true_dispersion, config=config))


# ---- evaluation


def answer_logp(model: Any, tokenizer: Any, debates: dict[str, dict]) -> np.ndarray:
    """A policy's log-probability of each debate's answers, best ranked first, (debates, 5)."""
    return np.array([exact_logp(model, tokenizer, prompt, d["ranking"]) for prompt, d in debates.items()])


def other_texts(
    model: Any, tokenizer: Any, reference: Any, debates: dict[str, dict], samples: int, seed: int = 0
) -> np.ndarray:
    """Mean log pi and log pi_ref of sampled texts, (debates, 2), in nats; an answer counts as 0."""
    rows, generator = [], torch.Generator().manual_seed(seed)
    for prompt, debate in debates.items():
        drawn, texts = lab.sample_texts(model, tokenizer, prompt, samples, 24, seed=draw_seed(generator))
        is_other = [text not in debate["ranking"] for text in texts]
        other = [c for c, o in zip(drawn, is_other, strict=True) if o or c.finish != "eos"]
        ids, tokens = encode_prompts([prompt], tokenizer) * len(other), [c.tokens for c in other]
        score = score_completions(reference, ids, tokens).sum() if other else 0.0
        rows.append([sum(c.logp for c in other), score])
    return np.array(rows) / samples


def evaluate_policy(logp: np.ndarray, other: np.ndarray, debates: dict[str, dict]) -> dict[str, np.ndarray]:
    """METRICS of a policy for every debate, {metric: (debates,)}, from answer_logp() and other_texts().

    KL and entropy are exact sums over the answers, plus the sample means of other_texts() for all others.
    """
    rows = []
    for answers, (other_logp, other_ref), debate in zip(np.exp(logp), other, debates.values(), strict=True):
        phi, count = debate["phi"], len(answers)
        wins = np.full((count + 1, count + 1), 0.5)  # wins[i, j] = P(a rater prefers outcome i to outcome j)
        for i, j in itertools.combinations(range(count + 1), 2):  # i is ranked before j
            wins[i, j] = 1.0 if j == count else mallows_pair(j - i, phi)
            wins[j, i] = 1 - wins[i, j]
        reference = np.exp(debate["reference_logp"])
        policy6, reference6 = (np.append(p, 1 - p.sum()) for p in (answers, reference))
        p, q = answers / answers.sum(), reference / reference.sum()
        entropy = -(p @ np.log(p))
        rows.append(
            {
                "utility": policy6 @ wins @ reference6,
                "kl": answers @ np.log(answers / reference) + other_logp - other_ref,
                "answers_kl": p @ np.log(p / q),
                "entropy": -(answers @ np.log(answers)) - other_logp,
                "answers_entropy": entropy,
                "contested_entropy": entropy if phi > 0.5 else math.nan,
                "distance": abs(policy6 - np.append(mallows_favourites(phi, count), 0)).sum() / 2,
                "outside": policy6[count],
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in METRICS}


def tabular_optimum(debate: dict[str, Any], loss: str, weight: float, beta: float) -> np.ndarray:
    """The policy over a debate's five answers, (5,), that minimises the expected loss of a pair.

    Pairs are two different answers that the reference writes; raters label them. `weight` is c(x).
    """
    logp = torch.tensor(debate["reference_logp"], dtype=torch.float64)
    pairs = list(itertools.permutations(range(len(logp)), 2))  # (winner, loser)
    p_win = [mallows_pair(abs(j - i), debate["phi"]) for i, j in pairs]
    p_win = [p if i < j else 1 - p for p, (i, j) in zip(p_win, pairs, strict=True)]
    index = torch.tensor(pairs)
    share = logp[index].sum(1).exp() * torch.tensor(p_win, dtype=torch.float64)
    share /= share.sum()
    reference = Stats(logp[index], torch.ones(len(pairs), 2))
    # log pi - log pi_ref; not 0, where the phi link jumps
    change = -0.1 / beta * torch.arange(len(logp), dtype=torch.float64)
    change.requires_grad_(True)
    options = {"max_iter": 500, "line_search_fn": "strong_wolfe", "tolerance_change": 1e-12}
    optimizer = torch.optim.LBFGS([change], **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        policy = Stats((logp + change)[index], reference.length)
        if loss == "phi":
            values = mallows_phi_loss(policy, reference, math.exp(-weight), beta)
        else:
            values = mallows_dpl_loss(policy, reference, weight, 2 * beta if loss == "dpl" else beta, beta)
        total = (share * values).sum()
        total.backward()
        return total

    optimizer.step(closure)
    return (logp + change).softmax(0).detach().numpy()


def make_results(config: WeightingConfig) -> dict[str, list[dict[str, np.ndarray]]]:
    """Train what is missing; returns {method(): [evaluate_policy() of each seed]}."""
    debates = lab.read_world()["debates"]
    reference, _ = load_model(lab.REFERENCE)

    def evaluate(folder: Path, seed: int) -> dict[str, np.ndarray]:
        model, tokenizer = load_model(folder)
        with torch.no_grad():
            other = other_texts(model, tokenizer, reference, debates, config.samples, seed)
        return evaluate_policy(answer_logp(model, tokenizer, debates), other, debates)

    results = {"reference": [evaluate(lab.REFERENCE, 0)]}
    methods = list(itertools.product(LOSSES, WEIGHTS, BETAS))
    for loss, weight, beta in tqdm(methods, desc="policies", unit="setting", disable=None):
        rows = results.setdefault(method(loss, weight, beta), [])
        for seed in range(config.seeds):
            folder = Path(config.out_dir).resolve() / f"{LOSSES[loss]}-{weight}-{beta}-seed{seed}"
            train_policy(folder, loss, weight, beta, seed)
            rows.append(evaluate(folder, seed))
    return results


def method(loss: str, weight: str, beta: float) -> str:
    """Name of a training setting."""
    return f"{loss} | {weight} | {beta:g}"


# ---- results


def over_debates(rows: list[dict[str, np.ndarray]], name: str) -> list[float]:
    """A metric's mean over debates for each seed."""
    return [float(np.nanmean(row[name])) for row in rows]


def print_table(results: dict[str, list[dict[str, np.ndarray]]]) -> None:
    """Print the mean of every metric, then what each weight changes within a seed."""
    print(f"{'loss | weight | beta':38}", *(f"{title:>18}" for title in METRICS.values()))
    for label, rows in results.items():
        cells = ("{:9.4f} ± {:.4f}".format(*mean_and_error(over_debates(rows, name))) for name in METRICS)
        print(f"{label:38}", *(f"{cell:>18}" for cell in cells))
    print("\nchange by the weight, within a seed")
    for loss, weight, beta in itertools.product(LOSSES, WEIGHTS[1:], BETAS):
        pair = (results[method(loss, w, beta)] for w in (weight, "none"))
        ours, base = ({name: over_debates(rows, name) for name in METRICS} for rows in pair)
        changes = (mean_and_error(np.subtract(ours[name], base[name])) for name in METRICS)
        cells = ("{:+9.4f} ± {:.4f}".format(*change) for change in changes)
        print(f"{method(loss, weight, beta):38}", *(f"{cell:>18}" for cell in cells))


def draw(results: dict[str, list[dict[str, np.ndarray]]], path: Path) -> None:
    """Plot utility against KL and entropy, and each debate's entropy against its dispersion."""
    figure, (by_kl, by_entropy, by_phi) = plt.subplots(1, 3, figsize=(15, 5.2))
    for axis, metric in ((by_kl, "kl"), (by_entropy, "answers_entropy")):
        for loss, weight in itertools.product(LOSSES, WEIGHTS):
            rows = [results[method(loss, weight, beta)] for beta in BETAS]
            (x, dx), (y, dy) = (
                np.array([mean_and_error(over_debates(row, name)) for row in rows]).T
                for name in (metric, "utility")
            )
            color, marker = STYLES[loss]
            style = {"color": color, "marker": marker, "ms": 7, "lw": 0.8, "capsize": 2} | FILLS[weight]
            axis.errorbar(x, 100 * y, 100 * dy, dx, label=f"{loss}, weight: {weight}", **style)
        axis.set_ylabel("preferred to the reference's answer, %")
    joined = ", ".join(map(str, BETAS))
    by_kl.set_title("1. The estimated weight changes no utility")
    by_kl.set_xlabel(f"KL(policy || reference), nats (lines join β = {joined})")
    by_entropy.set_title("2. DPL keeps more entropy and earns less utility")
    by_entropy.set_xlabel("entropy among the five answers, nats (grey line: the reference's)")
    by_entropy.axvline(np.mean(results["reference"][0]["answers_entropy"]), **lab.EXACT | {"lw": 2})
    figure.legend(*by_kl.get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=10)
    debates = lab.read_world()["debates"]
    phis = np.array([debate["phi"] for debate in debates.values()])
    by_phi.plot(phis, results["reference"][0]["answers_entropy"], **lab.EXACT, label="reference")
    lines = {"none": (np.ones_like(phis), ":"), "true": (np.log(phis) / np.log(phis).mean(), "-")}
    for weight, (c, style) in lines.items():
        trained = results[method("DPO", weight, BETAS[-1])]
        rows = np.mean([row["answers_entropy"] for row in trained], axis=0)
        label = f"DPO, weight: {weight}"
        by_phi.plot(phis, rows, "o", color=lab.ORANGE, ms=6, label=f"{label}, trained", **FILLS[weight])
        best = [tabular_optimum(d, "theta", w, BETAS[-1]) for d, w in zip(debates.values(), c, strict=True)]
        best = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in best]
        by_phi.plot(phis, best, style, color=lab.ORANGE, lw=1.5, label=f"{label}, optimum")
    by_phi.set_title("3. The true weight takes entropy where people disagree")
    by_phi.set_xlabel(f"dispersion φ of the debate's raters (β = {BETAS[-1]})")
    by_phi.set_ylabel("entropy among the answers, nats")
    by_phi.legend()
    save_figure(figure, path)


def main() -> None:
    """Train what is missing, evaluate, print the table and draw the picture."""
    config = parse(WeightingConfig, __doc__)
    results = make_results(config)
    lab.write_arrays(Path(config.out_dir) / "weighting.json", results)
    print_table(results)
    draw(results, Path(config.out_file))


if __name__ == "__main__":
    run_command(main)
