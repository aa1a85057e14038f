"""DPL plus a supervised term on the chosen completion, which is logged by its name."""

from dataclasses import dataclass
from functools import partial

import train_dpl
from common.flags import flag, run_command
from core.trainer import parse_run, train


@dataclass
class Config(train_dpl.DPLConfig):
    sft_weight: float = flag(0.1, "Weight of -log pi(chosen) per token.")


def objective(policy, reference, *, config):
    values = train_dpl.objective(policy, reference, config=config)
    sft = -policy.logp[:, 0] / policy.length[:, 0]
    return values | {"loss": values["loss"] + config.sft_weight * sft, "sft": sft}


run_command(lambda: train(config := parse_run(Config, __doc__), partial(objective, config=config)))
