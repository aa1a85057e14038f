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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.encode import decode_continuation, encode_answers, encode_prompts, end_tokens
from common.files import InputError
from common.flags import flag, parse, run_command
from data.society.truth import WORLD, compare_samples, list_stories, read_story
from decode import Batch, next_token_probs
from experiments.doctor import stack
from hub import load_model
from sample import sample, sample_global_batch

VOCAB, LENGTH, END = 6, 6, 0  # of the random model: token ids, most tokens of a text, the end token
MIN_P = {"min_p": 0.01}
TEMPERATURES = np.linspace(0.5, 4, 15)
POLICIES = {"dpo": 1, "dpl2": 2, "dpl4": 4}  # folder: alpha / beta


@dataclass
class TemperatureConfig:
    """Flags of experiments/temperature.py."""

    policies: str = flag("out/doctor", "Folder in which experiments/doctor.py trained dpo, dpl2 and dpl4.")
    samples: int = flag(2000, "Samples at each temperature; also the number of particles.")
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
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
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


@torch.no_grad()
def story_logits(
    model: PreTrainedModel, prompt: list[int], answers: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Logits that predict each answer's tokens, (answers, tokens, vocab), and the tokens, padded with -1."""
    targets = torch.full((len(answers), max(map(len, answers))), -1)
    for row, answer in zip(targets, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer)
    ids = torch.cat([torch.tensor([prompt]).expand(len(answers), -1), targets[:, :-1].clamp(min=0)], 1)
    return torch.cat([model(part).logits[:, len(prompt) - 1 :] for part in ids.split(128)]), targets


def story_logp(logits: Tensor, targets: Tensor, **sampling_params: float) -> Tensor:
    """Log-probability of each answer, (answers,), under next_token_probs with `sampling_params`."""
    parts = []
    for z, y in zip(logits.split(128), targets.split(128), strict=True):
        p = next_token_probs(z.flatten(0, 1).double(), **sampling_params).view(*y.shape, -1)
        logp = p.gather(-1, y.clamp(min=0)[..., None])[..., 0].log()
        parts.append(logp.masked_fill(y < 0, 0).sum(-1))
    return torch.cat(parts)


def story_results(config: TemperatureConfig) -> dict[str, Any]:
    """Sample and compute everything about the society's stories, and print it; returns what draw() needs.

    The keys: logp (1024,) and token_logp, for compare_temperatures(); errors {label: (points, 2)}, percent of
    names misspelt or missing and of stories malformed; names {label: {name: probability}}, for each route to
    temperature 2.
    """
    world, models = json.loads(WORLD.read_text()), {}
    for name in POLICIES:
        folder = Path(config.policies) / name
        if not folder.is_dir():
            raise InputError(f"--policies: no folder {folder}; experiments/doctor.py trains this policy")
        models[name], tokenizer = load_model(folder)
    story_prompt, stories = world["story_prompt"], list_stories(world)
    [prompt] = encode_prompts([story_prompt], tokenizer)
    answers = encode_answers([story_prompt] * len(stories), stories, tokenizer)
    dpo, dpl = (story_logits(models[name], prompt, answers) for name in ("dpo", "dpl2"))
    logp, min_p_logp = story_logp(*dpo), story_logp(*dpo, **MIN_P)

    def sampled(name: str, tau: float | None = None, **params: float) -> tuple[list[str], float]:
        """Texts of a policy, at a global temperature if tau is given; and the effective sample size."""
        ends, count = end_tokens(models[name], tokenizer, [story_prompt]), config.samples
        if tau is None:
            completions, ess = sample(models[name], prompt, count, 48, ends, **params), float(count)
        else:
            batch, rng = Batch(models[name], [prompt], [0] * count, 48, ends), np.random.default_rng(0)
            completions, ess, _ = sample_global_batch(batch, count, tau, rng, **params)
        tokens = [c.tokens[: -1 if c.finish == "eos" else None] for c in completions]
        return [decode_continuation(ids, tokenizer) for ids in tokens], ess

    def error_rates(texts: list[str]) -> tuple[float, float]:
        metrics = compare_samples([(story_prompt, text) for text in texts], world, 0.1, 0.1)
        return 100 * metrics["misspelt"], 100 * metrics["malformed"]

    samples = {
        "DPO, token temperature": [sampled("dpo", temperature=t) for t in TEMPERATURES],
        "DPO, global temperature, all texts": [sampled("dpo", t) for t in TEMPERATURES],
        "DPO, global temperature, min-p": [sampled("dpo", t, **MIN_P) for t in TEMPERATURES],
        "DPL, α/β": [sampled(name) for name in POLICIES],
    }
    errors = {label: np.array([error_rates(t) for t, _ in runs]) for label, runs in samples.items()}
    for column, title in enumerate(("name misspelt or missing, %", "story malformed, %")):
        print(f"\n{title:26}         at " + " ".join(f"{t:5.2f}" for t in TEMPERATURES))
        for label, percent in errors.items():
            print(f"{label:34} " + " ".join(f"{x:5.1f}" for x in percent[:, column]))

    index = {text: i for i, text in enumerate(stories)}
    texts, ess = samples["DPO, global temperature, min-p"][TEMPERATURES.tolist().index(2.0)]
    sampled = torch.tensor([index[text] for text in texts if text in index], dtype=torch.long)
    exact, exact_min_p = (logp / 2).softmax(0), (min_p_logp / 2).softmax(0)
    routes = {  # probability of each story
        "exact, DPO^(1/2)": exact,
        "trained, DPL": story_logp(*dpl).exp(),
        "token temperature": story_logp(*dpo, temperature=2.0).exp(),
        "exact, DPO^(1/2)\nafter min-p": exact_min_p,
        "sampled\nafter min-p": sampled.bincount(minlength=len(stories)).double() / len(texts),
    }
    values = list(world["slots"]["name"])
    doctor = torch.tensor([values.index(read_story(text, world)["name"]) for text in stories])

    def by_name(p: Tensor) -> Tensor:
        return torch.zeros(len(values), dtype=torch.float64).index_add(0, doctor, p.double())

    print(
        f"\ntemperature 2: min-p keeps {(min_p_logp > -math.inf).sum()} of {len(stories):,} stories;", end=" "
    )
    print(f"effective sample size {ess:,.0f} of {config.samples:,}")
    print(
        "total variation among well-formed texts, of stories and of names, to exact, and to exact after min-p"
    )
    for label, p in routes.items():
        p = p / p.sum()
        tvs = [total_variation(f(p), f(q)) for q in (exact, exact_min_p) for f in (lambda x: x, by_name)]
        print(f"{label.replace(chr(10), ' '):32}" + "".join(f"{tv:7.3f}" for tv in tvs))
    return {
        "logp": logp.log_softmax(0),
        "token_logp": [story_logp(*dpo, temperature=t).log_softmax(0) for t in TEMPERATURES],
        "errors": errors,
        "names": {label: dict(zip(values, by_name(p).tolist(), strict=True)) for label, p in routes.items()},
    }


def draw(comparisons: dict[str, np.ndarray], stories: dict[str, Any], path: Path) -> None:
    """Draw a panel for each question; readable in grey."""
    figure, (equal_entropy, malformed, names) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for (label, percent), grey in zip(comparisons.items(), ("black", "0.6"), strict=True):
        equal_entropy.plot(TEMPERATURES, percent[:, 0], "-", color=grey, label=f"{label}: total variation")
        equal_entropy.plot(TEMPERATURES, percent[:, 1], "--", color=grey, label=f"{label}: pairs reversed")
    equal_entropy.set(xlabel="token temperature", ylabel="difference, %")
    equal_entropy.set_title("1. Token against global, at equal entropy", loc="left")
    for (label, percent), style in zip(stories["errors"].items(), ("k-", "k:", "k--", "ko"), strict=True):
        x = list(POLICIES.values()) if label.startswith("DPL") else TEMPERATURES
        malformed.plot(x, percent[:, 1], style, label=label)
    malformed.set(xlabel="temperature (token, global, or α/β)", ylabel="malformed stories, %", ylim=(-3, 103))
    malformed.set_title("2. Heat breaks stories", loc="left")
    equal_entropy.legend(frameon=False, fontsize=9)
    malformed.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.02, 0.06))
    for y, shares in enumerate(stories["names"].values()):
        total = sum(shares.values())
        stack(names, y, 0.6, {name: 100 * share / total for name, share in shares.items()}, 14)
        names.text(102, y, f"{total:.1%}", va="center", fontsize=9)
    names.set_yticks(range(len(stories["names"])), list(stories["names"]))
    names.invert_yaxis()
    names.text(102, -0.45, "well-formed", fontsize=9)
    names.set(xlim=(0, 100), xlabel="share of well-formed stories, % (by the doctor's name)")
    names.set_title("3. Who is the doctor, at temperature 2", loc="left")
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    """Answer the three questions and draw the picture."""
    config = parse(TemperatureConfig, __doc__)
    stories, logits = story_results(config), random_model()
    random = text_logp(logits, 1.0), [text_logp(logits, t) for t in TEMPERATURES]
    comparisons = {
        "random model": compare_temperatures(*random, f"{len(random[0]):,} texts of a random model"),
        "stories": compare_temperatures(stories["logp"], stories["token_logp"], "DPO's well-formed stories"),
    }
    draw(comparisons, stories, Path(config.out_file))


if __name__ == "__main__":
    run_command(main)
