"""Identities of docs/derivations.md that no other test checks: closed form, enumeration and autograd."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.files import ROOT
from core.decode import next_token_probs
from core.model import Stats
from data.society.truth import mallows_favourites, optimum
from experiments import bandit
from experiments.population import exact_coverage
from experiments.temperature import text_logp
from experiments.weighting import tabular_optimum
from tiny import phi_link
from train_dpl import dpl_loss
from train_mallows import mallows_dpl_loss, mallows_phi_loss, mallows_theta_loss

REFERENCE = np.log([0.4, 0.25, 0.15, 0.12, 0.08])
REWARD = np.array([0.2, -0.4, 1.1, 0.0, 0.5])
RANK = np.arange(5.0)
PHIS = [0.05, 0.3, 0.8, 0.95]
EXACT = {"rel": 1e-9, "abs": 1e-12}  # float64


# ---- the objective and its optimum


def reward_entropy_cross_entropy(logp):
    """E_pi[r], H(pi) and H(pi, pi_ref), from the definitions."""
    p, reference = logp.exp(), torch.from_numpy(REFERENCE)
    return p @ torch.from_numpy(REWARD), -(p @ logp), -(p @ reference)


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.2), (0.4, 0.1), (1.0, 0.3), (0.3, 0.6)])
def test_the_objective_falls_by_alpha_times_the_kl_to_its_optimum(alpha, beta):
    logp = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    reward, entropy, cross_entropy = reward_entropy_cross_entropy(logp)
    objective = (reward + alpha * entropy - beta * cross_entropy).item()
    best = torch.from_numpy(optimum(REFERENCE, REWARD, alpha, beta))
    kl = F.kl_div(best.log(), logp.exp(), reduction="sum").item()
    log_z = np.log(np.exp(beta / alpha * REFERENCE + REWARD / alpha).sum())
    assert objective == pytest.approx(alpha * log_z - alpha * kl, **EXACT)
    # the split of the KL term: the objective is RLHF's and an extra entropy bonus
    kl = F.kl_div(torch.from_numpy(REFERENCE), logp.exp(), reduction="sum").item()
    assert objective == pytest.approx(reward.item() - beta * kl + (alpha - beta) * entropy.item(), **EXACT)


@pytest.mark.parametrize(("sign", "beta"), [(-1, 0.3), (1, -0.3)], ids=["equation 4", "as printed in 27"])
def test_the_sign_of_the_cross_entropy_decides_whether_the_reference_attracts(sign, beta):
    """Equation 27 prints -beta pi log pi_ref, which is +beta H(pi, pi_ref)."""
    logits = torch.from_numpy(np.log(optimum(REFERENCE, REWARD, 0.5, beta))).requires_grad_()
    reward, entropy, cross_entropy = reward_entropy_cross_entropy(logits.log_softmax(0))
    (reward + 0.5 * entropy + sign * 0.3 * cross_entropy).backward()
    assert logits.grad.abs().max() < 1e-12


def test_at_alpha_1_and_a_flat_reference_the_loss_is_the_log_score():
    logp = torch.tensor([[0.7, 0.2]], dtype=torch.float64).log()
    flat = Stats(torch.full_like(logp, -1.0), torch.ones(1, 2))
    loss = dpl_loss(Stats(logp, flat.length), flat, 1.0, 0.1).item()
    assert loss == pytest.approx(-math.log(0.7 / (0.7 + 0.2)), **EXACT)


def test_mallows_raters_are_not_plackett_luce_so_proportion_is_near_and_not_exact():
    debate = {"phi": 0.5, "reference_logp": np.log([0.2] * 5).tolist()}
    policy, favourites = tabular_optimum(debate, "theta", 1.0, 1.0), mallows_favourites(0.5, 5)
    assert policy.round(2).tolist() == [0.47, 0.26, 0.15, 0.08, 0.05]
    assert favourites.round(2).tolist() == [0.52, 0.26, 0.13, 0.06, 0.03]


# ---- temperatures


@pytest.mark.parametrize("tau", [0.5, 2.0, 4.0])
def test_global_temperature_is_token_temperature_times_the_product_of_z(tau):
    """On every text of up to three tokens of a random table; token 0 ends a text."""
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(2**n, 3, dtype=torch.float64, generator=generator) for n in range(3)]
    prefixes = [list(itertools.product((1, 2), repeat=n)) for n in range(4)]
    texts = [(*prefix, 0) for n in range(3) for prefix in prefixes[n]] + prefixes[3]
    log_z = [  # of all tokens of a text
        sum(
            (tables[n][prefixes[n].index(text[:n])].softmax(0) ** (1 / tau)).sum().log().item()
            for n in range(len(text))
        )
        for text in texts
    ]
    expected = text_logp(tables, 1.0) / tau - torch.tensor(log_z, dtype=torch.float64)
    torch.testing.assert_close(text_logp(tables, tau), expected)


def test_a_token_temperature_reverses_the_order_of_two_texts():
    """A text of two tokens, 0.6 times 0.9, and one of a single token, 0.4, at temperature 2."""
    first, second = (
        next_token_probs(torch.tensor([p]).log(), temperature=2.0)[0].tolist()
        for p in ([0.6, 0.4], [0.9, 0.1])
    )
    assert [round(p, 2) for p in (first[0] * second[0], first[1])] == [0.41, 0.45]  # once 0.54 and 0.40


def test_a_global_temperature_above_1_lengthens_texts():
    """All texts of up to 6 tokens; one ends with probability 0.3 and has tokens of 0.3, 0.2 and 0.2."""
    tokens = (0.3, 0.2, 0.2)
    for tau, expected in ((1, 0.7), (1.25, 0.934), (2, 1.44)):
        by_length = [
            sum((math.prod(text) * 0.3) ** (1 / tau) for text in itertools.product(tokens, repeat=n))
            for n in range(7)
        ]
        growth = [longer / shorter for shorter, longer in itertools.pairwise(by_length)]
        assert growth == pytest.approx([expected] * 6, abs=0.005)
        s = growth[0]
        if s < 1:
            n = np.arange(2000)
            assert np.average(n, weights=s**n) == pytest.approx(s / (1 - s))
            assert round(s / (1 - s), 1) == {1: 2.3, 1.25: 14.1}[tau]


# ---- Mallows models, by enumeration of all rankings


def enumerate_mallows(items, phi, distance):
    """All rankings (place of each item), and their probabilities phi^distance / Z."""
    places = np.array(list(itertools.permutations(range(items))))
    weights = np.array([phi ** distance(place) for place in places])
    return places, weights / weights.sum()


def kendall(place):
    return sum(place[i] > place[j] for i, j in itertools.combinations(range(len(place)), 2))


def spearman(place):
    return ((place - np.arange(len(place))) ** 2).sum()


def win_rate(places, probs, i, j):
    return probs[places[:, i] < places[:, j]].sum()


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("items", [2, 3, 5])
def test_under_kendall_s_tau_a_preference_is_the_phi_link_whatever_else_is_ranked(items, phi):
    places, probs = enumerate_mallows(items, phi, kendall)
    for i, j in itertools.combinations(range(items), 2):
        link = phi_link(torch.tensor(j - i, dtype=torch.float64), phi).item()
        assert win_rate(places, probs, i, j) == pytest.approx(link, **EXACT)


def corollary_2(phi, ranks_apart):
    """The preference that the theta loss gives to beta Delta = ranks_apart at c = -2 log phi."""
    logp = torch.tensor([[ranks_apart, 0.0]], dtype=torch.float64)
    policy, zero = Stats(logp, torch.ones(1, 2)), Stats(torch.zeros(1, 2), torch.ones(1, 2))
    return mallows_theta_loss(policy, zero, -2 * math.log(phi), 1.0).neg().exp().item()


@pytest.mark.parametrize("phi", PHIS)
def test_under_spearman_s_rho_corollary_2_is_exact_for_two_items_only(phi):
    places, probs = enumerate_mallows(2, phi, spearman)
    assert win_rate(places, probs, 0, 1) == pytest.approx(corollary_2(phi, 1), **EXACT)
    for items in (3, 5):
        places, probs = enumerate_mallows(items, phi, spearman)
        for i, j in itertools.combinations(range(items), 2):  # the model agrees more, whichever the pair
            assert win_rate(places, probs, j, i) < 0.999 * corollary_2(phi, i - j)
    # of five items, the preference depends on more than the difference of ranks
    assert win_rate(places, probs, 0, 1) < win_rate(places, probs, 1, 2)


def test_the_numbers_of_corollary_2_for_five_items():
    places, probs = enumerate_mallows(5, 0.8, spearman)
    model = [win_rate(places, probs, 0, j) for j in range(1, 5)]
    assert [round(p, 2) for p in model] == [0.66, 0.82, 0.92, 0.97]
    assert [round(corollary_2(0.8, j), 2) for j in range(1, 5)] == [0.61, 0.71, 0.79, 0.86]


@pytest.mark.parametrize("phi", PHIS)
def test_corollary_2_is_the_independent_comparison_that_makes_a_mallows_theta_ranking(phi):
    """Compare all pairs independently by corollary 2, and keep the outcome if it is a ranking."""
    places, probs = enumerate_mallows(4, phi, spearman)
    product = np.ones(len(places))
    for i, j in itertools.combinations(range(4), 2):
        p = corollary_2(phi, j - i)
        product *= np.where(places[:, i] < places[:, j], p, 1 - p)
    assert product / product.sum() == pytest.approx(probs, **EXACT)


# ---- the phi link


@pytest.mark.parametrize("phi", PHIS)
def test_the_jump_of_the_phi_link_and_its_two_slopes_at_0(phi):
    s = torch.tensor([0.0, -1e-9], dtype=torch.float64, requires_grad=True)  # right and left of the jump
    policy = Stats(torch.stack([s, torch.zeros_like(s)], 1), torch.ones(2, 2))
    loss = mallows_phi_loss(policy, Stats(torch.zeros(2, 2), policy.length), phi, 1.0)
    (slope,) = torch.autograd.grad(loss.sum(), s)
    right = 1 / (1 - phi) + 1 / math.log(phi)
    assert (-loss).exp().tolist() == pytest.approx([right, 1 - right], rel=1e-7)
    assert (slope[1] / slope[0]).item() == pytest.approx(right / (1 - right), rel=1e-6)


def test_what_the_phi_link_becomes_as_people_disagree_and_as_they_agree():
    u = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    limit = (1 - (1 + u) * (-u).exp()) / (1 - (-u).exp()) ** 2
    L = 1e-6
    torch.testing.assert_close(phi_link(u / L, math.exp(-L)), limit, rtol=0, atol=L)
    d = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(phi_link(d, math.exp(-L)).logit() / L, (2 * d + 1) / 3, rtol=1e-4, atol=0)
    torch.testing.assert_close(phi_link(d, math.exp(-8)).logit(), 8 * d - d.log(), rtol=0, atol=1e-2)


# ---- where the losses have their optimum; propositions 4 and 5, theorem 6


def slope_at(policy, loss, win):
    """Largest slope by the logits of a pair's expected loss; win[i, j] is how often i is preferred to j."""
    logp = torch.from_numpy(np.log(policy)).requires_grad_()
    pairs = torch.tensor(list(itertools.permutations(range(5), 2)))
    share, length = torch.from_numpy(win)[pairs[:, 0], pairs[:, 1]], torch.ones(len(pairs), 2)
    losses = loss(Stats(logp[pairs], length), Stats(torch.from_numpy(REFERENCE)[pairs], length))
    (share * losses).sum().backward()
    return logp.grad.abs().max().item()


def bradley_terry(reward):
    return 1 / (1 + np.exp(reward[None, :] - reward[:, None]))


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_theta_is_dpo_with_the_reward_over_c_or_the_penalty_times_c(phi, beta):
    """Proposition 4 and theorem 6 (i), for any reward; and that an exact weight cancels the dispersion."""
    c = -2 * math.log(phi)

    def theta(policy, reference):
        return mallows_theta_loss(policy, reference, c, beta)

    weighted_reward = optimum(REFERENCE, REWARD / c, beta, beta)
    assert optimum(REFERENCE, REWARD, c * beta, c * beta) == pytest.approx(weighted_reward, **EXACT)
    win = bradley_terry(REWARD)
    psi = np.log(win / (1 - win)) @ np.exp(REFERENCE) / c  # expected over the behaviour policy pi_ref
    assert optimum(REFERENCE, psi, beta, beta) == pytest.approx(weighted_reward, **EXACT)
    assert slope_at(weighted_reward, theta, win) < 1e-9
    assert slope_at(optimum(REFERENCE, REWARD * c, beta, beta), theta, win) > 1e-3
    # raters of corollary 2
    assert slope_at(optimum(REFERENCE, -RANK, beta, beta), theta, bradley_terry(-c * RANK)) < 1e-9


def test_weighted_dpl_divides_the_reward_by_c():
    alpha, beta, c = 0.6, 0.3, 1.7

    def weighted_dpl(policy, reference):
        return mallows_dpl_loss(policy, reference, c, alpha, beta)

    win = bradley_terry(REWARD)
    assert slope_at(optimum(REFERENCE, REWARD / c, alpha, beta), weighted_dpl, win) < 1e-9
    assert slope_at(optimum(REFERENCE, REWARD, alpha, beta), weighted_dpl, win) > 1e-3


@pytest.mark.parametrize("phi", PHIS)
def test_proposition_5_and_theorem_6_weigh_the_phi_link_twice(phi):
    beta, c = 0.7, -2 * math.log(phi)
    gaps = torch.from_numpy(RANK[None, :] - RANK[:, None])
    win = phi_link(gaps, phi).numpy()  # raters of corollary 3

    def phi_loss(policy, reference, weight=1.0):
        return mallows_phi_loss(policy, reference, phi, weight * beta)

    def weighed_twice(policy, reference):
        return phi_loss(policy, reference, c)

    corollary_3 = optimum(REFERENCE, -RANK, beta, beta)
    proposition_5 = optimum(REFERENCE, -RANK / c, beta, beta)
    theorem_6 = optimum(REFERENCE, -RANK * 2 / c, beta, beta)
    assert slope_at(corollary_3, phi_loss, win) < 1e-9
    assert slope_at(proposition_5, phi_loss, win) > 1e-2 and slope_at(theorem_6, phi_loss, win) > 1e-3
    # what it does describe: the loss -log g(c beta Delta)
    assert slope_at(proposition_5, weighed_twice, win) < 1e-9


# ---- the bandit and the best of N


def test_dpo_s_resting_point_on_the_bandit_is_the_root_of_a_cubic():
    x = max(np.roots([1, -2, 0, -3]).real)  # x^3 = 2 x^2 + 3
    assert math.log(x) == pytest.approx(0.910508, abs=1e-6)
    step = bandit.dpo_slope(math.log(x) * np.array([2.0, 1, 1, 0, -500]) @ bandit.PAIRS.T) @ bandit.PAIRS
    assert step == pytest.approx(np.zeros(5), abs=1e-12)


def test_spread_at_an_equal_mean_lowers_best_of_n_and_curves_cross_all_the_same():
    def coverage(p):
        """Mean over two problems of the chance that one of N samples is right, N = 1 to 128."""
        probs = np.zeros((1, 2, 4))
        probs[0, :, 0] = p
        return exact_coverage(probs, np.full(4, 0.25), 0)[0]

    even, spread, hot = coverage([0.3, 0.3]), coverage([0.55, 0.05]), coverage([0.3, 0.2])
    assert spread[0] == pytest.approx(even[0]) and (spread[1:] < even[1:]).all()
    assert spread[0] > hot[0] and spread[15] < hot[15]


# ---- the page itself


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/derivations.md").read_text("utf-8"))
    assert len(named) > 40
    for file, test in named:
        [path] = (ROOT / "tests").rglob(file)
        assert f"def {test}(" in path.read_text("utf-8"), f"{file}::{test}"
