"""The papers' small experiments: the sampler against enumeration, gradients against autograd, whole runs."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from experiments import bandit, dispersion
from model import Stats
from train_dpl import dpl_loss
from train_mallows import mallows_phi_link, mallows_phi_loss

# ---- rankings from a Mallows-phi model


def inversions(ranking):
    return sum(a > b for a, b in itertools.combinations(ranking, 2))


@pytest.mark.parametrize("phi", [1e-300, 0.05, 0.5, 0.9, 1.0])
def test_rankings_of_four_items_follow_equation_5(phi):
    every = list(itertools.permutations(range(4)))
    law = np.array([phi ** inversions(ranking) for ranking in every])
    drawn = dispersion.mallows_rankings(phi, 4, 20_000, np.random.default_rng(0))
    index = {ranking: i for i, ranking in enumerate(every)}
    counts = np.bincount([index[tuple(ranking)] for ranking in drawn.tolist()], minlength=24)
    expected = law / law.sum() * len(drawn)
    rare = expected < 5  # chi-square wants cells of at least five
    assert counts[rare].sum() <= 5 * expected[rare].sum() + 5
    if (~rare).sum() > 1:
        cells = [np.append(x[~rare], x[rare].sum()) if rare.any() else x for x in (counts, expected)]
        assert chisquare(*cells).pvalue > 0.01


@pytest.mark.parametrize("phi", [0.05, 0.5, 0.9, 1.0])
def test_item_i_is_ranked_before_item_j_with_the_probability_of_the_link(phi):
    drawn = dispersion.mallows_rankings(phi, 7, 50_000, np.random.default_rng(1))
    place = drawn.argsort(1)
    for i, j in itertools.combinations(range(7), 2):
        share = (place[:, i] < place[:, j]).mean()
        expected = mallows_phi_link(torch.tensor(j - i, dtype=torch.float64), phi).item()
        # 4.5 standard deviations of 50,000 draws, for 84 comparisons
        assert abs(share - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / 50_000) + 1e-12


@pytest.mark.parametrize("items", [1, 2, 9])
def test_every_ranking_is_a_permutation(items):
    drawn = dispersion.mallows_rankings(0.7, items, 50, np.random.default_rng(2))
    assert drawn.shape == (50, items) and drawn.dtype == np.int64
    assert (np.sort(drawn, 1) == np.arange(items)).all()


@pytest.mark.parametrize("phi", [0, -0.5, 1.0001, math.nan])
def test_a_dispersion_outside_0_to_1_is_refused(phi):
    with pytest.raises(ValueError, match="outside"):
        dispersion.mallows_rankings(phi, 4, 1, np.random.default_rng(0))


def test_entropy_of_a_hand_counted_sample():
    assert dispersion.entropy(np.array([3, 0, 3, 5])) == pytest.approx(1.5 * math.log(2))
    assert dispersion.entropy(np.array([2, 2])) == 0


def test_dispersion_runs_and_its_estimate_follows_the_truth(tmp_path, monkeypatch):
    out, picture = tmp_path / "dispersion.json", tmp_path / "dispersion.png"
    flags = ["--rankings", "2000", "--out_file", str(out), "--picture", str(picture)]
    monkeypatch.setattr("sys.argv", ["dispersion.py", *flags])
    dispersion.main()
    found = json.loads(out.read_text())["mallows"]
    assert set(found) == {"5", "10", "100"}
    assert all(result["correlation"] > 0.98 for result in found.values())
    assert np.mean(found["10"]["estimate"]) == pytest.approx(np.mean(found["10"]["truth"]))
    assert picture.read_bytes().startswith(b"\x89PNG")


# ---- the bandit

LOSSES = {
    "DPO": lambda policy, reference, beta: dpl_loss(policy, reference, beta, beta),
    "MallowsPO-φ": lambda policy, reference, beta: mallows_phi_loss(policy, reference, bandit.PHI, beta),
}


@pytest.mark.parametrize("name", LOSSES)
def test_slope_is_autograd_s(name):
    s = torch.cat([torch.tensor([0.0]), torch.logspace(-6, 1, 50), -torch.logspace(-6, 1, 50)]).double()
    s.requires_grad_(True)
    stats = Stats(torch.stack([s, torch.zeros_like(s)], -1), torch.ones(len(s), 2))
    zero = Stats(torch.zeros(len(s), 2, dtype=torch.float64), stats.length)
    (gradient,) = torch.autograd.grad(LOSSES[name](stats, zero, 1.0).sum(), s)
    assert bandit.SLOPES[name](s.detach().numpy()) == pytest.approx(-gradient.numpy(), rel=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_training_is_plain_gradient_descent_on_the_mean_loss_of_the_sixteen_pairs(name):
    betas, steps = [0.05, 0.4, 3.0], 31
    pairs = torch.from_numpy(np.stack([bandit.WON, bandit.LOST], 1) - 1)
    uniform = Stats(torch.full((16, 2), -math.log(5), dtype=torch.float64), torch.ones(16, 2))
    first, last = [], []
    for beta in betas:
        logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=5e-3)
        policies = []
        for _ in range(steps):
            policy = Stats(logits.log_softmax(-1)[pairs], uniform.length)
            optimizer.zero_grad()
            LOSSES[name](policy, uniform, beta).mean().backward()
            optimizer.step()
            policies.append(logits.detach().softmax(-1).numpy())
        first.append(policies[0])
        last.append(np.mean(policies[1:], 0))
    ours = [bandit.train(bandit.SLOPES[name], np.array(betas), n) for n in (1, steps)]
    assert (ours[1].history == 0.2).all()
    np.testing.assert_allclose(ours[0].final, first, rtol=1e-9)
    np.testing.assert_allclose(ours[1].final, last, rtol=1e-9)


def test_table_4_s_rewards_and_a_hand_computed_policy():
    np.testing.assert_allclose(bandit.REWARD, [15.5, 16.5, 16.5, 14.95, 1.03])
    reward, kl = bandit.reward_and_kl(np.array([[0.5, 0.25, 0.25, 0, 0], [0.2] * 5]))
    np.testing.assert_allclose(reward, [16, 64.48 / 5])
    np.testing.assert_allclose(kl, [math.log(5) - 1.5 * math.log(2), 0], atol=1e-15)


def test_best_reward_is_a_running_maximum_from_the_reference():
    # KL 0, log 5 and log 2.5; rewards 12.896, 15.5 and 16.5
    frontier = np.array([[1.0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0]])
    best = bandit.best_reward(np.log([1, math.sqrt(2.5), 2.5, 5, 50]), frontier)
    np.testing.assert_allclose(best, [12.896, (12.896 + 16.5) / 2, 16.5, 16.5, 16.5])


def test_mallows_phi_earns_more_at_half_of_dpo_s_kl():
    (reward, kl), (dpo_reward, dpo_kl) = (
        bandit.reward_and_kl(bandit.train(slope, np.array([0.1]), 60_000).final[0])
        for slope in (bandit.phi_slope, bandit.dpo_slope)
    )
    assert reward > dpo_reward + 0.1 and kl < 0.55 * dpo_kl


def test_bandit_runs_and_dpo_leaves_the_good_arms_first(tmp_path, monkeypatch):
    folders = ["--out_dir", str(tmp_path / "out"), "--picture_dir", str(tmp_path / "pictures")]
    monkeypatch.setattr("sys.argv", ["bandit.py", "--steps", "20000", *folders])
    bandit.main()
    result = json.loads((tmp_path / "out/metrics.json").read_text())
    assert result["steps"] == 20000
    dpo, phi = ({row["beta"]: row for row in rows} for rows in result["frontier"].values())
    assert min(dpo[0.5]["policy"][:4]) < 0.05 and min(phi[0.5]["policy"][:4]) > 0.2
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == ["bandit_frontier.png", "bandit_training.png"]


def test_bandit_refuses_too_few_steps(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bandit.py", "--steps", "10"])
    with pytest.raises(bandit.InputError, match="--steps 10"):
        bandit.main()
