"""DPO under other f-divergences: TRL's scores and TRL's trainer."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.divergences import DivergenceConfig, objective
from experiments.divergences import margin as divergence_margin
from tiny import check_against_trl, one_pair

PENALTY = st.floats(0.01, 2)
LOG_RATIO = st.floats(-1e4, 1e4, allow_subnormal=False)
# TRL 1.16's scores of a log-ratio x, from its source, as functions of x and f_alpha_divergence_coef
TRL_SCORES = {
    "reverse_kl": lambda x, coef: x,
    "forward_kl": lambda x, coef: 1 - math.exp(-x),
    "js_divergence": lambda x, coef: math.log(2) - math.log1p(math.exp(-x)),
    "alpha_divergence": lambda x, coef: (math.exp((coef - 1) * x) - 1) / (coef - 1),
}


CASES = [("forward_kl", 0.5), ("js_divergence", 0.5), *(("alpha_divergence", a) for a in (0.2, 0.5, 0.9))]


@pytest.mark.parametrize(("name", "a"), CASES)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_loss_and_gradient_equal_trl(tmp_path, name, a, beta):
    flags = {"f_divergence_type": name}
    if name == "alpha_divergence":
        flags["f_alpha_divergence_coef"] = 1 - a
    config = DivergenceConfig(beta=beta, divergence=name, divergence_alpha=a)
    check_against_trl(tmp_path, partial(objective, config=config), beta=beta, **flags)


@pytest.mark.parametrize("name", TRL_SCORES)
@settings(deadline=None, max_examples=100)
@given(
    x=st.floats(-30, 30),
    y=st.floats(-30, 30),
    reference=st.floats(-100, 0),
    beta=PENALTY,
    a=st.floats(0.01, 0.99),
)
def test_divergence_margins_are_differences_of_trl_scores(name, x, y, reference, beta, a):
    policy, known = one_pair(reference + x, reference + y), one_pair(reference, reference)
    score = TRL_SCORES[name]
    scores = score(x, 1 - a), score(y, 1 - a)
    margin = divergence_margin(policy, known, beta, name, a).item()
    # float64: reference + x - reference moves x by 1e-14, and a score by that share of itself
    tolerance = 1e-11 * beta * (1 + abs(scores[0]) + abs(scores[1])) + 1e-13 * beta / a
    assert margin == pytest.approx(beta * (scores[0] - scores[1]), rel=0, abs=tolerance)


@pytest.mark.parametrize("name", TRL_SCORES)
@settings(deadline=None, max_examples=100)
@given(x=LOG_RATIO, y=LOG_RATIO, beta=PENALTY, a=st.floats(0.01, 0.99))
def test_divergences_are_finite_with_finite_gradients(name, x, y, beta, a):
    policy, zero = one_pair(x, y, torch.float32), one_pair(0, 0, torch.float32)
    policy.logp.requires_grad_()
    margin = divergence_margin(policy, zero, beta, name, a)
    loss = -F.logsigmoid(margin)
    loss.sum().backward()
    assert margin.isfinite().all()
    assert loss.isfinite().all()
    assert policy.logp.grad.isfinite().all()


@pytest.mark.parametrize("a", [1e-4, 1e-6, 1e-8])
def test_alpha_divergence_towards_0_is_reverse_kl(a):
    policy, zero = one_pair(3.3, -2.6, torch.float32), one_pair(0, 0, torch.float32)
    margin = divergence_margin(policy, zero, 1.0, "alpha_divergence", a).item()
    assert margin == pytest.approx(
        5.9, abs=10 * a + 1e-5
    )  # the series' next term, a (3.3² - 2.6²) / 2, and float32
