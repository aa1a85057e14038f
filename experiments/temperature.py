"""Token temperature against global temperature: the DPL paper's central picture, where everything is known.

Token temperature t tempers each step, global temperature tau whole texts: p(y)^(1/tau) / Z. Three questions:

1. How unlike are the two laws at equal entropy? A random model of six tokens has 19,531 texts of up to six
   tokens: total variation, and the share of pairs of texts whose order is reversed. Global temperature
   reverses none.
2. What becomes of spelling, on the society's stories from a DPO policy? Above 1, texts with slips are so many
   that p^(1/tau) over *all* texts gives them nearly everything, more than token temperature does. Global
   temperature spells well where slips are cut off (min-p), or lose the comparisons it is trained on (DPL).
3. Do three routes to one global law agree? Exact, from DPO's probabilities of the 1,024 stories; sampled, by
   sequential Monte Carlo from DPO; trained, as DPL at alpha / beta = tau.

    python experiments/doctor.py                # trains the policies
    python experiments/temperature.py           # a minute; draws assets/temperature.png
"""

import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from decode import Batch
from files import InputError, flag, parse, run_command
from model import load_model
from preferences import encode_answers, encode_prompts
from sample import draw_global, end_tokens

VOCAB, ROOM, END = 6, 6, 0
CUT = {"min_p": 0.01}
TEMPERATURES = np.linspace(0.5, 4, 15)


@dataclass
class TemperatureConfig:
    """Flags of experiments/temperature.py."""

    dpo: str = flag("out/doctor/dpo", "Policy trained with alpha = beta.")
    dpl2: str = flag("out/doctor/dpl2", "Policy trained with alpha = 2 beta.")
    dpl4: str = flag("out/doctor/dpl4", "Policy trained with alpha = 4 beta.")
    world: str = flag("data/society/world.json", "The society's truth.")
    particles: int = flag(2000, "Texts grown side by side for global temperature.")
    out_file: str = flag("assets/temperature.png", "The picture.")


def entropy(law: Tensor) -> float:
    """In bits."""
    return -(law * law.log2()).nansum().item()


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the L1 distance."""
    return (p - q).abs().sum().item() / 2


@torch.no_grad()
def tabulate() -> list[Tensor]:
    """Next-token logits of a random model after all texts of 0 .. ROOM - 1 tokens: [(5^n, VOCAB)]."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.mul_(4)  # a fresh model is nearly uniform
    others = [token for token in range(VOCAB) if token != END]
    return [
        model(torch.tensor([[END, *text] for text in itertools.product(others, repeat=n)]))
        .logits[:, -1]
        .double()
        for n in range(ROOM)
    ]


def text_law(tables: list[Tensor], temperature: float) -> Tensor:
    """Log-probability of every text at a token temperature, (texts,), in an order that never changes."""
    before, texts = torch.zeros(1, dtype=torch.float64), []
    for table in tables:
        logp = before[:, None] + (table / temperature).log_softmax(-1)
        going = torch.cat([logp[:, :END], logp[:, END + 1 :]], 1).flatten()
        texts.append(logp[:, END])
        before = going
    return torch.cat([*texts, before])


def at_entropy(logp: Tensor, bits: float) -> tuple[float, Tensor]:
    """The global temperature at which p^(1/tau) / Z has this entropy, by bisection, and that law."""
    low, high = 0.01, 100.0
    for _ in range(60):
        tau = math.sqrt(low * high)
        low, high = (tau, high) if entropy((logp / tau).softmax(0)) < bits else (low, tau)
    return tau, (logp / tau).softmax(0)


def enumerate_texts() -> dict[str, list[float]]:
    """Question 1: token temperature against the global temperature of equal entropy."""
    tables = tabulate()
    logp = text_law(tables, 1.0)
    a, b = torch.randint(len(logp), (2, 1_000_000), generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {"tv": [], "reversed": []}
    print(f"{len(logp):,} texts, {entropy(logp.exp()):.1f} bits\n  t   tau    bits     TV  pairs reversed")
    for t in TEMPERATURES:
        token = text_law(tables, t)
        tau, law = at_entropy(logp, entropy(token.exp()))
        found["tv"].append(100 * total_variation(law, token.exp()))
        found["reversed"].append(
            100 * (((logp[a] - logp[b]) * (token[a] - token[b])) < 0).double().mean().item()
        )
        print(
            f"{t:.2f} {tau:5.2f} {entropy(law):7.2f} {found['tv'][-1]:5.1f}% {found['reversed'][-1]:14.1f}%"
        )
    return found


@torch.no_grad()
def story_logits(model: Any, prompt: list[int], answers: list[list[int]]) -> Tensor:
    """Logits of each token of the stories, (stories, tokens, vocab), padded."""
    longest = max(map(len, answers))
    rows = torch.tensor([prompt + a[:-1] + [0] * (longest - len(a)) for a in answers])
    return torch.cat([model(part).logits[:, len(prompt) - 1 :] for part in rows.split(128)])


def story_law(logits: Tensor, answers: list[list[int]], temperature: float) -> Tensor:
    """Log-probability of each story at a token temperature, (stories,)."""
    logp = (logits.double() / temperature).log_softmax(-1)
    return torch.stack([row[range(len(a)), a].sum() for row, a in zip(logp, answers, strict=True)])


def tell_stories(config: TemperatureConfig) -> dict[str, Any]:
    """Questions 2 and 3: what the policies make of the stories that world.json spells out."""
    world = json.loads(Path(config.world).read_text())
    slots, prompts = world["slots"], [world["story_prompt"]]
    values = list(itertools.product(*slots.values()))
    stories = [world["template"].format(**dict(zip(slots, v, strict=True))) for v in values]
    names = list(slots["name"])
    doctor = torch.tensor([names.index(v[list(slots).index("name")]) for v in values])
    exact: dict[str, Tensor] = {}  # each policy's log-probabilities of the stories
    for name in ("dpl4", "dpl2", "dpo"):
        folder = Path(getattr(config, name))
        if not folder.is_dir():
            raise InputError(f"--{name} {folder}: no such folder; experiments/doctor.py trains this policy")
        model, tokenizer = load_model(folder)
        [prompt], answers = (
            encode_prompts(prompts, tokenizer),
            encode_answers(prompts * len(stories), stories, tokenizer),
        )
        logits = story_logits(model, prompt, answers)
        exact[name] = story_law(logits, answers, 1.0)
    ends, room = end_tokens(model, tokenizer), max(map(len, answers)) + 4
    index = {tuple(answer): i for i, answer in enumerate(answers)}

    def sampled(tau: float, cuts: dict[str, float]) -> Tensor:
        """Shares of the stories among Monte Carlo's texts at this global temperature of the DPO policy."""
        batch = Batch(model, [prompt], [0] * config.particles, room, ends)
        drawn, _, _ = draw_global(batch, config.particles, tau, np.random.default_rng(0), cuts)
        rows = [index[tuple(c.tokens)] for c in drawn if tuple(c.tokens) in index]
        return torch.tensor(rows, dtype=torch.long).bincount(minlength=len(stories)).double() / len(drawn)

    def slips(law: Tensor) -> float:
        return 100 * (1 - law.sum().item())

    lines = {
        "DPO, token temperature": [slips(story_law(logits, answers, t).exp()) for t in TEMPERATURES],
        "DPO, global temperature, all texts": [slips(sampled(t, {})) for t in TEMPERATURES],
        "DPO, global temperature, min-p": [slips(sampled(t, CUT)) for t in TEMPERATURES],
        "DPL, α/β": [slips(exact[name].exp()) for name in ("dpo", "dpl2", "dpl4")],
    }
    target = (exact["dpo"] / 2).softmax(0)
    routes = {
        "exact, DPO^(1/2)": target,
        "sampled from DPO": sampled(2.0, CUT),
        "trained, DPL": exact["dpl2"].exp(),
        "token temperature": story_law(logits, answers, 2.0).exp(),
    }
    print("\nnot a story, %   at " + " ".join(f"{t:5.2f}" for t in TEMPERATURES))
    for name, line in lines.items():
        print(f"{name:34} " + " ".join(f"{y:5.1f}" for y in line))
    print("\ntemperature 2: TV to exact over stories, over doctors (of what is well-formed); not a story")
    bars = {}
    for name, law in routes.items():
        bars[name] = torch.zeros(len(names), dtype=law.dtype).index_add(0, doctor, law)
        tv = [total_variation(law / law.sum(), target)]
        tv.append(total_variation(bars[name] / law.sum(), bars["exact, DPO^(1/2)"]))
        print(f"{name:20} {tv[0]:6.3f} {tv[1]:6.3f} {slips(law):6.1f}%")
    return {"lines": lines, "bars": bars, "names": names}


def draw(texts: dict[str, list[float]], stories: dict[str, Any], path: Path) -> None:
    """Three panels, one a question; readable in grey."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 5))
    left.plot(TEMPERATURES, texts["tv"], "k-", label="total variation")
    left.plot(TEMPERATURES, texts["reversed"], "k--", label="pairs of texts reversed")
    left.axhline(0, color="0.6", linewidth=1)
    left.set(xlabel="token temperature", ylabel="unlike the global law of equal entropy, %")
    left.set_title("1. All 19,531 texts of a random model", loc="left")
    styles = ("k-", "k:", "k--", "ko")
    for (name, line), style in zip(stories["lines"].items(), styles, strict=True):
        x = TEMPERATURES if len(line) == len(TEMPERATURES) else [1, 2, 4]
        middle.plot(x, line, style, label=name)
    middle.set(xlabel="temperature (token, global, or α/β)", ylabel="misspelt or malformed stories, %")
    middle.set_title("2. The society's stories", loc="left")
    for axis in (left, middle):
        axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.14))
    shades = [str(0.15 + 0.72 * i / (len(stories["names"]) - 1)) for i in range(len(stories["names"]))]
    for row, bar in enumerate(stories["bars"].values()):
        start = 0.0
        for name, shade, share in zip(stories["names"], shades, (100 * bar).tolist(), strict=True):
            right.barh(row, share, 0.6, left=start, color=shade, edgecolor="white", linewidth=0.6)
            if share > 14:
                ink = "white" if float(shade) < 0.5 else "black"
                right.text(start + share / 2, row, name, ha="center", va="center", fontsize=7, color=ink)
            start += share
        right.barh(row, 100 - start, 0.6, left=start, color="white", edgecolor="black", hatch="////")
    right.set_yticks(range(len(stories["bars"])), list(stories["bars"]))
    right.invert_yaxis()
    right.set(xlim=(0, 100), xlabel="stories by their doctor, %\n(hatched: misspelt or malformed)")
    right.set_title("3. Three routes to temperature 2", loc="left")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    """Answer the three questions and draw the picture."""
    config = parse(TemperatureConfig, __doc__)
    stories = tell_stories(config)
    draw(enumerate_texts(), stories, Path(config.out_file))


if __name__ == "__main__":
    run_command(main)
