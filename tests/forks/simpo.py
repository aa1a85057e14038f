"""SimPO, without a reference: -log sigmoid(beta [log pi(y_w) / |y_w| - log pi(y_l) / |y_l|] - gamma)."""

import torch.nn.functional as F

from common.flags import run_command
from core.trainer import TrainConfig, parse_run, train

BETA, GAMMA = 2.0, 0.5


def objective(policy, reference):
    chosen, rejected = (BETA * policy.logp / policy.length).unbind(-1)
    return {"loss": -F.logsigmoid(chosen - rejected - GAMMA), "reward_margin": chosen - rejected}


run_command(lambda: train(parse_run(TrainConfig, __doc__), objective, reference=False))
