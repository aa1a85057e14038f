"""The DPL loss: its formula, its optimum in closed form, and TRL's DPOTrainer where the two are the same."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.model import Stats
from tiny import check_against_trl, one_pair, some_stats
from train_dpl import DPLConfig, dpl_loss, dpl_margin, objective, per_token

LOG_RATIO = st.floats(-1e4, 1e4, allow_subnormal=False)
LOGP = st.floats(-200, 0)
PENALTY = st.floats(0.01, 2)


# ---- the formula


@settings(deadline=None, max_examples=200)
@given(LOGP, LOGP, LOGP, LOGP, PENALTY, PENALTY)
def test_loss_is_equation_5(chosen, rejected, ref_chosen, ref_rejected, alpha, beta):
    loss = dpl_loss(one_pair(chosen, rejected), one_pair(ref_chosen, ref_rejected), alpha, beta)
    margin = alpha * (chosen - rejected) - beta * (ref_chosen - ref_rejected)
    # -log(1 / (1 + e^-m)), with e to a negative power only
    expected = math.log(1 + math.exp(-margin)) if margin > 0 else -margin + math.log(1 + math.exp(margin))
    # float64; 1 + e^-m rounds at 1e-16 absolutely, the margin at 1e-16 of its terms (up to 800)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(LOGP, LOGP, PENALTY, PENALTY)
def test_at_the_reference_the_margin_is_alpha_minus_beta_times_its_log_ratio(chosen, rejected, alpha, beta):
    stats = one_pair(chosen, rejected)
    margin = dpl_margin(stats, stats, alpha, beta).item()
    assert margin == pytest.approx((alpha - beta) * (chosen - rejected), rel=1e-12, abs=1e-11)


@settings(deadline=None, max_examples=100)
@given(LOG_RATIO, LOG_RATIO, LOG_RATIO, LOG_RATIO, PENALTY, PENALTY)
def test_loss_and_gradient_stay_finite_in_float32(chosen, rejected, ref_chosen, ref_rejected, alpha, beta):
    policy = one_pair(chosen, rejected, torch.float32)
    policy.logp.requires_grad_()
    loss = dpl_loss(policy, one_pair(ref_chosen, ref_rejected, torch.float32), alpha, beta)
    loss.backward()
    assert loss.isfinite().all()
    assert policy.logp.grad.isfinite().all()
    assert policy.logp.grad.abs().max() <= alpha * (1 + 1e-6)  # a sigmoid's slope is at most 1


# ---- TRL


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        ({}, {}),
        ({"length_normalize": True}, {"loss_type": "sigmoid_norm"}),
    ],
)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_loss_and_gradient_equal_trl(tmp_path, config, flags, beta):
    config = DPLConfig(alpha=beta, beta=beta, **config)
    check_against_trl(tmp_path, partial(objective, config=config), beta=beta, **flags)


# ---- what training reaches: tabular policies on the exact expected loss


def trained(reference, win, alpha, beta):
    """Probabilities that minimise the expected DPL loss; win[i, j] is how often i is preferred to j."""
    n = len(reference)
    pairs = torch.tensor([(i, j) for i in range(n) for j in range(n) if i != j])
    weight = win[pairs[:, 0], pairs[:, 1]] / len(pairs)
    known = Stats(reference.log()[pairs], torch.ones(pairs.shape))
    scores = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        policy = Stats(scores.log_softmax(0)[pairs], known.length)
        total = (weight * dpl_loss(policy, known, alpha, beta)).sum()
        total.backward()
        return total

    optimizer.step(loss)
    return scores.detach().softmax(0)


def plackett_luce(utility):
    """How often i is preferred to j by raters whose favourites are softmax(utility)."""
    return torch.sigmoid(utility[:, None] - utility[None, :])


def normalized(weights):
    return weights / weights.sum()


CLOSE = {"atol": 0, "rtol": 1e-3}  # of each probability, however small: what the optimiser leaves
FLAT = torch.full((4,), 0.25, dtype=torch.float64)
SKEWED = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
UTILITY = torch.tensor([0.0, 0.5, -0.7, 1.1], dtype=torch.float64)


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.1), (0.2, 0.1), (1.0, 0.1), (1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("p", [0.5, 0.6, 0.8])
@pytest.mark.parametrize("reference", [0.5, 0.3, 0.9])
def test_two_outcomes_reach_the_closed_form(alpha, beta, p, reference):
    reference = torch.tensor([reference, 1 - reference], dtype=torch.float64)
    share = torch.tensor([p, 1 - p], dtype=torch.float64)
    win = share[:, None].expand(2, 2)
    expected = normalized(reference ** (beta / alpha) * share ** (1 / alpha))
    torch.testing.assert_close(trained(reference, win, alpha, beta), expected, **CLOSE)


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.1), (0.5, 0.5), (1.0, 0.3), (2.0, 1.0), (0.3, 0.6)])
@pytest.mark.parametrize("reference", [FLAT, SKEWED], ids=["flat", "skewed"])
def test_many_outcomes_reach_the_closed_form(alpha, beta, reference):
    expected = normalized(reference ** (beta / alpha) * (UTILITY / alpha).exp())
    torch.testing.assert_close(trained(reference, plackett_luce(UTILITY), alpha, beta), expected, **CLOSE)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_alpha_1_and_a_flat_reference_give_proportional_representation(beta):
    shares = torch.tensor([0.55, 0.20, 0.15, 0.10], dtype=torch.float64)
    torch.testing.assert_close(trained(FLAT, plackett_luce(shares.log()), 1.0, beta), shares, **CLOSE)


def test_dpo_leaves_a_minority_of_one_fifth_one_in_a_million():
    win = torch.tensor([0.8, 0.2], dtype=torch.float64)[:, None].expand(2, 2)
    flat = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert trained(flat, win, 0.1, 0.1)[1].item() == pytest.approx(1 / (1 + 4**10), rel=1e-2)  # 9.5e-7
    assert trained(flat, win, 1.0, 0.1)[1].item() == pytest.approx(0.2, rel=1e-2)


@pytest.mark.parametrize(("alpha", "beta"), [(0.4, 0.2), (1.0, 0.2), (0.3, 0.6)])
def test_dpl_is_dpo_at_temperature_alpha_over_beta(alpha, beta):
    win = plackett_luce(UTILITY)
    dpo, dpl = trained(SKEWED, win, beta, beta), trained(SKEWED, win, alpha, beta)
    torch.testing.assert_close(dpl, normalized(dpo ** (beta / alpha)), **CLOSE)
    assert dpl.argsort().tolist() == dpo.argsort().tolist()


# ---- the flags


def test_per_token_divides_by_the_length():
    stats = Stats(torch.tensor([[-6.0, -2.0]]), torch.tensor([[3.0, 4.0]]))
    assert per_token(stats).logp.tolist() == [[-2.0, -0.5]]
    assert per_token(stats).length is stats.length


@pytest.mark.parametrize("length_normalize", [False, True])
def test_objective_does_what_its_flags_say(length_normalize):
    config = DPLConfig(alpha=0.3, beta=0.2, length_normalize=length_normalize)
    policy, reference = some_stats(5)
    values = objective(policy, reference, config=config)
    rewards = []  # in plain numbers, completion by completion: equation 5
    flat = [x.flatten().tolist() for x in (policy.logp, reference.logp, policy.length, reference.length)]
    for p, r, p_size, r_size in zip(*flat):
        p, r = (p / p_size, r / r_size) if length_normalize else (p, r)
        rewards.append(0.3 * p - 0.2 * r)
    margins = [chosen - rejected for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True)]
    assert values["reward_margin"].tolist() == pytest.approx(margins, rel=1e-4, abs=1e-5)  # float32
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    assert values["loss"].tolist() == pytest.approx(losses, rel=1e-4, abs=1e-5)
    assert set(values) == {"loss", "reward_margin"}
