"""MallowsPO: DPO weighted by how much people agree about the prompt.

A Mallows model draws people's rankings of the completions around a central ranking. Its dispersion phi(x), in
(0, 1], says how widely they scatter: near 0 everybody gives the same ranking, at 1 all rankings are equally
likely. The reward of a completion is its negative rank. As in DPO, it is expressed by the policy, so that y_w
is preferred to y_l with probability

    g(beta Delta),      Delta = log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l).

The distance between rankings decides the link g: Spearman's rho gives theta, Kendall's tau gives phi.

    theta:  g(s) = sigmoid(c(x) s)                                   c = -2 log phi   (corollary 2)
    phi:    g(s) = f(s + 1) - f(s),  f(z) = z / (1 - phi(x)^z),      c = -log phi     (corollary 3)
            for s > 0, and g(-s) = 1 - g(s)

The weight c(x) grows with agreement. It is estimated, not learned: where the reference is unsure of the next
token, people are taken to disagree. With h the reference's mean token entropy over a completion,

    c(x) = -phi* log( (h(y_w) + h(y_l)) / (2 log V) ),      phi* such that the mean of c over the data is 1,

which absorbs theta's factor 2. In theta, c = 1 is DPO, and c scales the KL penalty of its prompt (proposition
4): a dispersed prompt, with its small c, is held less closely to the reference. So the weight decides which
prompts are learned; it is not by itself a means to diversity. MallowsIPO and MallowsSimPO put the same weight
into IPO and SimPO, as the authors' released trainer does; dispersion-weighted DPL is in neither paper.

    python train_mallows.py --out_dir out/mallows                          # the embedded society's debates
    python train_mallows.py @recipes/llama3_mallows.txt --data FILE        # the paper's run on UltraFeedback
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.files import atomic_write, write_json
from common.flags import flag, require, run_command
from common.parallel import get_rank
from core.model import Stats
from core.trainer import TrainConfig, parse_run, train
from train_dpl import dpl_margin, per_token

LOSSES = ("theta", "phi", "ipo", "simpo", "dpl")


@dataclass
class MallowsConfig(TrainConfig):
    """Flags of train_mallows.py."""

    out_dir: str = flag("out/mallows", "Folder for the adapter, metrics.jsonl and dispersion.json.")
    loss: str = flag("theta", "theta is DPO, weighted.", LOSSES)
    link: str = flag("exact", "For phi; the others are smooth stand-ins.", ("exact", "sigmoid", "polynomial"))
    epsilon: str = flag("0.1", "The polynomial replaces g on [-epsilon, epsilon]; auto is -2 log phi(x).")
    dispersion: str = flag("on", "off sets c(x) = 1: DPO, IPO, SimPO and DPL, or phi = 1/e.", ("on", "off"))
    dispersion_scale: float | None = flag(None, "phi* (default: the mean of c(x) is 1).", "(0, inf)")
    alpha: float = flag(0.2, "For dpl: weight of the entropy bonus.", "(0, inf)")
    beta: float = flag(0.1, "Penalty towards the reference; for simpo: scale of the reward.", "(0, inf)")
    gamma: float = flag(0.5, "For simpo: the margin that the reward should reach.", "[0, inf)")
    length_normalize: bool = flag(False, "Average log-probabilities over tokens, as simpo always does.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, has_effect, condition in (
            ("alpha", self.loss == "dpl", "--loss dpl"),
            ("gamma", self.loss == "simpo", "--loss simpo"),
            ("link", self.loss == "phi", "--loss phi"),
            ("epsilon", self.link == "polynomial", "--link polynomial"),
            ("dispersion_scale", self.dispersion == "on", "--dispersion on"),
        ):
            is_default = getattr(self, name) == getattr(type(self), name)
            require(self, name, has_effect or is_default, f"left out: it has no effect without {condition}")
        try:
            width = self.epsilon == "auto" or 0 < float(self.epsilon) < math.inf
        except ValueError:
            width = False
        require(self, "epsilon", width, "a positive number or auto")


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
    # not s.abs(): training starts at s = 0, where the gradient of abs is 0, so the policy would never move
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


def log_link(s: Tensor, phi: Tensor | float, link: str, epsilon: float | str) -> Tensor:
    """log g(s) of the phi link or a stand-in (section 3.4), float64, shaped like s; `phi` broadcasts.

    `link` is a key of LINKS. `epsilon`, a number or "auto", is that of mallows_phi_loss.
    """
    # float64: one number per pair, and near phi = 1 g is a small difference of large terms
    phi = torch.as_tensor(phi, dtype=torch.float64, device=s.device)
    L = -phi.clamp(1e-300, 1 - 1e-15).log()  # finite and not 0
    return LINKS[link](s.double(), L, 2 * L if epsilon == "auto" else torch.full_like(L, epsilon))


def mallows_theta_loss(policy: Stats, reference: Stats, c: Tensor | float, beta: float) -> Tensor:
    """-log sigmoid(c beta Delta), (pairs,): corollary 2, its factor 2 in phi*. c = 1 is DPO.

    `c` is (pairs,), the scaled neg-log-dispersion.
    """
    return mallows_dpl_loss(policy, reference, c, beta, beta)


def mallows_phi_loss(
    policy: Stats,
    reference: Stats,
    phi: Tensor | float,
    beta: float,
    link: str = "exact",
    epsilon: float | str = 0.1,
) -> Tensor:
    """-log g(beta Delta), (pairs,): corollary 3, or with section 3.4's smooth stand-ins for g.

    `phi` is (pairs,), exp(-c). `link` is exact, sigmoid or polynomial. The polynomial is g outside
    [-epsilon, epsilon]; epsilon "auto" is -2 log phi. Raises KeyError for another link.
    """
    s = dpl_margin(policy, reference, beta, beta)
    return -log_link(s, phi, link, epsilon).to(s.dtype)


def mallows_ipo_loss(policy: Stats, reference: Stats, c: Tensor | float, beta: float) -> Tensor:
    """(c Delta - 1 / (2 beta))^2, (pairs,): MallowsIPO, as in the released trainer; c = 1 is IPO."""
    return (c * dpl_margin(policy, reference, 1.0, 1.0) - 1 / (2 * beta)) ** 2


def mallows_simpo_loss(policy: Stats, c: Tensor | float, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(c (beta [log pi(y_w) / |y_w| - log pi(y_l) / |y_l|] - gamma)), (pairs,): MallowsSimPO.

    Section 5.5, as in the released trainer. The reference enters through c alone; c = 1 is SimPO.
    """
    chosen, rejected = (beta * policy.logp / policy.length).unbind(-1)
    return -F.logsigmoid(c * (chosen - rejected - gamma))


def mallows_dpl_loss(policy: Stats, reference: Stats, c: Tensor | float, alpha: float, beta: float) -> Tensor:
    """-log sigmoid(c (alpha [log pi(y_w) - log pi(y_l)] - beta [the same of pi_ref])), (pairs,).

    Dispersion-weighted DPL, which is in neither paper. c = 1 is DPL; alpha = beta is mallows_theta_loss.
    """
    return -F.logsigmoid(c * dpl_margin(policy, reference, alpha, beta))


def objective(
    policy: Stats, reference: Stats, *, config: MallowsConfig, scale: float, vocab_size: int
) -> dict[str, Tensor]:
    """The loss that `config` asks for with phi* = scale, the reward margin without c, and c; all (pairs,)."""
    c = torch.ones_like(policy.logp[..., 0])
    if config.dispersion == "on":
        c = scale * neg_log_dispersion(reference.entropy, vocab_size)
    averaged = config.length_normalize or config.loss == "simpo"
    p, r = (per_token(policy), per_token(reference)) if averaged else (policy, reference)
    alpha = config.alpha if config.loss == "dpl" else config.beta
    if config.loss == "phi":
        epsilon = config.epsilon if config.epsilon == "auto" else float(config.epsilon)
        loss = mallows_phi_loss(p, r, (-c.double()).exp(), config.beta, config.link, epsilon)
    elif config.loss == "ipo":
        loss = mallows_ipo_loss(p, r, c, config.beta)
    elif config.loss == "simpo":
        loss = mallows_simpo_loss(policy, c, config.beta, config.gamma)
    elif config.loss == "dpl":
        loss = mallows_dpl_loss(p, r, c, alpha, config.beta)
    else:
        loss = mallows_theta_loss(p, r, c, config.beta)
    margin = dpl_margin(p, r, alpha, 0.0 if config.loss == "simpo" else config.beta)
    return {"loss": loss, "reward_margin": margin, "neg_log_dispersion": c}


def fit_dispersion(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence,
    reference: Stats,
    *,
    config: MallowsConfig,
) -> dict[str, Any]:
    """phi* and V for the objective, from the reference's entropies of all examples. Reports c."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    unscaled = neg_log_dispersion(reference.entropy.double(), vocab_size)
    scale = config.dispersion_scale or 1 / unscaled.mean().item()
    if get_rank() == 0 and config.dispersion == "on":
        report_dispersion(scale * unscaled, scale, examples, tokenizer, Path(config.out_dir))
    return {"scale": scale, "vocab_size": vocab_size}


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
    with atomic_write(folder / "dispersion.png", "wb") as file:
        figure.savefig(file, format="png", dpi=150)


def main() -> None:
    """Train by the command line's flags."""
    config = parse_run(MallowsConfig, __doc__, "recipes/debates.txt")
    train(config, partial(objective, config=config), prepare=partial(fit_dispersion, config=config))


if __name__ == "__main__":
    run_command(main)
