"""What the experiments share: running scripts, exact probabilities of texts, samples, the look of plots."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from common.encode import encode_answers, encode_prompts, end_tokens
from common.files import ROOT, write_json
from core.decode import Completion, next_token_probs
from core.hub import load_model
from data.society.make_world import exact_logp
from data.society.truth import WORLD, list_stories, utility
from sample import completion_text, sample

REFERENCE = ROOT / "data/society/reference"
TRAIN_STORIES = [  # all weights: a model this small chooses its words in the head, which LoRA does not train
    *("@recipes/society.txt", "--eval_data", "data/society/test.jsonl.gz"),
    *("--lora_rank", 0, "--batch_size", 128),
    *("--lr", 5e-4, "--max_grad_norm", 0.05),  # at twice the rate, some runs forget how a text ends
]
MIN_P = {"min_p": 0.01}  # before a global temperature

# From dark to light, so that they differ in grey too. A thick light line is what theory says.
BLUE, RED, ORANGE, SKY = "#08306b", "#b5305f", "#dd7a12", "#8abbe0"
EXACT = {"color": "0.87", "lw": 6, "zorder": 0}
plt.rc("figure.constrained_layout", use=True)
plt.rc("axes", titlelocation="left", titlesize=10)
plt.rc("axes.spines", top=False, right=False)
plt.rc("legend", frameon=False, fontsize=8)

# ---- runs and files


def read_world() -> dict[str, Any]:
    """The society's prompts, grammar, utilities and dispersions."""
    return json.loads(WORLD.read_text())


def run(script: str, *flags: object) -> None:
    """Run one of the project's scripts and print the command."""
    print("$ python", script, *(str(flag).removeprefix(f"{ROOT}/") for flag in flags), flush=True)
    subprocess.run([sys.executable, script, *map(str, flags)], cwd=ROOT, check=True)


def is_finished(folder: Path) -> bool:
    """Whether a policy was trained into `folder`: all weights, or an adapter."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def flag_words(flags: dict[str, object]) -> list[object]:
    """{"--lr": 1e-3, "--chat": True} as words of a command line."""
    return [word for name, value in flags.items() for word in ((name,) if value is True else (name, value))]


def train(script: str, folder: Path, *flags: object) -> None:
    """Train a policy with one of the project's scripts, unless `folder` has it."""
    if not is_finished(folder):
        run(script, *flags, "--resume", "--out_dir", folder.resolve())


def write_arrays(path: Path, value: Any) -> None:
    """Write dictionaries, lists and arrays as JSON, atomically."""
    write_json(path, json.loads(json.dumps(value, default=np.ndarray.tolist)))


# ---- texts


def story_utilities(world: dict[str, Any]) -> np.ndarray:
    """The raters' utility of every story, in nats, (1024,)."""
    return np.array([utility(world["story_prompt"], story, world) for story in list_stories(world)])


def story_probs(folder: Path, world: dict[str, Any]) -> np.ndarray:
    """A policy's exact probability of every story, (1024,); what is missing to 1 is no story."""
    return np.exp(exact_logp(*load_model(folder), world["story_prompt"], list_stories(world)))


@torch.no_grad()
def completion_logits(model: Any, tokenizer: Any, prompt: str, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Logits that predict each text's tokens, (texts, tokens, vocab), and the tokens, padded with -1."""
    [start] = encode_prompts([prompt], tokenizer)
    answers = encode_answers([prompt] * len(texts), texts, tokenizer)
    targets = torch.full((len(answers), max(map(len, answers))), -1)
    for row, answer in zip(targets, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer)
    ids = torch.cat([torch.tensor([start]).expand(len(texts), -1), targets[:, :-1].clamp(min=0)], 1)
    return torch.cat([model(part).logits[:, len(start) - 1 :] for part in ids.split(128)]), targets


def completion_logp(logits: Tensor, targets: Tensor, **sampling_params: float) -> Tensor:
    """Log-probability of each text, (texts,), under next_token_probs with `sampling_params`."""
    parts = []
    for z, y in zip(logits.split(128), targets.split(128), strict=True):
        p = next_token_probs(z.flatten(0, 1).double(), **sampling_params).view(*y.shape, -1)
        logp = p.gather(-1, y.clamp(min=0)[..., None])[..., 0].log()
        parts.append(logp.masked_fill(y < 0, 0).sum(-1))
    return torch.cat(parts)


def read_texts(completions: list[Completion], tokenizer: Any) -> list[str]:
    """The text of each completion, without its end token."""
    return [completion_text(c, tokenizer) for c in completions]


def sample_texts(
    model: Any, tokenizer: Any, prompt: str, count: int, max_new_tokens: int, **options: Any
) -> tuple[list[Completion], list[str]]:
    """`count` completions of a prompt, and their texts; `options` are those of sample.sample()."""
    [ids] = encode_prompts([prompt], tokenizer)
    ends = end_tokens(model, tokenizer, [prompt])
    completions = sample(model, ids, count, max_new_tokens, ends, **options)
    return completions, read_texts(completions, tokenizer)


# ---- pictures


def stack(axis: Axes, y: float, height: float, shares: dict[str, float], least: float = math.inf) -> None:
    """Draw one stacked bar of shares in percent, from dark to light; names those above `least`.

    What is missing to 100 is hatched.
    """
    left, shades = 0.0, plt.colormaps["Blues_r"](np.linspace(0, 0.8, len(shares)))
    for i, (name, share) in enumerate(shares.items()):
        axis.barh(y, share, height, left=left, color=shades[i], edgecolor="white", linewidth=0.6)
        if share > least:
            color = "white" if i < len(shares) / 2 else "black"
            axis.text(left + share / 2, y, name, ha="center", va="center", fontsize=8, color=color)
        left += share
    if left < 99.9:
        axis.barh(y, 100 - left, height, left=left, color="white", edgecolor=RED, hatch="////")
