"""DPO plus a bonus on the policy's own token entropy, whose gradient is computed because the loss uses it."""

from dataclasses import dataclass
from functools import partial

from common.flags import flag, run_command
from core.trainer import TrainConfig, parse_run, train
from train_dpl import dpl_loss


@dataclass
class Config(TrainConfig):
    beta: float = flag(0.1, "DPO's penalty towards the reference.")
    bonus: float = flag(0.1, "Weight of the mean token entropy, in nats.")


def objective(policy, reference, *, config):
    entropy = policy.entropy.mean(-1)
    dpo = dpl_loss(policy, reference, config.beta, config.beta)
    return {"loss": dpo - config.bonus * entropy, "policy_entropy": entropy}


run_command(lambda: train(config := parse_run(Config, __doc__), partial(objective, config=config)))
