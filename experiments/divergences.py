"""DPO under other f-divergences, a baseline of the DPL paper: beta E_ref[f(pi / pi_ref)] in place of the KL.

The implicit reward is beta f'(pi / pi_ref) (Wang et al., 2023, table 1), so the loss of a pair is

    -log sigmoid( beta [ f'(pi(y_w) / pi_ref(y_w)) - f'(pi(y_l) / pi_ref(y_l)) ] ).

    python experiments/divergences.py --divergence js_divergence
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.flags import flag, run_command
from core.model import Stats
from core.trainer import TrainConfig, parse_run, train


def _bounded_expm1(x: Tensor) -> Tensor:
    return x.clamp(max=80).expm1()  # exp(89) overflows float32


# f' as a function of x = log(pi / pi_ref), without constants, which cancel. The bound on expm1 leaves no
# gradient below x = -80 (alpha_divergence: -80 / a)
DIVERGENCES = {
    "reverse_kl": lambda x, a: x,
    "forward_kl": lambda x, a: -_bounded_expm1(-x),
    "js_divergence": lambda x, a: F.logsigmoid(x),
    "alpha_divergence": lambda x, a: -_bounded_expm1(-a * x) / a,
}


@dataclass
class DivergenceConfig(TrainConfig):
    """Flags of experiments/divergences.py."""

    out_dir: str = flag("out/divergence", "Folder for the adapter, metrics.jsonl and checkpoint/.")
    beta: float = flag(0.1, "Weight of the divergence.", "(0, inf)")
    divergence: str = flag("forward_kl", "reverse_kl is DPO.", tuple(DIVERGENCES))
    divergence_alpha: float = flag(0.5, "For alpha_divergence: towards 0 it is the reverse KL.", "(0, 1)")


def margin(policy: Stats, reference: Stats, beta: float, name: str, a: float) -> Tensor:
    """The implicit reward of chosen minus rejected under the f-divergence `name`, (pairs,)."""
    chosen, rejected = (beta * DIVERGENCES[name](policy.logp - reference.logp, a)).unbind(-1)
    return chosen - rejected


def objective(policy: Stats, reference: Stats, *, config: DivergenceConfig) -> dict[str, Tensor]:
    """The loss and the implicit reward margin, both (pairs,)."""
    value = margin(policy, reference, config.beta, config.divergence, config.divergence_alpha)
    return {"loss": -F.logsigmoid(value), "reward_margin": value}


def main() -> None:
    """Train by the command line's flags."""
    config = parse_run(DivergenceConfig, __doc__)
    train(config, partial(objective, config=config))


if __name__ == "__main__":
    run_command(main)
