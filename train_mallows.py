"""MallowsPO: DPO weighted by how much people disagree about the prompt.

A Mallows model scatters people's rankings of the completions around a central one, by a dispersion phi(x) in
(0, 1]: near 0 a prompt has one answer, at 1 anything goes. With the negative central rank as the reward,
which drops out as in DPO, the chosen completion is preferred with probability

    g(beta Delta),      Delta = log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l).

The distance between rankings decides g: Spearman's rho (theta) or Kendall's tau (phi), with c = -log phi (the
paper's -2 log phi, its 2 a part of phi*),

    theta:  g(s) = sigmoid(c(x) s)
    phi:    g(s) = f(s + 1) - f(s),  f(z) = z / (1 - phi(x)^z),  for s > 0;  g(-s) = 1 - g(s)

Nothing is learned for c: where the reference is unsure of the next token, people are taken to disagree. With
h the mean token entropy of the reference over a completion,

    c(x) = -phi* log( (h(y_w) + h(y_l)) / (2 log V) ),      phi* such that c's mean over the data is 1.

In theta, c = 1 is DPO, and c scales the KL penalty of its prompt (proposition 4): a dispersed prompt, with
its small c, is held less closely to the reference. The same weight makes MallowsIPO, MallowsSimPO and a
dispersion-weighted DPL.

    python train_mallows.py --out_dir out/mallows                          # the embedded society
    python train_mallows.py @recipes/llama3_mallows.txt --data FILE        # the paper's run on UltraFeedback
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from files import flag, parse, require, run_command, write_json, write_whole
from model import Stats
from parallel import rank
from train_dpl import dpl_margin, per_token
from trainer import Objective, TrainConfig, train

LOSSES = ("theta", "phi", "ipo", "simpo", "dpl")


@dataclass
class MallowsConfig(TrainConfig):
    """MallowsPO's own flags."""

    data: str = flag("data/society/debates.jsonl.gz", "Training rows: .jsonl[.gz], .json, .parquet.")
    out_dir: str = flag("out/mallows", "Where the adapter, metrics.jsonl and dispersion.json go.")
    loss: str = flag("theta", "theta (DPO, weighted), phi, ipo, simpo or dpl.")
    link: str = flag("exact", "For phi: exact, or its smooth stand-ins sigmoid and polynomial.")
    epsilon: str = flag("0.1", "The polynomial stands in on [-epsilon, epsilon]; auto is -2 log phi(x).")
    dispersion: str = flag("on", "off sets c(x) = 1: plain DPO, IPO, SimPO and DPL, or phi = 1/e.")
    dispersion_scale: float | None = flag(None, "phi* (default: what gives c(x) the mean 1 over --data).")
    alpha: float = flag(0.2, "For dpl: entropy bonus.")
    beta: float = flag(0.1, "Penalty towards the reference; SimPO's scale of the reward.")
    gamma: float = flag(0.5, "For simpo: the margin the reward should reach.")
    length_normalize: bool = flag(False, "Average log-probabilities over tokens, as simpo always does.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            require(self, name, 0 < getattr(self, name) < math.inf, "a positive number")
        require(self, "gamma", 0 <= self.gamma < math.inf, "0 or more, and finite")
        require(self, "loss", self.loss in LOSSES, f"one of {', '.join(LOSSES)}")
        require(self, "link", self.link in LINKS, f"one of {', '.join(LINKS)}")
        require(self, "link", self.link == "exact" or self.loss == "phi", "exact unless --loss is phi")
        try:
            width = self.epsilon == "auto" or 0 < float(self.epsilon) < math.inf
        except ValueError:
            width = False
        require(self, "epsilon", width, "a positive number or auto")
        require(self, "dispersion", self.dispersion in ("on", "off"), "on or off")
        fits = self.dispersion_scale is None or 0 < self.dispersion_scale < math.inf
        require(self, "dispersion_scale", fits, "a positive number")


def neg_log_dispersion(entropy: Tensor, vocab_size: int) -> Tensor:
    """-log of the pair's mean entropy over log V, (pairs,), positive: equation 17 before the scale phi*.

    `entropy` is (pairs, 2), the reference's mean over each completion's tokens, in nats a token. (Equation 17
    prints a sum, and from the second token on. Over a long completion a sum passes log V; the released
    trainer takes the mean over all tokens, as here.)
    """
    ratio = entropy.mean(-1) / math.log(vocab_size)
    # a reference sure of every token would weigh infinitely; float32 entropies below 1e-6 log V are rounding
    return -ratio.clamp(1e-6, 1 - 1e-6).log()


def _gap(x: Tensor) -> Tensor:
    """1 - x / (e^x - 1) for x >= 0; near 0 its series, where the difference would lose its digits."""
    y = x.clamp(min=0.01)
    return torch.where(x < 0.01, x / 2 - x**2 / 12 + x**4 / 720, 1 + y / torch.expm1(-y) * torch.exp(-y))


def _log_exact(s: Tensor, L: Tensor) -> Tensor:
    """log g(s) at L = -log phi, float64.

    With u = L |s|, equation 13 is  1 - g(|s|) = e^-u (u - gap(u) + gap(L)) / (1 - e^(-u-L)) * (1 - e^-L) / L,
    all terms positive, so that its logarithm is exact however small it is; and g(-s) = 1 - g(s).
    """
    # not abs, whose slope at 0 is 0: g jumps there, training starts there, and the policy would never move
    u = L * torch.where(s < 0, -s, s)
    log_tail = (u - _gap(u) + _gap(L)).log() - u - (-torch.expm1(-u - L)).log() + (-torch.expm1(-L) / L).log()
    return torch.where(s < 0, log_tail, torch.log1p(-log_tail.exp()))


def _log_polynomial(s: Tensor, L: Tensor, epsilon: Tensor) -> Tensor:
    """log of a3 s^3 + a1 s + 1/2 on (-epsilon, epsilon), of g outside; float64.

    The paper fits the cubic without saying how. Here a1 and a3 give it g's value and slope at epsilon, so
    that nothing jumps there; a least-squares fit would, and can pass 1. In z = s / epsilon, with
    q = 1 - g(epsilon), it is
    (1 + z)^2 (2 - z) / 4  -  q z (3 - z^2) / 2  -  epsilon g'(epsilon) z (1 - z^2) / 2, positive term by term
    where z < 0, so that it cannot round to a probability of 0.
    """
    q, slope = torch.func.jvp(lambda x: _log_exact(-x, L).exp(), (epsilon,), (torch.ones_like(epsilon),))
    inside = s.abs() < epsilon
    z = torch.where(inside, s / epsilon, 0)
    p = (1 + z) ** 2 * (2 - z) / 4 - q * z * (3 - z**2) / 2 + epsilon * slope * z * (1 - z**2) / 2
    return torch.where(inside, p.log(), _log_exact(s, L))


# log g(s) at L = -log phi, float64
LINKS = {
    "exact": lambda s, L, epsilon: _log_exact(s, L),
    "sigmoid": lambda s, L, epsilon: F.logsigmoid(L * s),
    "polynomial": _log_polynomial,
}


def _log_link(s: Tensor, phi: Tensor | float, link: str, epsilon: float | str) -> Tensor:
    # float64: one number per pair, and near phi = 1 g is a small difference of large terms
    phi = torch.as_tensor(phi, dtype=torch.float64, device=s.device)
    L = -phi.clamp(1e-300, 1 - 1e-15).log()  # finite and not 0
    return LINKS[link](s.double(), L, 2 * L if epsilon == "auto" else torch.full_like(L, epsilon))


def mallows_phi_link(s: Tensor, phi: Tensor | float) -> Tensor:
    """g(s) of equation 13, exact: the probability of preferring a completion s ranks better; shaped like s.

    g jumps at 0, where this is its limit from the right. `phi` in (0, 1] broadcasts against s.
    """
    return _log_link(s, phi, "exact", "auto").exp().to(s.dtype)


def mallows_theta_loss(policy: Stats, reference: Stats, c: Tensor | float, beta: float) -> Tensor:
    """-log sigmoid(c beta Delta), (pairs,): corollary 2, its factor 2 a part of phi*; c = 1 is DPO.

    `c` is (pairs,), the neg-log-dispersion.
    """
    return -F.logsigmoid(c * dpl_margin(policy, reference, beta, beta))


def mallows_phi_loss(
    policy: Stats,
    reference: Stats,
    phi: Tensor | float,
    beta: float,
    link: str = "exact",
    epsilon: float | str = 0.1,
) -> Tensor:
    """-log g(beta Delta), (pairs,): corollary 3, or section 3.4's smooth stand-ins for g.

    `phi` is (pairs,), exp(-c). `link` is exact, sigmoid or polynomial; the polynomial is g outside
    [-epsilon, epsilon], and epsilon "auto" is -2 log phi. Raises KeyError for another link.
    """
    s = dpl_margin(policy, reference, beta, beta)
    return -_log_link(s, phi, link, epsilon).to(s.dtype)


def mallows_ipo_loss(policy: Stats, reference: Stats, c: Tensor | float, beta: float) -> Tensor:
    """(c Delta - 1 / (2 beta))^2, (pairs,): MallowsIPO; c = 1 is IPO.

    Section 5.5 only names it: that c scales Delta, and not the target, is our reading of "scaling".
    """
    return (c * dpl_margin(policy, reference, 1.0, 1.0) - 1 / (2 * beta)) ** 2


def mallows_simpo_loss(policy: Stats, c: Tensor | float, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(c (beta [log pi(y_w) / |y_w| - log pi(y_l) / |y_l|] - gamma)), (pairs,): MallowsSimPO.

    It has no reference but in c; c = 1 is SimPO. Section 5.5 only names it: that c scales gamma too is our
    reading.
    """
    reward = beta * policy.logp / policy.length
    return -F.logsigmoid(c * (reward[..., 0] - reward[..., 1] - gamma))


def mallows_dpl_loss(policy: Stats, reference: Stats, c: Tensor | float, alpha: float, beta: float) -> Tensor:
    """-log sigmoid(c (alpha [log pi(y_w) - log pi(y_l)] - beta [the same of pi_ref])), (pairs,).

    Dispersion-weighted DPL, which is in neither paper: c = 1 is DPL, alpha = beta is mallows_theta_loss.
    """
    return -F.logsigmoid(c * dpl_margin(policy, reference, alpha, beta))


def objective(config: MallowsConfig, scale: float, vocab_size: int) -> Objective:
    """The losses that `config` asks for at phi* = scale, and the implicit reward's margins, without c."""
    beta, epsilon = config.beta, config.epsilon if config.epsilon == "auto" else float(config.epsilon)
    simpo = config.loss == "simpo"
    alpha = config.alpha if config.loss == "dpl" else beta

    def run(policy: Stats, reference: Stats) -> tuple[Tensor, Tensor]:
        c = torch.ones_like(policy.logp[..., 0])
        if config.dispersion == "on":
            c = scale * neg_log_dispersion(reference.entropy, vocab_size)
        p, r = policy, reference
        if config.length_normalize or simpo:
            p, r = per_token(policy), per_token(reference)
        losses = {
            "theta": lambda: mallows_theta_loss(p, r, c, beta),
            "phi": lambda: mallows_phi_loss(p, r, (-c.double()).exp(), beta, config.link, epsilon),
            "ipo": lambda: mallows_ipo_loss(p, r, c, beta),
            "simpo": lambda: mallows_simpo_loss(policy, c, beta, config.gamma),
            "dpl": lambda: mallows_dpl_loss(p, r, c, alpha, beta),
        }
        return losses[config.loss](), dpl_margin(p, r, alpha, 0.0 if simpo else beta)

    return run


def report_dispersion(
    c: Tensor, scale: float, examples: Sequence, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Print the spread of c, (pairs,), and tables 2 and 3; write them to dispersion.json, Figure 7 to .png.

    A prompt of several pairs is ranked by their mean. Without matplotlib there is no picture.
    """
    by_prompt = defaultdict(list)
    for (prompt, *_), value in zip(examples, c.tolist(), strict=True):
        by_prompt[tuple(prompt)].append(value)
    ranked = sorted((sum(values) / len(values), prompt) for prompt, values in by_prompt.items())
    levels = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
    quantiles = dict(zip(levels, c.quantile(torch.tensor(levels, dtype=c.dtype)).tolist(), strict=True))
    summary = {"scale": scale, "pairs": len(c), "mean": c.mean().item(), "sd": c.std(correction=0).item()}
    print("neg-log-dispersion:", ", ".join(f"{name} {value:.5g}" for name, value in summary.items()))
    print("  quantiles:", ", ".join(f"{level:.0%} {value:.3f}" for level, value in quantiles.items()))
    summary["quantiles"] = quantiles
    for name, rows in (("most_dispersed", ranked[:10]), ("least_dispersed", ranked[:-11:-1])):
        texts = [tokenizer.decode(prompt, skip_special_tokens=True) for _, prompt in rows]
        summary[name] = [{"c": value, "prompt": text} for (value, _), text in zip(rows, texts, strict=True)]
        print(f"{name.replace('_', ' ')} prompts (c, the prompt's end):")
        for row in summary[name]:
            print(f"  {row['c']:.3f}  {' '.join(row['prompt'].split())[-95:]}")
    write_json(folder / "dispersion.json", summary)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no dispersion.png: pip install matplotlib draws it")
        return
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.hist(c.numpy(), bins=60, color="0.55")
    axis.set(xlabel="neg-log-dispersion c(x): near 0 anything goes, far above 1 one answer", ylabel="pairs")
    with write_whole(folder / "dispersion.png", "wb") as file:
        figure.savefig(file, format="png", dpi=150)


def main() -> None:
    """Train by the command line's flags."""
    config = parse(MallowsConfig, __doc__)

    def make_objective(reference: Stats, vocab_size: int, *pairs_and_tokenizer: Any) -> Objective:
        raw = neg_log_dispersion(reference.entropy.double(), vocab_size)
        scale = config.dispersion_scale or 1 / raw.mean().item()
        if config.dispersion == "on" and rank() == 0:
            report_dispersion(scale * raw, scale, *pairs_and_tokenizer, Path(config.out_dir))
        return objective(config, scale, vocab_size)

    train(config, make_objective)


if __name__ == "__main__":
    run_command(main)
