"""DPL, Diverse Preference Learning: DPO with its KL penalty split into an entropy and a cross-entropy.

(Paper: Diverse Preference Learning for Capabilities and Alignment. Numbers of equations and sections in the
code are the papers'.) The objective over policies pi, for a reward r,

    max_pi  E_pi[r]  +  alpha H(pi)  -  beta H(pi, pi_ref),                                       (equation 4)

rewards entropy, H(pi) = -E_pi[log pi], and charges for the cross-entropy H(pi, pi_ref) = -E_pi[log pi_ref].
Its optimum is pi proportional to pi_ref^(beta/alpha) exp(r/alpha). DPO is alpha = beta, so

    pi_DPL  is proportional to  pi_DPO^(beta/alpha):         alpha / beta is a temperature on whole sequences.

As in DPO, solve the optimum for the reward: r = alpha log pi - beta log pi_ref + alpha log Z(prompt). Z is
the same for both completions and cancels from r(chosen) - r(rejected). What is left is a logistic loss on
log-probabilities (dpl_loss). No entropy is computed: alpha scales log pi, beta shifts each pair's margin.

    python train_dpl.py --alpha 0.2              # the embedded society, two minutes on two cores
    python train_dpl.py @recipes/hh_dpl.txt --data FILE --alpha 0.2          # the paper's run on HH-RLHF
"""

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from common.flags import flag, run_command
from core.model import Stats
from core.trainer import TrainConfig, parse_run, train


@dataclass
class DPLConfig(TrainConfig):
    """Flags of train_dpl.py."""

    out_dir: str = flag("out/dpl", "Folder for the adapter, metrics.jsonl and checkpoint/.")
    alpha: float = flag(0.2, "Weight of the entropy; alpha / beta is the global temperature.", "(0, inf)")
    beta: float = flag(0.1, "Weight of the cross-entropy to the reference; alpha = beta is DPO.", "(0, inf)")
    length_normalize: bool = flag(
        False, "Average log-probabilities over tokens; alpha / beta is then no temperature."
    )


def dpl_margin(policy: Stats, reference: Stats, alpha: float, beta: float) -> Tensor:
    """Implicit reward of chosen minus rejected, with r = alpha log pi - beta log pi_ref; (pairs,).

    Before training it is (alpha - beta) [log pi_ref(y_w) - log pi_ref(y_l)], 0 only for alpha = beta. The
    gradient of a pair has the factor alpha sigmoid(-margin). So for alpha > beta the first gradients are
    largest on pairs whose chosen text is much less likely under the reference, often because it is longer.
    """
    chosen, rejected = (alpha * policy.logp - beta * reference.logp).unbind(-1)
    return chosen - rejected


def dpl_loss(policy: Stats, reference: Stats, alpha: float, beta: float) -> Tensor:
    """-log sigmoid(alpha [log pi(y_w) - log pi(y_l)] - beta [log pi_ref(y_w) - log pi_ref(y_l)]), (pairs,).

    Equation 5 of the DPL paper; y_w is chosen, y_l rejected.
    """
    return -F.logsigmoid(dpl_margin(policy, reference, alpha, beta))


def per_token(stats: Stats) -> Stats:
    """Stats with each log-probability averaged over its completion's tokens."""
    return stats._replace(logp=stats.logp / stats.length)


def objective(policy: Stats, reference: Stats, *, config: DPLConfig) -> dict[str, Tensor]:
    """The loss that `config` asks for, and the implicit reward margin; both (pairs,)."""
    if config.length_normalize:
        policy, reference = per_token(policy), per_token(reference)
    loss = dpl_loss(policy, reference, config.alpha, config.beta)
    return {"loss": loss, "reward_margin": dpl_margin(policy, reference, config.alpha, config.beta)}


def main() -> None:
    """Train by the command line's flags."""
    config = parse_run(DPLConfig, __doc__)
    train(config, partial(objective, config=config))


if __name__ == "__main__":
    run_command(main)
