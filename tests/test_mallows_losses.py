"""The Mallows losses: formulas in high precision, soundness in float32, TRL."""

import math
from functools import partial
from types import SimpleNamespace

import mpmath
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trl.experimental.cpo import CPOTrainer

from core.model import Stats, pair_stats
from core.pairs import pack
from tiny import check_against_trl, make_policy_and_reference, one_pair, phi_link, some_stats
from train_dpl import dpl_loss
from train_mallows import (
    MallowsConfig,
    mallows_dpl_loss,
    mallows_ipo_loss,
    mallows_phi_loss,
    mallows_simpo_loss,
    mallows_theta_loss,
    objective,
)

LOGP = st.floats(-200, 0)
PENALTY = st.floats(0.01, 2)
WEIGHT = st.floats(0.01, 5)
S = st.floats(-1e4, 1e4, width=32)
PHI = st.floats(1e-6, 1 - 1e-6)
PHIS = [1e-6, 0.05, 0.5, 0.9, 1 - 1e-3, 1 - 1e-6]
# every way to call mallows_phi_loss; epsilon counts for the polynomial alone
STYLES = [("exact", 0.1), ("sigmoid", 0.1), ("polynomial", 0.1), ("polynomial", "auto"), ("polynomial", 3.0)]


def phi_loss_and_slope(s, phi, dtype=torch.float64, **flags):
    """-log g(s) and its derivative by s."""
    policy = one_pair(s, 0, dtype)
    policy.logp.requires_grad_()
    loss = mallows_phi_loss(policy, one_pair(0, 0, dtype), phi, 1.0, **flags)
    loss.sum().backward()
    assert policy.logp.grad[0, 0] == -policy.logp.grad[0, 1]
    return loss.item(), policy.logp.grad[0, 0].item()


# ---- g, against equations 13 and 12 as they are printed


def equation_13(s, phi):
    """g(s) in mpmath; at 0 its limit from the right."""
    if s < 0:
        return 1 - equation_13(-s, phi)
    f = lambda x: x / (1 - phi**x) if x else -1 / mpmath.log(phi)  # noqa: E731
    return f(s + 1) - f(s)


def equation_12(s, phi):
    """g'(s) for s > 0 in mpmath."""
    slope = lambda x: 1 / (1 - phi**x) + x * phi**x * mpmath.log(phi) / (1 - phi**x) ** 2  # noqa: E731
    return slope(s + 1) - slope(s)


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-3, 0.02, 0.1, 1.0, 7.0, 80.0])
def test_loss_and_gradient_are_those_of_equation_13(phi, size):
    with mpmath.workdps(1200):  # 1 - g(80) is 1e-478 at phi = 1e-6
        g, slope = (f(mpmath.mpf(size), mpmath.mpf(phi)) for f in (equation_13, equation_12))
        expected = {size: (-mpmath.log(g), -slope / g), -size: (-mpmath.log(1 - g), -slope / (1 - g))}
        expected = {s: tuple(map(float, values)) for s, values in expected.items()}
    for s, wanted in expected.items():
        # float64; g' is a difference of terms of size 1, so right to 1e-16 of those
        assert phi_loss_and_slope(s, phi) == pytest.approx(wanted, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("phi", PHIS)
def test_at_0_the_link_is_its_limit_from_the_right_and_the_policy_moves(phi):
    with mpmath.workdps(100):
        g, slope = (f(mpmath.mpf(10) ** -20, mpmath.mpf(phi)) for f in (equation_13, equation_12))
        expected = float(-mpmath.log(g)), float(-slope / g)
    found = phi_loss_and_slope(0.0, phi)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert found[1] < 0
    for link, epsilon in STYLES:
        assert phi_loss_and_slope(0.0, phi, torch.float32, link=link, epsilon=epsilon)[1] < 0


@pytest.mark.parametrize("phi", PHIS)
def test_ranks_one_apart_are_told_apart_with_probability_1_over_1_plus_phi(phi):
    s = torch.tensor([1.0, -1.0], dtype=torch.float64)
    found = phi_link(s, phi).tolist()
    assert found == pytest.approx([1 / (1 + phi), phi / (1 + phi)], rel=1e-12)


def test_towards_phi_1_the_link_is_flat_and_towards_0_a_step():
    s = torch.tensor([-30.0, -0.5, 0.0, 30.0], dtype=torch.float64)
    assert phi_link(s, 1.0).tolist() == pytest.approx([0.5] * 4, abs=1e-12)
    assert phi_link(s, 0.0).tolist() == pytest.approx([0, 0, 1, 1], abs=2e-3)  # phi clamped to 1e-300


# ---- soundness in float32


@settings(max_examples=200)
@given(S, S, PHI)
def test_link_rises_with_its_argument(a, b, phi):
    a, b = sorted((a, b))
    low, high = phi_link(torch.tensor([a, b]), torch.tensor(phi)).tolist()
    assert 0 <= low <= high <= 1


@given(S, PHI)
def test_the_two_orders_of_a_pair_have_probabilities_that_add_to_one(s, phi):
    assume(s != 0)  # where g jumps
    for style in STYLES:
        losses = [
            phi_loss_and_slope(x, phi, torch.float32, link=style[0], epsilon=style[1])[0] for x in (s, -s)
        ]
        assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1, abs=1e-6)
    assert phi_link(torch.tensor([s, -s]), phi).sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("link", "epsilon"), STYLES)
@settings(max_examples=200)
@given(s=S | st.floats(-1, 1, width=32) | st.sampled_from([0.0, -0.0, 0.1, -0.1, 1e4, -1e4]), phi=PHI)
def test_loss_and_gradient_are_finite_and_never_point_the_wrong_way(link, epsilon, s, phi):
    loss, slope = phi_loss_and_slope(s, torch.tensor([phi]), torch.float32, link=link, epsilon=epsilon)
    assert math.isfinite(loss) and loss >= 0
    assert math.isfinite(slope) and slope <= 0
    # a pair in the wrong order always moves; at phi = 1 - 1e-6 by 1e-7
    assert s > 0 or slope < 0


@pytest.mark.parametrize("s", [0.5, -0.5, 2000.0, -2000.0])
@pytest.mark.parametrize("c", [1e-6, 1.0, 50.0, 138.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_edge_of_the_polynomial_is_finite_at_any_dispersion(s, c, sign):
    for epsilon in ("auto", abs(s)):
        edge = sign * (2 * c if epsilon == "auto" else epsilon)
        for x in (edge, math.nextafter(edge, 0), math.nextafter(edge, 2 * edge)):
            found = phi_loss_and_slope(x, math.exp(-c), link="polynomial", epsilon=epsilon)
            assert all(map(math.isfinite, found))


# ---- the smooth stand-ins


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("epsilon", [0.1, 2.0, "auto"])
def test_polynomial_is_the_odd_cubic_with_the_links_value_and_slope_at_epsilon(phi, epsilon):
    e = -2 * math.log(phi) if epsilon == "auto" else epsilon
    with mpmath.workdps(100):
        g, slope = (f(mpmath.mpf(e), mpmath.mpf(phi)) for f in (equation_13, equation_12))
        a1, a3 = mpmath.lu_solve(mpmath.matrix([[e, e**3], [1, 3 * e**2]]), mpmath.matrix([g - 0.5, slope]))
        s = [share * e for share in (-0.999, -0.5, -1e-3, 0, 0.2, 0.999)]
        cubic = [a3 * mpmath.mpf(x) ** 3 + a1 * x + 0.5 for x in s]
        expected = [float(-mpmath.log(value)) for value in cubic]
        slopes = [float(-(3 * a3 * x**2 + a1) / value) for x, value in zip(s, cubic, strict=True)]
    found = [phi_loss_and_slope(x, phi, link="polynomial", epsilon=epsilon) for x in s]
    assert [loss for loss, _ in found] == pytest.approx(expected, rel=1e-9)
    # at phi = 1 - 1e-6, auto is 2e-6: the cubic's rounding of 1e-16 rises over that
    assert [slope for _, slope in found] == pytest.approx(slopes, rel=1e-9, abs=1e-8)
    for x in (e, -e, 1.3 * e, -5 * e):
        assert phi_loss_and_slope(x, phi, link="polynomial", epsilon=epsilon) == phi_loss_and_slope(x, phi)


@given(st.floats(-50, 50), PHI)
def test_sigmoid_link_is_theta_at_minus_log_phi(s, phi):
    policy, zero = one_pair(s, 0), one_pair(0, 0)
    found = mallows_phi_loss(policy, zero, phi, 0.7, link="sigmoid")
    torch.testing.assert_close(
        found, mallows_theta_loss(policy, zero, -math.log(phi), 0.7), rtol=1e-9, atol=0
    )


# ---- the other losses


def logistic(x):
    """-log sigmoid(x), with e to a negative power only."""
    return math.log1p(math.exp(-abs(x))) + max(-x, 0)


@settings(max_examples=200)
@given(LOGP, LOGP, LOGP, LOGP, WEIGHT, PENALTY, PENALTY, st.integers(1, 50), st.integers(1, 50))
def test_losses_are_their_formulas(chosen, rejected, ref_chosen, ref_rejected, c, alpha, beta, long, short):
    policy, reference = one_pair(chosen, rejected, length=(long, short)), one_pair(ref_chosen, ref_rejected)
    ratio, ref_ratio = chosen - rejected, ref_chosen - ref_rejected
    per_word = chosen / long - rejected / short
    expected = [
        (mallows_theta_loss(policy, reference, c, beta), logistic(c * beta * (ratio - ref_ratio))),
        (mallows_ipo_loss(policy, reference, c, beta), (c * (ratio - ref_ratio) - 1 / (2 * beta)) ** 2),
        (mallows_simpo_loss(policy, c, beta, alpha), logistic(c * (beta * per_word - alpha))),
        (
            mallows_dpl_loss(policy, reference, c, alpha, beta),
            logistic(c * (alpha * ratio - beta * ref_ratio)),
        ),
    ]
    for loss, wanted in expected:
        # float64: log-probabilities of 200 round at 3e-14, IPO's square multiplies that by up to 1e4
        assert loss.item() == pytest.approx(wanted, rel=1e-11, abs=1e-9)


def test_where_the_losses_have_their_minimum():
    zero, delta = one_pair(0, 0), torch.linspace(-30, 30, 601, dtype=torch.float64)
    policy = Stats(torch.stack([delta, 0 * delta], 1), torch.ones(601, 2))
    losses = mallows_ipo_loss(policy, zero, 2.0, 0.05)
    assert delta[losses.argmin()].item() == pytest.approx(1 / (2 * 0.05) / 2)  # c Delta = 1 / (2 beta)
    for losses in (
        mallows_theta_loss(policy, zero, 2.0, 0.05),
        mallows_simpo_loss(policy, 2.0, 0.05, 1.0),
        mallows_dpl_loss(policy, zero, 2.0, 0.1, 0.05),
        *(mallows_phi_loss(policy, zero, 0.3, 0.05, *style) for style in STYLES),
    ):
        assert (losses.diff() < 0).all()  # the better told apart, the lower


def test_dpl_with_dispersion_reduces_to_both_papers():
    policy, reference = some_stats(7)
    c = torch.rand(7) + 0.1
    torch.testing.assert_close(
        mallows_dpl_loss(policy, reference, 1.0, 0.4, 0.1), dpl_loss(policy, reference, 0.4, 0.1)
    )
    torch.testing.assert_close(
        mallows_dpl_loss(policy, reference, c, 0.3, 0.3), mallows_theta_loss(policy, reference, c, 0.3)
    )


def test_a_stack_of_tables_gives_the_losses_of_each():
    policy, reference = some_stats(3, 5)
    c = torch.rand(5) + 0.1

    def losses(p, r):
        yield mallows_theta_loss(p, r, c, 0.2)
        yield mallows_ipo_loss(p, r, c, 0.2)
        yield mallows_simpo_loss(p, c, 0.2, 0.5)
        yield mallows_dpl_loss(p, r, c, 0.4, 0.2)
        for style in STYLES:
            yield mallows_phi_loss(p, r, torch.exp(-c), 0.2, *style)

    tables = [losses(*(Stats(*(x[k] for x in stats)) for stats in (policy, reference))) for k in range(3)]
    for whole, *each in zip(losses(policy, reference), *tables, strict=True):
        assert whole.shape == (3, 5) and whole.dtype == torch.float32
        torch.testing.assert_close(whole, torch.stack(each))


# ---- TRL


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_theta_and_ipo_at_c_1_equal_trl(tmp_path, loss_type, beta):
    flags = {"loss": "theta" if loss_type == "sigmoid" else "ipo", "length_normalize": loss_type == "ipo"}
    config = MallowsConfig(beta=beta, dispersion="off", **flags)  # TRL's IPO averages over tokens
    mallows = partial(objective, config=config, scale=1.0, vocab_size=97)
    check_against_trl(tmp_path, mallows, beta=beta, loss_type=[loss_type])


def test_simpo_at_c_1_equals_trl():
    policy, _ = make_policy_and_reference()
    pairs = [([1, 2], [3, 4, 5], [6]), ([9, 8, 7], [11], [12, 13, 14, 15])]
    logps = []
    for prompt, *completions in pairs:
        for completion in completions:
            ids = torch.tensor([prompt + completion])
            labels = torch.tensor([[-100] * len(prompt) + completion])
            logps.append(CPOTrainer.get_batch_logps(policy(ids).logits, labels, average_log_prob=True))
    chosen, rejected = torch.cat(logps[::2]), torch.cat(logps[1::2])
    flags = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=0.6,
        loss_type="simpo",
        label_smoothing=0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    expected, _, _ = CPOTrainer.cpo_loss(flags, chosen, rejected)
    torch.testing.assert_close(mallows_simpo_loss(pair_stats(policy, pack(pairs)), 1.0, 2.0, 0.6), expected)
