"""Token temperature against global temperature, the central comparison of the DPL paper, where all is known.

Token temperature t divides the logits of every step by t. Global temperature tau acts on whole texts y:
p(y)^(1/tau) / Z. Three questions:

1. How different are the two distributions at equal entropy? Measured on all 19,531 texts of a random model
   with six tokens, and on the society's 1,024 well-formed stories under the DPO policy: by total variation,
   and by the share of pairs of texts whose order is reversed. Global temperature reverses none.
2. What happens to spelling? Above temperature 1, texts with errors are so many that p^(1/tau) over *all*
   texts gives them nearly all probability, more than token temperature does. Truncating p first (min-p)
   keeps some of them out. DPL keeps nearly all out, because texts with errors lose in its training pairs.
3. Do different routes to a global temperature agree? Sequential Monte Carlo is compared with the exact
   distribution that it samples, that of the truncated DPO policy. DPL trained at alpha / beta = tau is
   compared with the exact distribution DPO^(1/tau).

    python experiments/doctor.py                # trains the policies
    python experiments/temperature.py           # three minutes; draws assets/temperature.png
"""

import itertools
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

from common.encode import encode_prompts
from common.files import InputError
from common.flags import Flags, flag, parse, run_command
from core.decode import Batch
from core.hub import load_model
from data.society.truth import compare_samples, list_stories, read_story
from experiments import lab
from metrics.tables import save_figure
from sample import sample_global_batch

VOCAB, LENGTH, END = 6, 6, 0  # of the random model: token ids, most tokens of a text, the end token
TEMPERATURES = np.linspace(0.5, 4, 15)
POLICIES = {"dpo": 1, "dpl2": 2, "dpl4": 4}  # folder: alpha / beta


@dataclass
class TemperatureConfig(Flags):
    """Flags of experiments/temperature.py."""

    policies: str = flag("out/doctor", "Folder in which experiments/doctor.py trained dpo, dpl2 and dpl4.")
    samples: int = flag(2000, "Samples at each temperature; also the number of particles.", "[1, inf)")
    out_file: str = flag("assets/temperature.png", "The picture.")


def entropy(p: Tensor) -> float:
    """Entropy of a distribution in bits."""
    return -(p * p.log2()).nansum().item()


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the L1 distance of two distributions."""
    return (p - q).abs().sum().item() / 2


@torch.no_grad()
def random_model() -> list[Tensor]:
    """Next-token logits of a random Llama after every text of n = 0 .. LENGTH - 1 tokens: [(5^n, VOCAB)]."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)).eval()
    for weight in model.parameters():
        weight.mul_(4)  # a new model is nearly uniform
    others = [token for token in range(VOCAB) if token != END]
    texts = [[[END, *text] for text in itertools.product(others, repeat=n)] for n in range(LENGTH)]
    return [model(torch.tensor(batch)).logits[:, -1].double() for batch in texts]


def text_logp(logits: list[Tensor], temperature: float) -> Tensor:
    """Log-probability of every text at a token temperature, (texts,); `logits` is random_model()'s."""
    prefix, texts = torch.zeros(1, dtype=torch.float64), []
    for table in logits:
        logp = prefix[:, None] + (table / temperature).log_softmax(-1)
        texts.append(logp[:, END])
        prefix = torch.cat([logp[:, :END], logp[:, END + 1 :]], 1).flatten()
    return torch.cat([*texts, prefix])


def global_temperature(logp: Tensor, bits: float) -> tuple[float, Tensor]:
    """(tau, p^(1/tau) / Z): the global temperature at which p = exp(logp) has this entropy, by bisection."""
    low, high = 0.01, 100.0
    for _ in range(60):
        tau = math.sqrt(low * high)
        low, high = (tau, high) if entropy((logp / tau).softmax(0)) < bits else (low, tau)
    return tau, (logp / tau).softmax(0)


def compare_temperatures(logp: Tensor, token_logp: list[Tensor], title: str) -> np.ndarray:
    """Compare the distributions at each token temperature with the global one of equal entropy, and print.

    `logp` (texts,) is at temperature 1, `token_logp` at each of TEMPERATURES. Returns (temperatures, 2), in
    percent: total variation, and the share of pairs of texts whose order token temperature reverses, which
    is estimated from a million random pairs.
    """
    first, second = torch.randint(len(logp), (2, 1_000_000), generator=torch.Generator().manual_seed(0))
    print(f"\n{title}, {entropy(logp.exp()):.1f} bits\n  t   tau    bits     TV  pairs reversed")
    rows = []
    for t, token in zip(TEMPERATURES, token_logp, strict=True):
        bits = entropy(token.exp())
        tau, target = global_temperature(logp, bits)
        is_reversed = (logp[first] - logp[second]) * (token[first] - token[second]) < 0
        tv, share = total_variation(target, token.exp()), is_reversed.double().mean().item()
        print(f"{t:.2f} {tau:5.2f} {bits:7.2f} {tv:6.1%} {share:14.1%}")
        rows.append([100 * tv, 100 * share])
    return np.array(rows)


def story_results(config: TemperatureConfig) -> dict[str, Any]:
    """Sample and compute everything about the society's stories, and print it; returns what draw() needs.

    The keys: logp (1024,) and token_logp, for compare_temperatures(); errors {label: (points, 2)}, percent of
    names misspelt or missing and of stories malformed; names {label: {name: probability}}, for each route to
    temperature 2.
    """
    world, models = lab.read_world(), {}
    for name in POLICIES:
        folder = Path(config.policies) / name
        if not folder.is_dir():
            raise InputError(f"--policies: no folder {folder}; experiments/doctor.py trains this policy")
        models[name], tokenizer = load_model(folder)
    prompt, stories = world["story_prompt"], list_stories(world)
    dpo, dpl = (lab.completion_logits(models[name], tokenizer, prompt, stories) for name in ("dpo", "dpl2"))
    logp, min_p_logp = lab.completion_logp(*dpo), lab.completion_logp(*dpo, **lab.MIN_P)

    def error_rates(name: str, tau: float | None = None, **params: float) -> tuple[float, float]:
        """Percent of a policy's texts with a wrong name, and malformed; at a global temperature, if any."""
        options = {"global_temperature": tau, **params}
        _, texts = lab.sample_texts(models[name], tokenizer, prompt, config.samples, 48, **options)
        metrics = compare_samples([(prompt, text) for text in texts], world, 0.1, 0.1)
        return 100 * metrics["misspelt"], 100 * metrics["malformed"]

    errors = {
        "DPO, token temperature": [error_rates("dpo", temperature=t) for t in TEMPERATURES],
        "DPO, global temperature, all texts": [error_rates("dpo", t) for t in TEMPERATURES],
        "DPO, global temperature, min-p": [error_rates("dpo", t, **lab.MIN_P) for t in TEMPERATURES],
        "DPL, α/β": [error_rates(name) for name in POLICIES],
    }
    errors = {label: np.array(rates) for label, rates in errors.items()}
    for column, title in enumerate(("name misspelt or missing, %", "story malformed, %")):
        print(f"\n{title:26}         at " + " ".join(f"{t:5.2f}" for t in TEMPERATURES))
        for label, percent in errors.items():
            print(f"{label:34} " + " ".join(f"{x:5.1f}" for x in percent[:, column]))

    index = {text: i for i, text in enumerate(stories)}
    count, end = config.samples, tokenizer.eos_token_id
    batch = Batch(models["dpo"], encode_prompts([prompt], tokenizer), [0] * count, 48, end)
    drawn, ess, _ = sample_global_batch(batch, count, 2.0, np.random.default_rng(0), **lab.MIN_P)
    texts = lab.read_texts(drawn, tokenizer)
    sampled = torch.tensor([index[text] for text in texts if text in index], dtype=torch.long)
    exact, exact_min_p = (logp / 2).softmax(0), (min_p_logp / 2).softmax(0)
    routes = {  # probability of each story
        "exact, DPO^(1/2)": exact,
        "trained, DPL": lab.completion_logp(*dpl).exp(),
        "token temperature": lab.completion_logp(*dpo, temperature=2.0).exp(),
        "exact, DPO^(1/2)\nafter min-p": exact_min_p,
        "sampled\nafter min-p": sampled.bincount(minlength=len(stories)).double() / len(texts),
    }
    values = list(world["slots"]["name"])
    doctor = torch.tensor([values.index(read_story(text, world)["name"]) for text in stories])

    def by_name(p: Tensor) -> Tensor:
        return torch.zeros(len(values), dtype=torch.float64).index_add(0, doctor, p.double())

    kept = (min_p_logp > -math.inf).sum()
    print(f"\ntemperature 2: min-p keeps {kept} of {len(stories):,} stories;", end=" ")
    print(f"effective sample size {ess:,.0f} of {config.samples:,}")
    print("total variation among well-formed texts, of stories and of names,", end=" ")
    print("to exact, and to exact after min-p")
    for label, p in routes.items():
        p = p / p.sum()
        tvs = [total_variation(f(p), f(q)) for q in (exact, exact_min_p) for f in (lambda x: x, by_name)]
        print(f"{label.replace(chr(10), ' '):32}" + "".join(f"{tv:7.3f}" for tv in tvs))
    return {
        "logp": logp.log_softmax(0),
        "token_logp": [lab.completion_logp(*dpo, temperature=t).log_softmax(0) for t in TEMPERATURES],
        "errors": errors,
        "names": {label: dict(zip(values, by_name(p).tolist(), strict=True)) for label, p in routes.items()},
    }


def draw(comparisons: dict[str, np.ndarray], stories: dict[str, Any], path: str) -> None:
    """Draw a panel for each question; readable in grey."""
    figure, (equal_entropy, malformed, names) = plt.subplots(1, 3, figsize=(15, 4.6))
    for (label, percent), color in zip(comparisons.items(), (lab.BLUE, lab.ORANGE), strict=True):
        equal_entropy.plot(TEMPERATURES, percent[:, 0], "-", color=color, label=f"{label}: total variation")
        equal_entropy.plot(TEMPERATURES, percent[:, 1], "--", color=color, label=f"{label}: pairs reversed")
    equal_entropy.set(xlabel="token temperature", ylabel="difference, %")
    equal_entropy.set_title("1. At equal entropy, token is not global temperature")
    equal_entropy.legend()
    styles = (("-", lab.ORANGE), (":", lab.RED), ("--", lab.SKY), ("o", lab.BLUE))
    for (label, percent), (style, color) in zip(stories["errors"].items(), styles, strict=True):
        x = list(POLICIES.values()) if label.startswith("DPL") else TEMPERATURES
        malformed.plot(x, percent[:, 1], style, color=color, label=label)
    malformed.set(xlabel="temperature (token, global, or α/β)", ylabel="malformed stories, %", ylim=(-3, 103))
    malformed.set_title("2. Heat breaks stories; DPL does not")
    malformed.legend(loc="center right", bbox_to_anchor=(1.02, 0.42))
    for y, shares in enumerate(stories["names"].values()):
        total = sum(shares.values())
        lab.stack(names, y, 0.6, {name: 100 * share / total for name, share in shares.items()}, 14)
        names.text(102, y, f"{total:.1%}", va="center", fontsize=9)
    names.set_yticks(range(len(stories["names"])), list(stories["names"]))
    names.invert_yaxis()
    names.text(102, -0.45, "well-formed", fontsize=9)
    names.set(xlim=(0, 100), xlabel="well-formed stories at temperature 2, % (by the doctor's name)")
    names.set_title("3. DPL keeps the doctors, min-p drops three")
    save_figure(figure, path)


def main() -> None:
    """Answer the three questions and draw the picture."""
    config = parse(TemperatureConfig, __doc__)
    stories, logits = story_results(config), random_model()
    random = text_logp(logits, 1.0), [text_logp(logits, t) for t in TEMPERATURES]
    comparisons = {
        "random model": compare_temperatures(*random, f"{len(random[0]):,} texts of a random model"),
        "stories": compare_temperatures(stories["logp"], stories["token_logp"], "DPO's well-formed stories"),
    }
    draw(comparisons, stories, config.out_file)


if __name__ == "__main__":
    run_command(main)
