"""Five arms and sixteen pairs: which loss keeps the good arms? MallowsPO's section 5.2, Figures 8a, 8b and 9.

Each arm pays a random reward (Table 4). In sixteen comparisons of two arms, the arm that paid more won
(Table 5). There is no prompt: the policy is pi = softmax(logits) over the arms, and the reference is uniform,
so that it cancels in Delta = logit_w - logit_l. A step of gradient descent on the mean loss is

    logits  +=  rate / 16 * sum over pairs of beta * slope(beta Delta) * (onehot_w - onehot_l)

    DPO:            loss = -log sigmoid(s)       slope = -d loss / ds = sigmoid(-s)
    MallowsPO-phi:  loss = -log g(s)             slope = -d loss / ds = g'(s) / g(s)

Among the first four arms, arm 1 won three pairs of its four, arms 2 and 3 half of theirs, though they pay
more. Arm 5 never won. Where training would converge follows from setting the mean gradient to zero: both
losses lead to pi = softmax(kappa (2, 1, 1, 0)) on the first four arms and 0 on arm 5, with

    DPO:            kappa = 0.911 / beta         at beta = 0.1: over 99.9% on arm 1, reward 15.50, KL 1.61
    MallowsPO-phi:  kappa = 0.0680 / beta        at beta = 0.1: 44%, 22%, 22%, 11%,  reward 15.88, KL 0.33

(phi = 0.05; KL to the uniform policy in nats). So MallowsPO-phi at beta converges where DPO does at 13.4
beta, much nearer to the reference than DPO at beta. The reason is the jump of g at s = 0: -log g is 2.6
times as steep just below 0 as just above. Of two pairs that contradict each other, the one that the policy
orders wrongly therefore has the larger gradient, and pulls the two arms back together. Over all beta,
however, both losses converge to the same policies: their frontiers of reward against KL differ only because
training stops earlier. A step changes Delta in proportion to beta, and so s = beta Delta in proportion to
beta^2. So the smallest betas are the furthest from convergence.

The paper states neither that the loss is a mean over pairs nor that the policy starts uniform.

    python experiments/bandit.py        # half a minute; out/bandit/metrics.json, assets/bandit_*.png
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.files import write_json
from common.flags import Flags, flag, parse, run_command
from experiments import lab
from metrics.tables import save_figure

OUTCOMES = np.array([[20, 11], [30, 3], [18, 15], [15, 10], [1, 4]])  # Table 4: an arm's two rewards ...
PROBABILITY = np.array([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.99, 0.01], [0.99, 0.01]])  # ... how likely
WON = np.array([3, 2, 2, 1, 3, 1, 1, 1, 4, 2, 2, 2, 1, 3, 3, 4])  # Table 5, arms counted from 1
LOST = np.array([5, 5, 5, 2, 5, 5, 4, 5, 5, 4, 1, 5, 3, 5, 4, 2])
REWARD = (OUTCOMES * PROBABILITY).sum(1)  # expected, of each arm
PAIRS = np.eye(5)[WON - 1] - np.eye(5)[LOST - 1]  # (16 pairs, 5 arms): onehot_w - onehot_l

BETAS = [scale * b for scale in (0.01, 0.1, 1) for b in (1, 1.5, 2, 3, 4, 5, 6, 8)]
BETAS = np.array([0.003, 0.005, 0.007, *BETAS, 10]).round(3)
AVERAGED = [0.05, 0.1, 0.5, 1]  # betas of Figure 8b
LABELS = {  # betas that Figure 8a labels, and the offset of the label in points
    "DPO": [(0.01, 3, 9), (0.03, 8, 8), (0.1, 0, -10), (0.3, 0, -10), (1, 2, -10), (3, 9, -7)],
    "MallowsPO-φ": [(0.01, -10, 6), (0.03, 13, 0), (0.1, 10, -5), (1, -8, 3)],
}
RATE, PHI = 5e-3, 0.05
RECORD_EVERY, LAST = 100, 30  # steps: between recorded policies; averaged at the end
STYLE = {
    "DPO": {"color": lab.ORANGE, "marker": "s", "ms": 4, "ls": "--"},
    "MallowsPO-φ": {"color": lab.BLUE, "marker": "o", "ms": 4, "ls": "-"},
}
ARM_STYLE = [("-", lab.BLUE), ("--", lab.RED), (":", lab.ORANGE), ("-", "0.6"), ("--", "0.6")]


class Run(NamedTuple):
    """Policies of K betas during and after training."""

    history: NDArray  # before every hundredth step, (records, K, 5)
    final: NDArray  # mean over the last 30 steps, (K, 5)


@dataclass
class BanditConfig(Flags):
    """The experiment's flags."""

    steps: int = flag(500_000, "Steps of full-batch gradient descent, as in the paper.", "[1000, inf)")
    out_dir: str = flag("out/bandit", "Folder for metrics.json.")
    picture_dir: str = flag("assets", "Folder for bandit_frontier.png and bandit_training.png.")


def dpo_slope(s: NDArray) -> NDArray:
    """-d loss / ds of loss = -log sigmoid(s), elementwise; s = beta Delta."""
    return 1 / (1 + np.exp(s))


def phi_slope(s: NDArray, phi: float = PHI) -> NDArray:
    """-d loss / ds of loss = -log g(s), elementwise, with g of equation 13; s = beta Delta.

    With L = -log phi and b(u) = u / (e^u - 1), g(s) = 1 - miss for s >= 0 and miss for s < 0, where
    miss = (b(L|s|) - b(L|s| + L)) / L and b' = b (1 - u - b) / u. At s = 0 this is the limit from above.
    """
    scale = -np.log(phi)
    u = np.maximum(scale * np.abs(s), 1e-8)  # avoids 0 / 0
    v = u + scale
    b_u, b_v = u / np.expm1(u), v / np.expm1(v)
    miss = (b_u - b_v) / scale
    derivative = b_v * (1 - v - b_v) / v - b_u * (1 - u - b_u) / u
    return derivative / np.where(s >= 0, 1 - miss, miss)


def softmax(logits: NDArray) -> NDArray:
    """Policies (..., arms) from logits (..., arms)."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


SLOPES = {"DPO": dpo_slope, "MallowsPO-φ": phi_slope}


def train(slope: Callable[[NDArray], NDArray], betas: NDArray, steps: int, name: str | None = None) -> Run:
    """Gradient descent from the uniform policy for each of `betas`, (K,); `name` shows a progress bar.

    The final policy is a mean over the last steps, as in the paper: it oscillates around the jump of g.
    """
    logits = np.zeros((len(betas), 5))
    beta, rate, pairs = betas[:, None], RATE / len(PAIRS) * betas[:, None], np.ascontiguousarray(PAIRS.T)
    history, last = [], []
    for step in trange(steps, desc=name, unit=" steps", unit_scale=True, disable=name is None):
        if step % RECORD_EVERY == 0:
            history.append(softmax(logits))
        logits += rate * (slope(beta * (logits @ pairs)) @ PAIRS)
        if step >= steps - LAST:
            last.append(softmax(logits))
    return Run(np.array(history), np.mean(last, 0))


def reward_and_kl(policy: NDArray) -> tuple[NDArray, NDArray]:
    """Expected reward, and KL(policy || uniform) in nats, both (...); `policy` is (..., 5)."""
    logp = np.log(policy, out=np.zeros_like(policy), where=policy > 0)
    return policy @ REWARD, (policy * logp).sum(-1) + np.log(policy.shape[-1])


def best_reward(kl: NDArray, frontier: NDArray) -> NDArray:
    """The highest reward of one method at no more than each `kl`, (M,), interpolated between policies.

    `kl` is (M,) in nats; `frontier` is the method's policies, (K, 5), and the reference is added to them.
    """
    reward, distance = reward_and_kl(np.vstack([np.full(5, 0.2), frontier]))
    order = np.argsort(distance)
    return np.interp(kl, distance[order], np.maximum.accumulate(reward[order]))


def log_spaced(records: int) -> NDArray:
    """About 200 of the indices 0 ... records - 1, spaced evenly on a log scale."""
    return np.unique(np.geomspace(1, records, 200).astype(int)) - 1


def summary(runs: dict[str, Run], steps: int) -> dict:
    """The numbers of Figures 8a and 8b, and how far MallowsPO-phi's frontier lies above DPO's."""
    result = {"steps": steps, "rate": RATE, "phi": PHI, "frontier": {}, "training": {}}
    for name, run in runs.items():
        rows = zip(BETAS, *reward_and_kl(run.final), run.final.tolist(), strict=True)
        result["frontier"][name] = [
            {"beta": beta, "reward": reward, "kl": kl, "policy": policy} for beta, reward, kl, policy in rows
        ]
        at = log_spaced(len(run.history))
        reward, kl = reward_and_kl(run.history[at][:, np.isin(BETAS, AVERAGED)])
        curve = {"step": RECORD_EVERY * at, "reward": reward.mean(-1), "kl": kl.mean(-1)}
        result["training"][name] = {key: values.tolist() for key, values in curve.items()}
    dpo, phi = (run.final for run in runs.values())
    reward, kl = reward_and_kl(dpo)
    gain = best_reward(kl, phi) - best_reward(kl, dpo)
    result["gain"] = {"least": gain.min(), "most": gain.max()}
    return result


def draw_frontier(result: dict, path: Path) -> None:
    """Plot reward against KL: final policies of all betas (Figure 8a), and during training (Figure 8b).

    The line on the left is where both losses converge: softmax(kappa (2, 1, 1, 0)) on the first four arms,
    for all kappa.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.4))
    kappa = np.geomspace(1e-3, 100, 300)[:, None]
    ends = np.pad(softmax(kappa * [2, 1, 1, 0]), ((0, 0), (0, 1)))
    left.plot(*reward_and_kl(ends)[::-1], **lab.EXACT, label="where both converge")
    for name, style in STYLE.items():
        rows, curve = result["frontier"][name], result["training"][name]
        points = style | {"ls": "none"}
        left.plot([row["kl"] for row in rows], [row["reward"] for row in rows], label=name, **points)
        right.plot(curve["kl"], curve["reward"], markevery=10, label=name, **style)
        for beta, dx, dy in LABELS[name]:
            row = next(row for row in rows if row["beta"] == beta)
            at = {"xytext": (dx, dy), "textcoords": "offset points", "ha": "center", "va": "center"}
            left.annotate(f"{beta:g}", (row["kl"], row["reward"]), fontsize=8, color=style["color"], **at)
    title = f"After {result['steps']:,} steps φ earns more,\nbut both converge to one line (a point: one β)"
    left.set(title=title, ylabel="expected reward", ylim=(15.4, 16.2))
    right.set_title("During training φ earns more at the same KL\n(mean of β = 0.05, 0.1, 0.5 and 1)")
    right.set_ylabel("mean expected reward")
    for axis, loc in ((left, "upper right"), (right, "lower right")):
        axis.set_xlabel("KL to the uniform reference, nats")
        axis.legend(loc=loc)
    save_figure(figure, path)


def draw_training(runs: dict[str, Run], path: Path) -> None:
    """Plot each arm's probability against the step (Figure 9): one row per beta, one column per loss."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.4), sharex=True, sharey=True)
    for row, beta in zip(axes, (0.05, 0.1), strict=True):
        row[0].set_ylabel("probability of each arm")
        for axis, (name, run) in zip(row, runs.items(), strict=True):
            at = log_spaced(len(run.history))
            step = RECORD_EVERY * at
            for arm, (ls, color) in enumerate(ARM_STYLE):
                label = f"arm {arm + 1}, pays {REWARD[arm]:.4g}"
                policy = run.history[at, BETAS.tolist().index(beta), arm]
                mark = {"marker": f"${arm + 1}$", "ms": 7, "markevery": (6 * arm, 30)}
                axis.plot(step, policy, ls=ls, color=color, lw=1.2, label=label, **mark)
            kept = (run.final[BETAS.tolist().index(beta)] > 0.05).sum()
            axis.set_title(f"{name}, β = {beta}: {kept} of 5 arms above 5%")
            axis.set(xscale="log", xlim=(max(step[-1] / 500, RECORD_EVERY), None), ylim=(-0.03, 1.03))
    for axis in axes[1]:
        axis.set_xlabel("steps")
    axes[0, 0].legend(loc="upper left")
    save_figure(figure, path)


def main() -> None:
    """Train with both losses at every beta; print the frontiers, write metrics.json and the pictures."""
    config = parse(BanditConfig, __doc__)
    runs = {name: train(slope, BETAS, config.steps, name) for name, slope in SLOPES.items()}
    result = summary(runs, config.steps)
    print(" beta", *(f"{name:>12}: reward     KL  policy{'':28}" for name in runs))
    for rows in zip(*result["frontier"].values(), strict=True):
        policies = (" ".join(f"{p:.3f}" for p in row["policy"]) for row in rows)
        cells = (
            f"{row['reward']:21.3f} {row['kl']:6.3f}  {p}" for row, p in zip(rows, policies, strict=True)
        )
        print(f"{rows[0]['beta']:5g}", *cells)
    gain = result["gain"]
    print(f"MallowsPO-φ's frontier over DPO's at DPO's KLs: {gain['least']:+.3f} to {gain['most']:+.3f}")
    write_json(Path(config.out_dir) / "metrics.json", result)
    draw_frontier(result, Path(config.picture_dir) / "bandit_frontier.png")
    draw_training(runs, Path(config.picture_dir) / "bandit_training.png")


if __name__ == "__main__":
    run_command(main)
