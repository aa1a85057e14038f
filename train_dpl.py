"""DPL, Diverse Preference Learning: DPO with its KL penalty split into an entropy and a cross-entropy.

    max_pi  E_pi[r]  +  alpha H(pi)  -  beta H(pi, pi_ref)                                        (equation 4)

H(pi) is the entropy of the policy, H(pi, pi_ref) = -E_pi[log pi_ref] its cross-entropy to the reference.
Alpha rewards spreading out, beta charges for leaving the reference. The optimum is

    pi  ~  pi_ref^(beta/alpha) exp(r/alpha),         so that        pi_DPL  ~  pi_DPO^(beta/alpha):

alpha / beta is a temperature on whole sequences. alpha = beta is DPO. As in DPO, the reward cancels out of
the preference model, and a logistic loss on pairs remains (dpl_loss).

    python train_dpl.py --alpha 0.2              # the embedded society, a minute on a laptop; then sample.py
    python train_dpl.py @recipes/hh_dpl.txt --data FILE --alpha 0.2          # the paper's run on HH-RLHF
"""

import math
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from files import flag, parse, require, run_command
from model import Stats
from trainer import TrainConfig, train


@dataclass
class DPLConfig(TrainConfig):
    """Flags of train_dpl.py."""

    out_dir: str = flag("out/dpl", "Folder for the adapter, metrics.jsonl and checkpoint/.")
    alpha: float = flag(0.2, "Weight of the entropy bonus: alpha / beta is the global temperature.")
    beta: float = flag(0.1, "Weight of the cross-entropy to the reference; alpha = beta is DPO.")
    length_normalize: bool = flag(False, "Average log-probabilities over tokens instead of summing them.")
    divergence: str = flag(
        "reverse_kl", "For DPO also forward_kl, js_divergence, alpha_divergence."
    )
    divergence_alpha: float = flag(0.5, "For alpha_divergence, in (0, 1): towards 0 it is the reverse KL.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            require(self, name, 0 < getattr(self, name) < math.inf, "a positive number")
        require(self, "divergence", self.divergence in DIVERGENCES, f"one of {', '.join(DIVERGENCES)}")
        require(self, "divergence_alpha", 0 < self.divergence_alpha < 1, "between 0 and 1")
        plain = self.divergence == "reverse_kl" or self.alpha == self.beta
        require(self, "divergence", plain, "reverse_kl unless alpha equals beta")


def dpl_margin(policy: Stats, reference: Stats, alpha: float, beta: float) -> Tensor:
    """Implicit reward of chosen minus rejected, with r = alpha log pi - beta log pi_ref; (pairs,) in nats.

    Before training, pi = pi_ref and the margin is (alpha - beta) times the reference's log-ratio; only for
    alpha = beta is it 0. Long completions have large log-ratios, so they move first.
    """
    chosen, rejected = (alpha * policy.logp - beta * reference.logp).unbind(-1)
    return chosen - rejected


def dpl_loss(policy: Stats, reference: Stats, alpha: float, beta: float) -> Tensor:
    """-log sigmoid(alpha [log pi(y_w) - log pi(y_l)] - beta [log pi_ref(y_w) - log pi_ref(y_l)]), (pairs,).

    Equation 5 of the DPL paper; y_w is chosen, y_l rejected.
    """
    return -F.logsigmoid(dpl_margin(policy, reference, alpha, beta))


def _bounded_expm1(x: Tensor) -> Tensor:
    return x.clamp(max=80).expm1()  # exp(89) overflows float32


# f'(u) at u = pi / pi_ref = exp(x), up to a constant: the reward is beta f'(u) (Wang et al., 2023, table 1).
# The bound gives forward_kl no gradient below x = -80, and alpha_divergence none below x = -80 / a.
DIVERGENCES = {
    "reverse_kl": lambda x, a: x,
    "forward_kl": lambda x, a: -_bounded_expm1(-x),
    "js_divergence": lambda x, a: F.logsigmoid(x),
    "alpha_divergence": lambda x, a: -_bounded_expm1(-a * x) / a,
}


def divergence_margin(policy: Stats, reference: Stats, beta: float, name: str, a: float) -> Tensor:
    """DPO's implicit reward of chosen minus rejected under another f-divergence, (pairs,): a baseline."""
    chosen, rejected = (beta * DIVERGENCES[name](policy.logp - reference.logp, a)).unbind(-1)
    return chosen - rejected


def per_token(stats: Stats) -> Stats:
    """Stats with each log-probability averaged over its completion's tokens."""
    return stats._replace(logp=stats.logp / stats.length)


def objective(policy: Stats, reference: Stats, *, config: DPLConfig) -> dict[str, Tensor]:
    """The loss that `config` asks for, and the implicit reward margin; both (pairs,)."""
    if config.length_normalize:
        policy, reference = per_token(policy), per_token(reference)
    if config.divergence == "reverse_kl":
        margin = dpl_margin(policy, reference, config.alpha, config.beta)
    else:
        margin = divergence_margin(policy, reference, config.beta, config.divergence, config.divergence_alpha)
    return {"loss": -F.logsigmoid(margin), "reward_margin": margin}


def main() -> None:
    """Train by the command line's flags."""
    config = parse(DPLConfig, __doc__)
    train(config, partial(objective, config=config))


if __name__ == "__main__":
    run_command(main)
