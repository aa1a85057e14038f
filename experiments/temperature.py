"""Token temperature against global temperature: the DPL paper's central picture, where everything is known.

Token temperature t tempers each step, global temperature tau whole texts: p(y)^(1/tau) / Z. Three questions:

1. How unlike are the two laws at equal entropy? On the 19,531 texts of a random model of six tokens, and on
   the society's 1,024 well-formed stories under a DPO policy: total variation, and the share of pairs of
   texts whose order is reversed. Global temperature reverses none.
2. What becomes of spelling? Above 1, texts with slips are so many that p^(1/tau) over *all* texts gives them
   nearly everything, more than token temperature does. Fewer slip through where a cut (min-p) comes first,
   and fewest where slips lose the comparisons that a policy is trained on (DPL).
3. Do the routes to a global law agree? Sequential Monte Carlo against the exact law that it samples, that of
   DPO under the cut; and DPL, trained at alpha / beta = tau, against DPO's without one.

    python experiments/doctor.py                # trains the policies
    python experiments/temperature.py           # three minutes; draws assets/temperature.png
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
from evaluate import society
from experiments.doctor import stack
from files import InputError, flag, parse, run_command
from model import load_model
from preferences import decode_continuation, encode_answers, encode_prompts
from sample import draw_global, draw_rows, end_tokens, next_token_probs

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


def unlike(logp: Tensor, token: Tensor) -> tuple[float, float, float, float]:
    """(tau, bits, total variation, share of pairs reversed): a token law against the global one, question 1.

    `logp` (texts,) is the model's log-probability of each text, `token` (texts,) that at a token temperature.
    """
    bits = entropy(token.exp())
    tau, law = at_entropy(logp, bits)
    a, b = torch.randint(len(logp), (2, 1_000_000), generator=torch.Generator().manual_seed(0))
    reverses = ((logp[a] - logp[b]) * (token[a] - token[b])) < 0
    return tau, bits, total_variation(law, token.exp()), reverses.double().mean().item()


@torch.no_grad()
def story_logits(model: Any, prompt: list[int], answers: list[list[int]]) -> Tensor:
    """Logits of each token of the stories, (stories, tokens, vocab), padded."""
    longest = max(map(len, answers))
    rows = torch.tensor([prompt + a[:-1] + [0] * (longest - len(a)) for a in answers])
    return torch.cat([model(part).logits[:, len(prompt) - 1 :] for part in rows.split(128)])


def story_law(logits: Tensor, answers: list[list[int]], **law: float) -> Tensor:
    """Log-probability of each story, (stories,), under next_token_probs' temperature and cuts."""
    logp = torch.stack([next_token_probs(row, **law) for row in logits.double()]).log()
    return torch.stack([row[range(len(a)), a].sum() for row, a in zip(logp, answers, strict=True)])


def tell_stories(config: TemperatureConfig) -> dict[str, Any]:
    """What the policies make of the society's stories: what draw() needs for all three questions."""
    world = json.loads(Path(config.world).read_text())
    slots, story = world["slots"], world["story_prompt"]
    values = list(itertools.product(*slots.values()))
    stories = [world["template"].format(**dict(zip(slots, v, strict=True))) for v in values]
    names = list(slots["name"])
    doctor = torch.tensor([names.index(v[list(slots).index("name")]) for v in values])
    policies = {}
    for name in ("dpo", "dpl2", "dpl4"):
        folder = Path(getattr(config, name))
        if not folder.is_dir():
            raise InputError(f"--{name} {folder}: no such folder; experiments/doctor.py trains this policy")
        policies[name], tokenizer = load_model(folder)
    [prompt] = encode_prompts([story], tokenizer)
    answers = encode_answers([story] * len(stories), stories, tokenizer)
    dpo, dpl2 = (story_logits(policies[name], prompt, answers) for name in ("dpo", "dpl2"))
    logp, cut = story_law(dpo, answers), story_law(dpo, answers, **CUT)

    def sampled(name: str, tau: float | None, law: dict[str, float]) -> tuple[list[str], float]:
        """Texts of a policy at a global temperature, or from `law` alone, and their effective number."""
        ends, room = end_tokens(policies[name], tokenizer, [story]), 48  # tokens, as in doctor.py
        batch = Batch(policies[name], [prompt], [0] * config.particles, room, ends)
        if tau is None:
            streams = [np.random.default_rng([0, row]) for row in range(config.particles)]
            drawn, size = draw_rows(batch, streams, law), float(config.particles)
        else:
            drawn, size, _ = draw_global(batch, config.particles, tau, np.random.default_rng(0), law)
        return [
            decode_continuation(c.tokens[: -1 if c.finish == "eos" else None], tokenizer) for c in drawn
        ], size

    def slips(texts: list[str]) -> tuple[float, float]:
        """Percent of stories whose name is misspelt or missing, and of malformed ones (evaluate.py)."""
        rows = [{"prompt": story, "completion": text} for text in texts]
        found = society(rows, world, 0.1, 0.1)
        return 100 * found["misspelt"], 100 * found["malformed"]

    runs = {
        "DPO, token temperature": [sampled("dpo", None, {"temperature": t}) for t in TEMPERATURES],
        "DPO, global temperature, all texts": [sampled("dpo", t, {}) for t in TEMPERATURES],
        "DPO, global temperature, min-p": [sampled("dpo", t, CUT) for t in TEMPERATURES],
        "DPL, α/β": [sampled(name, None, {}) for name in policies],
    }
    lines = {name: [slips(texts) for texts, _ in line] for name, line in runs.items()}
    for what, title in enumerate(("name misspelt or missing, %", "story malformed, %")):
        print(f"\n{title:26}         at " + " ".join(f"{t:5.2f}" for t in TEMPERATURES))
        for name, line in lines.items():
            print(f"{name:34} " + " ".join(f"{percents[what]:5.1f}" for percents in line))

    index = {text: i for i, text in enumerate(stories)}
    texts, size = runs["DPO, global temperature, min-p"][TEMPERATURES.tolist().index(2.0)]
    written = torch.tensor([index[text] for text in texts if text in index])
    routes = {
        "exact, DPO^(1/2)": (logp / 2).softmax(0),
        "trained, DPL": story_law(dpl2, answers).exp(),
        "token temperature": story_law(dpo, answers, temperature=2.0).exp(),
        "exact, DPO^(1/2)\nafter the cut": (cut / 2).softmax(0),
        "sampled\nafter the cut": written.bincount(minlength=len(stories)).double() / len(texts),
    }
    bars = {name: torch.zeros(len(names)).double().index_add(0, doctor, law) for name, law in routes.items()}
    print(f"\ntemperature 2, {(cut > -math.inf).sum()} of {len(stories):,} stories left by the cut;", end=" ")
    print(f"effective sample size {size:,.0f} of {config.particles:,}")
    print("total variation among well-formed texts: to exact over stories, doctors; to exact after the cut")
    for name, law in routes.items():
        tv = []
        for exact in ("exact, DPO^(1/2)", "exact, DPO^(1/2)\nafter the cut"):
            tv.append(total_variation(law / law.sum(), routes[exact]))
            tv.append(total_variation(bars[name] / law.sum(), bars[exact]))
        print(f"{name.replace(chr(10), ' '):32}" + "".join(f"{x:7.3f}" for x in tv))
    well_formed = [story_law(dpo, answers, temperature=t).log_softmax(0) for t in TEMPERATURES]
    return {"logp": logp.log_softmax(0), "token": well_formed, "lines": lines, "bars": bars, "names": names}


def compare_laws(logp: Tensor, tokens: list[Tensor], title: str) -> list[tuple[float, ...]]:
    """unlike() at each of TEMPERATURES, printed."""
    found = [unlike(logp, token) for token in tokens]
    print(f"\n{title}, {entropy(logp.exp()):.1f} bits\n  t   tau    bits     TV  pairs reversed")
    for t, (tau, bits, tv, reverses) in zip(TEMPERATURES, found, strict=True):
        print(f"{t:.2f} {tau:5.2f} {bits:7.2f} {tv:6.1%} {reverses:14.1%}")
    return found


def draw(laws: dict[str, list[tuple[float, ...]]], stories: dict[str, Any], path: Path) -> None:
    """The questions' panels, two for the second; readable in grey."""
    figure, ((laws_axis, *slips_axes), (last, bars_axis)) = plt.subplots(
        2, 2, figsize=(11, 9), layout="constrained"
    )
    slips_axes.append(last)
    for (name, found), shade in zip(laws.items(), ("black", "0.6"), strict=True):
        _, _, tv, reverses = (100 * np.array(column) for column in zip(*found, strict=True))
        laws_axis.plot(TEMPERATURES, tv, "-", color=shade, label=f"{name}: total variation")
        laws_axis.plot(TEMPERATURES, reverses, "--", color=shade, label=f"{name}: pairs reversed")
    laws_axis.set(xlabel="token temperature", ylabel="unlike the global law of equal entropy, %")
    laws_axis.set_title("1. The two laws at equal entropy", loc="left")
    laws_axis.legend(frameon=False, fontsize=9)
    styles = ("k-", "k:", "k--", "ko")
    for what, (axis, title) in enumerate(
        zip(slips_axes, ("Name misspelt or missing", "Story malformed"), strict=True)
    ):
        for (name, line), style in zip(stories["lines"].items(), styles, strict=True):
            x = TEMPERATURES if len(line) == len(TEMPERATURES) else [1, 2, 4]
            axis.plot(x, [percents[what] for percents in line], style, label=name)
        axis.set(xlabel="temperature (token, global, or α/β)", ylabel="share of stories, %", ylim=(-3, 103))
        axis.set_title(f"2. {title}", loc="left")
    slips_axes[1].legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.08))
    for row, bar in enumerate(stories["bars"].values()):
        shares = (100 * bar / bar.sum()).tolist()
        stack(bars_axis, row, 0.6, dict(zip(stories["names"], shares, strict=True)), 14)
        bars_axis.text(102, row, f"{bar.sum():.1%}", va="center", fontsize=9)
    bars_axis.set_yticks(range(len(stories["bars"])), list(stories["bars"]))
    bars_axis.invert_yaxis()
    bars_axis.text(102, -0.6, "well-formed", fontsize=9)
    bars_axis.set(xlim=(0, 100), xlabel="well-formed stories by their doctor, %")
    bars_axis.set_title("3. Routes to temperature 2", loc="left")
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    """Answer the three questions and draw the picture."""
    config = parse(TemperatureConfig, __doc__)
    stories, tables = tell_stories(config), tabulate()
    random = text_law(tables, 1.0), [text_law(tables, t) for t in TEMPERATURES]
    laws = {"random model": compare_laws(*random, f"{len(random[0]):,} texts of a random model")}
    laws["stories"] = compare_laws(stories["logp"], stories["token"], "DPO's well-formed stories")
    draw(laws, stories, Path(config.out_file))


if __name__ == "__main__":
    run_command(main)
