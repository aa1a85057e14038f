"""experiments/weighting.py and population.py: parts against other calculations, and short runs."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from common.encode import encode_prompts
from common.files import ROOT
from common.flags import parse
from common.rows import read_pairs
from core.hub import load_model
from core.model import Stats
from data.society.truth import WORLD, optimum, poll_distributions
from experiments import lab, population, weighting
from scripts import call
from tiny import first_pairs
from train_dpl import dpl_loss
from train_mallows import MallowsConfig, neg_log_dispersion

WORLD_JSON = json.loads(WORLD.read_text())
DEBATES = WORLD_JSON["debates"]


# ---- weighting by dispersion


def test_weighting_runs(tmp_path, monkeypatch, capsys):
    data = first_pairs("debates", 32, tmp_path / "pairs.jsonl")
    short = ["--data", data, "--batch_size", 16, "--max_steps", 1, "--epochs", 1]
    monkeypatch.setattr(lab, "run", call)
    monkeypatch.setattr(weighting, "TRAIN", [*weighting.TRAIN, *short])
    monkeypatch.setattr(weighting, "LOSSES", {"DPO": "theta"})
    monkeypatch.setattr(weighting, "BETAS", (0.2,))
    call(weighting, seeds=2, samples=8, out_dir=tmp_path / "w", out_file=tmp_path / "w.png")
    results = json.loads((tmp_path / "w/weighting.json").read_text())
    assert len(results) == 1 + 3 and {len(rows) for rows in results.values()} == {1, 2}
    assert "change by the weight, within a seed\nDPO | estimate | 0.2" in capsys.readouterr().out
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    # the true weights spread from -log 0.95 to -log 0.05, the estimated ones hardly
    spread = {}
    for weight in ("estimate", "true"):
        summary = json.loads((tmp_path / f"w/theta-{weight}-0.2-seed0/dispersion.json").read_text())
        assert summary["mean"] == pytest.approx(1)
        spread[weight] = summary["quantiles"]["1"] / summary["quantiles"]["0"]
    assert spread["true"] > 20 > 2 > spread["estimate"]


def test_the_flags_of_every_setting_are_taken(tmp_path, monkeypatch):
    taken = []
    read = lambda _, folder, *flags: parse(MallowsConfig, None, [*map(str, flags), f"--out_dir={folder}"])  # noqa: E731
    monkeypatch.setattr(lab, "train", lambda *words: taken.append(read(*words)))
    for loss, beta in itertools.product(weighting.LOSSES, weighting.BETAS):
        weighting.train_policy(tmp_path, loss, "none", beta, 0)
    assert len(taken) == 9
    assert [config.alpha / config.beta for config in taken if config.loss == "dpl"] == [2, 2, 2]


def test_the_true_dispersion_takes_the_place_of_the_estimate():
    model, tokenizer = load_model(lab.REFERENCE)
    prompts = encode_prompts(list(DEBATES), tokenizer)
    examples = [(prompt, [5], [6]) for prompt in reversed(prompts)]
    reference = Stats(torch.zeros(20, 2), torch.ones(20, 2), torch.ones(20, 2))
    config = MallowsConfig(out_dir="unused", dispersion="off")
    known = weighting.fit_true_dispersion(model, tokenizer, examples, reference, config=config)
    c = neg_log_dispersion(reference.entropy, known["vocab_size"])
    truth = [-math.log(debate["phi"]) for debate in reversed(DEBATES.values())]
    assert c.tolist() == pytest.approx(truth, rel=1e-4)
    assert known["scale"] == pytest.approx(1 / np.mean(truth), rel=1e-4)


def test_the_reference_is_no_distance_from_itself():
    model, tokenizer = load_model(lab.REFERENCE)
    logp = weighting.answer_logp(model, tokenizer, DEBATES)
    other = weighting.other_texts(model, tokenizer, model, DEBATES, 200)
    assert other[:, 0] == pytest.approx(other[:, 1], abs=1e-4)  # under itself twice
    result = {name: np.nanmean(x) for name, x in weighting.evaluate_policy(logp, other, DEBATES).items()}
    assert result["utility"] == pytest.approx(0.5, abs=1e-4) and result["kl"] == pytest.approx(0, abs=1e-4)
    # of the answers alone, the reference's distance to the raters' favourites and its entropy, once more
    gaps, bits = [], []
    for debate in DEBATES.values():
        p = np.exp(debate["reference_logp"])
        favourites = debate["phi"] ** np.arange(5) / (debate["phi"] ** np.arange(5)).sum()
        gaps.append(abs(p - favourites).sum() / 2 + (1 - p.sum()) / 2)
        bits.append(-(p * np.log(p)).sum())
    assert result["distance"] == pytest.approx(np.mean(gaps), abs=1e-4)
    p = [np.exp(debate["reference_logp"]) for debate in DEBATES.values()]
    entropies = [-(x / x.sum() @ np.log(x / x.sum())) for x in p]
    assert result["answers_entropy"] == pytest.approx(np.mean(entropies), abs=1e-4)
    assert result["contested_entropy"] == pytest.approx(np.mean(entropies[10:]), abs=1e-4)
    assert result["answers_kl"] == pytest.approx(0, abs=1e-4)
    assert result["entropy"] == pytest.approx(np.mean(bits) - other[:, 0].mean(), abs=1e-4)


def test_kl_and_entropy_of_whole_texts_are_estimated_without_bias():
    """Of a policy that writes one other text with probability 0.2, in samples of the very shares."""
    debate = {"phi": 0.5, "ranking": list("ab"), "reference_logp": [math.log(0.5), math.log(0.4)]}
    logp = np.log([[0.7, 0.1]])
    other = 0.2 * np.array([[math.log(0.2), math.log(0.1)]])
    result = weighting.evaluate_policy(logp, other, {"x": debate})
    p, q = np.array([0.7, 0.1, 0.2]), np.array([0.5, 0.4, 0.1])
    assert result["kl"] == pytest.approx(p @ np.log(p / q))
    assert result["entropy"] == pytest.approx(-(p @ np.log(p)))
    p, q = p[:2] / 0.8, q[:2] / 0.9
    assert result["answers_kl"] == pytest.approx(p @ np.log(p / q))


@pytest.mark.parametrize("phi", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_an_exact_weight_cancels_the_dispersion(phi, beta):
    """With the true phi, the phi link's optimum is pi_ref exp(-rank / beta), the same for every phi."""
    reference = np.array([0.4, 0.25, 0.15, 0.12, 0.08])
    debate = {"phi": phi, "reference_logp": np.log(reference).tolist()}
    expected = reference * np.exp(-np.arange(5) / beta)
    optimum = weighting.tabular_optimum(debate, "phi", -math.log(phi), beta)
    assert optimum == pytest.approx(expected / expected.sum(), abs=2e-3)
    # theta with the true weight: neighbours are 0.7 to 1 rank apart; without it, -log phi ranks
    contrast = {c: weighting.tabular_optimum(debate, "theta", c, beta) for c in (1.0, -math.log(phi))}
    for c, p in contrast.items():
        ranks = beta * np.log(p[0] / reference[0] / (p[1] / reference[1]))
        assert 0.7 * -math.log(phi) / c < ranks < 1.01 * -math.log(phi) / c


def test_dpl_at_twice_beta_halves_the_contrast_of_the_optimum():
    debate = {"phi": 0.6, "reference_logp": np.log([0.2] * 5).tolist()}
    dpo, dpl = (np.log(weighting.tabular_optimum(debate, loss, 1.0, 0.5)) for loss in ("theta", "dpl"))
    assert np.diff(dpl) == pytest.approx(np.diff(dpo) / 2, rel=1e-3)


# ---- the population


def test_population_runs(tmp_path, monkeypatch, capsys):
    data = first_pairs("polls", 64, tmp_path / "pairs.jsonl")
    short = ["--data", data, "--batch_size", 16, "--max_steps", 1, "--epochs", 1]
    monkeypatch.setattr(lab, "run", call)
    monkeypatch.setattr(population, "TRAIN", [*population.TRAIN, *short])
    flags = ["--seeds", 2, "--samples", 128, "--out_dir", tmp_path / "p", "--pictures", tmp_path]
    monkeypatch.setattr(population, "ALPHAS", (0.1, 0.2, 1.0))
    call(population, *flags)
    for name in ("shares", "calibration", "coverage"):
        assert (tmp_path / f"population_{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "optimum, alpha 1 " in printed and "coverage of a person of the rarest opinion" in printed
    results = json.loads((tmp_path / "p/population.json").read_text())
    assert np.shape(results["DPL"]) == (2, 3, 4, 4) and np.shape(results["DPO"]) == (2, 6, 4, 4)
    # DPO at temperature 1 is the first policy of DPL; the optimum is truth.py's
    assert np.array(results["DPO"])[:, 0] == pytest.approx(np.array(results["DPL"])[:, 0])
    poll = next(iter(WORLD_JSON["polls"].values()))
    target, _ = poll_distributions(poll, 1.0, 0.1)
    assert results["optimum"][2][0] == pytest.approx(list(target.values()))
    target, _ = poll_distributions(poll, 0.2, 0.2)
    assert results["DPO optimum"][1][0] == pytest.approx(list(target.values()))


def test_opinion_probs_of_the_reference_are_the_shipped_ones():
    model = load_model(lab.REFERENCE)
    probs = population.opinion_probs(*model, WORLD_JSON["polls"], 1.0)
    shipped = [poll["reference_logp"] for poll in WORLD_JSON["polls"].values()]
    assert np.log(probs) == pytest.approx(np.array(shipped), abs=1e-3)
    hot = population.opinion_probs(*model, WORLD_JSON["polls"], 5.0)
    assert hot.sum() < probs.sum() - 0.5  # other texts take over


def test_scores_of_the_shares_themselves_and_of_a_landslide():
    shares = np.array([0.55, 0.2, 0.15, 0.1])
    calibrated = population.evaluate_probs(np.tile(0.9 * shares, (4, 1)), shares)
    assert calibrated["ece"] == pytest.approx(0, abs=1e-12) and calibrated["tv"] == pytest.approx(
        0, abs=1e-12
    )
    assert calibrated["brier"] == pytest.approx(1 - (shares**2).sum())
    assert calibrated["outside"] == pytest.approx(0.1)
    landslide = population.evaluate_probs(np.eye(4)[[0, 0, 0, 0]], shares)
    assert landslide["ece"] == pytest.approx(0.45) and landslide["brier"] == pytest.approx(2 * 0.45)


def test_label_optimum_minimises_the_loss_on_the_pairs():
    """Of the first poll, by gradient descent on a table; and it is near the optimum of the raters."""
    polls = dict(itertools.islice(WORLD_JSON["polls"].items(), 1))
    [(prompt, poll)] = polls.items()
    names, reference = list(poll["shares"]), torch.tensor(poll["reference_logp"], dtype=torch.float64)
    rows = read_pairs(ROOT / population.DATA)
    rows = [row for row in rows if row["prompt"] == prompt and {row["chosen"], row["rejected"]} <= set(names)]
    assert len(rows) > 800
    index = torch.tensor([[names.index(row[key]) for key in ("chosen", "rejected")] for row in rows])
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        policy = Stats(scores.log_softmax(0)[index], torch.ones(len(index), 2))
        loss = dpl_loss(policy, Stats(reference[index], policy.length), 0.5, 0.1).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    [strength] = population.fit_labels(polls)
    found = optimum(np.array(poll["reference_logp"]), np.log(strength), 0.5, 0.1)
    assert found == pytest.approx(scores.detach().softmax(0).numpy(), abs=1e-5)
    target, _ = poll_distributions(poll, 0.5, 0.1)
    assert 0.001 < abs(found - np.array(list(target.values()))).sum() / 2 < 0.1


def test_measured_coverage_agrees_with_the_closed_form():
    model, tokenizer = load_model(lab.REFERENCE)
    polls = dict(itertools.islice(WORLD_JSON["polls"].items(), 1))
    [seen] = population.measured_coverage(model, tokenizer, polls, 1000, 1.0)
    [p] = population.opinion_probs(model, tokenizer, polls, 1.0)
    for column, k in enumerate(population.powers(population.MOST)):
        slope = k * (1 - p) ** (k - 1)  # of 1 - (1 - p)^k; the error of p is sqrt(p (1 - p) / 1000)
        error = slope * np.sqrt(p * (1 - p) / 1000)
        assert (abs(seen[:, column] - (1 - (1 - p) ** k)) <= 4 * error + 0.01).all()
