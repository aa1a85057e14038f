"""DPL, Diverse Preference Learning: DPO whose KL penalty is split in two.

    max_pi  E_pi[r] + alpha H(pi) - beta H(pi, pi_ref)         optimum:  pi ~ pi_ref^(beta/alpha) exp(r/alpha)

H(pi) is entropy, H(pi, pi_ref) = -E_pi[log pi_ref] cross-entropy: alpha rewards spreading out, beta charges
for leaving the reference (equation 4). alpha = beta is DPO; alpha / beta is a temperature on whole sequences,
pi_DPL ~ pi_DPO^(beta/alpha); alpha = 1 with a flat reference gives back the population's shares. As in DPO,
the reward drops out and a logistic loss on pairs remains (dpl_loss).

    python train_dpl.py --alpha 0.2 --out_dir out/dpl         # the embedded society, a minute on a laptop
    python train_dpl.py @recipes/hh_dpl.txt --data FILE --alpha 0.2       # the paper's run on HH-RLHF
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from files import flag, parse, require, run_command
from model import Stats
from trainer import Objective, TrainConfig, train


@dataclass
class DPLConfig(TrainConfig):
    """DPL's own flags."""

    out_dir: str = flag("out/dpl", "Where the adapter, metrics.jsonl and checkpoint/ go.")
    alpha: float = flag(0.2, "Entropy bonus: alpha / beta is the global temperature.")
    beta: float = flag(0.1, "Cross-entropy penalty towards the reference; alpha = beta is DPO.")
    length_normalize: bool = flag(False, "Average log-probabilities over tokens instead of summing.")
    divergence: str = flag("reverse_kl", "For DPO also forward_kl, js_divergence or alpha_divergence.")
    divergence_alpha: float = flag(0.5, "Which alpha_divergence, in (0, 1): towards 0 is reverse KL.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            require(self, name, 0 < getattr(self, name) < math.inf, "a positive number")
        require(self, "divergence", self.divergence in DIVERGENCES, f"one of {', '.join(DIVERGENCES)}")
        require(self, "divergence_alpha", 0 < self.divergence_alpha < 1, "between 0 and 1")
        plain = self.divergence == "reverse_kl" or self.alpha == self.beta
        require(self, "divergence", plain, "reverse_kl unless alpha equals beta")


def dpl_margin(policy: Stats, reference: Stats, alpha: float, beta: float) -> Tensor:
    """Implicit reward of chosen over rejected, r = alpha log pi - beta log pi_ref, (pairs,) in nats.

    At the start, pi = pi_ref, it is (alpha - beta) times the reference's log-ratio, not zero as in DPO.
    """
    reward = alpha * policy.logp - beta * reference.logp
    return reward[..., 0] - reward[..., 1]


def dpl_loss(policy: Stats, reference: Stats, alpha: float, beta: float) -> Tensor:
    """-log sigmoid(alpha [log pi(y_w) - log pi(y_l)] - beta [log pi_ref(y_w) - log pi_ref(y_l)]), (pairs,).

    Equation 5 of the DPL paper.
    """
    return -F.logsigmoid(dpl_margin(policy, reference, alpha, beta))


def _capped_expm1(x: Tensor) -> Tensor:
    return x.clamp(max=80).expm1()  # exp(89) overflows float32


# f'(u) at u = pi / pi_ref = exp(x), up to a constant: the reward is beta f'(u) (Wang et al., 2023, table 1)
DIVERGENCES = {
    "reverse_kl": lambda x, a: x,
    "forward_kl": lambda x, a: -_capped_expm1(-x),
    "js_divergence": lambda x, a: F.logsigmoid(x),
    "alpha_divergence": lambda x, a: -_capped_expm1(-a * x) / a,
}


def divergence_margin(policy: Stats, reference: Stats, beta: float, name: str, a: float) -> Tensor:
    """DPO's implicit reward of chosen over rejected under another f-divergence, (pairs,): a baseline."""
    reward = beta * DIVERGENCES[name](policy.logp - reference.logp, a)
    return reward[:, 0] - reward[:, 1]


def per_token(stats: Stats) -> Stats:
    """Log-probabilities as averages over each completion's tokens."""
    return stats._replace(logp=stats.logp / stats.length)


def objective(config: DPLConfig) -> Objective:
    """The losses and margins that `config` asks for."""

    def run(policy: Stats, reference: Stats) -> tuple[Tensor, Tensor]:
        if config.length_normalize:
            policy, reference = per_token(policy), per_token(reference)
        if config.divergence == "reverse_kl":
            margin = dpl_margin(policy, reference, config.alpha, config.beta)
            return dpl_loss(policy, reference, config.alpha, config.beta), margin
        margin = divergence_margin(policy, reference, config.beta, config.divergence, config.divergence_alpha)
        return -F.logsigmoid(margin), margin

    return run


def main() -> None:
    """Train by the command line's flags."""
    config = parse(DPLConfig, __doc__)
    train(config, lambda *_: objective(config))


if __name__ == "__main__":
    run_command(main)
