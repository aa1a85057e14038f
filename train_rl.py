"""DPL by reinforcement learning: the objective itself, on the policy's own texts.

    J(pi) = E_{y ~ pi}[ r(x, y) - alpha log pi(y|x) + beta log pi_ref(y|x) ]        (DPL paper, equation 4)

train_dpl.py trains a shortcut to the optimum of J, which needs pairs. Here the policy writes K texts y_i for
each prompt of a step and gets a reward r_i for each. They estimate the gradient of J (leave-one-out, Ahmadian
et al., 2024):

    R_i = r_i - alpha log pi(y_i) + beta log pi_ref(y_i)                 (no gradient)
    grad J  =  E[ 1/K sum_i (R_i - mean_{j != i} R_j) grad log pi(y_i) ]

(The gradient of -alpha log pi(y_i) itself has mean 0.) alpha = beta is RLHF with its KL penalty. Each batch
of texts serves one optimizer step, so there are no importance weights and no clipping. The loss on pairs sees
differences of two texts only; J also sees what both have in common, such as how they end.

    python train_rl.py --alpha 0.2                                          # the embedded society
    torchrun --nproc_per_node 8 train_rl.py --model MODEL --data prompts.jsonl --reward_model REWARD --chat

The reward is a reward model (see train_reward.py), or a function of a script that calls train():
reward(rows, texts) gets the row of --data and the text of each sample, and returns numbers.
"""

import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import parallel
from common.checkpoint import open_run, plan_run, start_run
from common.encode import encode_prompts, end_tokens
from common.files import ROOT, InputError, atomic_write, digest_json, error_prefix
from common.flags import flag, require, run_command
from common.rows import last_turn, read_prompts, sample_row
from core.checks import check_inputs
from core.hub import digest_weights, export, load_model
from core.lora import lora_disabled
from core.model import Stats, set_forward
from core.pairs import count_tokens, default_micro_batch_tokens, describe
from core.reference import digest_model, score_completions
from core.trainer import (
    TrainConfig,
    forward_backward,
    is_bfloat16,
    load_policy,
    make_trainable,
    parse_run,
    run_steps,
)
from sample import completion_text, sample_completions
from train_reward import load_scorer

Reward = Callable[[list[dict[str, Any]], list[str]], Sequence[float]]
PHASES = "sampling", "reference", "reward", "gradient"  # of a step: metrics.jsonl has the seconds of each
# The society's reward, in nats, of a text that is no story, opinion or answer. So low because J flattens the
# reference: at alpha / beta = 4, the sum of pi_ref(y)^(1/4) over other texts of up to 48 tokens is e^165, and
# over all stories, each times its exp(r / alpha), e^6.5. This reward multiplies the former by e^-250
MALFORMED = -100.0
EVALUATION = 2**32  # the "step" of held-out prompts, which seeds their samples: no step has this number


@dataclass
class RLConfig(TrainConfig):
    """Flags of train_rl.py."""

    data: str | None = flag(None, "Rows with a 'prompt': .jsonl[.gz], .json, .parquet, .csv, .txt.")
    eval_data: str | None = flag(None, "Other prompts, sampled every --eval_every steps.")
    out_dir: str = flag("out/rl", "Folder for the adapter, metrics.jsonl, samples/ and checkpoint/.")
    batch_size: int = flag(8, "Prompts per optimizer step, over all processes.", "[1, inf)")
    num_samples: int = flag(8, "Texts per prompt and step: K.", "[2, inf)")
    max_new_tokens: int = flag(256, "Longest text, in tokens.", "[1, inf)")
    alpha: float = flag(0.2, "Weight of the entropy; alpha / beta is the global temperature.", "(0, inf)")
    beta: float = flag(0.1, "Weight of the cross-entropy to the reference.", "[0, inf)")
    reward_model: str | None = flag(None, "Folder or hub name of a decoder with a head 'score' of one label.")
    no_reward_if_cut: bool = flag(False, "A text without an end token has the reward 0: for rewards above 0.")
    sample_batch_size: int = flag(128, "Texts sampled at a time; fewer save memory.", "[1, inf)")
    log_samples: int = flag(50, "Steps between the files of samples/.", "[1, inf)")
    max_length: int = flag(0, "0: prompts are not cut, and --max_new_tokens limits the texts.")
    lora_dropout: float = flag(0.0, "0: the texts come from the policy without dropout.", "[0, 0]")

    def __post_init__(self) -> None:
        super().__post_init__()
        # runs of before this was refused have another value
        require(self, "max_length", self.max_length == 0 or self.resume, "left out: prompts are not cut")


class Known(NamedTuple):
    """What the loss gets of a step's texts besides the policy: (rows, texts) each."""

    logp: Tensor  # of the reference, in nats
    advantage: Tensor


def advantages(returns: Tensor) -> Tensor:
    """R_i minus the mean R of the prompt's other texts; (prompts, K)."""
    others = (returns.sum(1, keepdim=True) - returns) / (returns.shape[1] - 1)
    return returns - others


def objective(policy: Stats, known: Known) -> dict[str, Tensor]:
    """A loss whose gradient is the estimate of -grad J, and KL(pi || pi_ref) in nats a text; (rows,) each."""
    return {
        "loss": -(known.advantage * policy.logp).mean(1),
        "kl": (policy.logp - known.logp).mean(1),  # in place of forward_backward's, of the other sign
    }


def split_texts(
    prompts: list[list[int]], texts: list[list[int]], max_tokens: int
) -> list[tuple[list[int], ...]]:
    """Rows (prompt, *texts): a prompt's texts in equal parts, as few as keep every row within `max_tokens`.

    If one text is longer than that, rows of one text.
    """
    k = len(texts) // len(prompts)
    for size in (size for size in range(k, 0, -1) if k % size == 0):
        rows = [(prompts[i // k], *texts[i : i + size]) for i in range(0, len(texts), size)]
        if max(map(count_tokens, rows)) <= max_tokens:
            break
    return rows


def society_reward() -> Reward:
    """The society's utilities: of stories and opinions in nats, of a debate's answers minus their rank."""
    from data.society.truth import WORLD, utility  # imported here: other rewards do not need it

    world = json.loads(WORLD.read_bytes())

    def reward(rows: list[dict[str, Any]], texts: list[str]) -> list[float]:
        values = []
        for row, text in zip(rows, texts, strict=True):
            prompt = last_turn(row["prompt"])
            if debate := world["debates"].get(prompt):
                value = -debate["ranking"].index(text) if text in debate["ranking"] else -math.inf
            else:
                value = utility(prompt, text, world)
            values.append(max(value, MALFORMED))
        return values

    return reward


def load_reward(config: RLConfig) -> Reward:
    """The reward that the flags name. Raises InputError if they name none."""
    if config.reward_model is None:
        is_society = Path(config.data).resolve().is_relative_to(ROOT / "data/society")
        require(config, "reward_model", is_society, "given")
        return society_reward()
    with error_prefix("--reward_model"):
        score = load_scorer(config.reward_model)

    def reward(rows: list[dict[str, Any]], texts: list[str]) -> np.ndarray:
        options = [row.get("template_options") for row in rows]
        with error_prefix(f"--reward_model {config.reward_model}"):
            return score([row["prompt"] for row in rows], texts, options)

    return reward


@parallel.distributed()
def train(config: RLConfig, reward: Reward | None = None) -> None:
    """Train by `config` on a reward, which the flags name unless it is given; writes the run's folder."""
    # ---- model, prompts, reward
    out, device = open_run(config), parallel.get_device()
    max_tokens = config.micro_batch_tokens or default_micro_batch_tokens(device)
    reward = reward or load_reward(config)
    model, tokenizer = load_policy(config, device, load_model)
    rows, encoded = {}, {}
    for path in filter(None, (config.data, config.eval_data)):
        rows[path] = read_prompts(path, chat=config.chat)
        prompts = [row["prompt"] for row in rows[path]]
        with error_prefix(path):
            encoded[path] = encode_prompts(
                prompts, tokenizer, [row.get("template_options") for row in rows[path]]
            )
    with error_prefix(f"--model {config.model}"):
        ends = end_tokens(model, tokenizer, [row["prompt"] for some in rows.values() for row in some])
    text = [0] * config.max_new_tokens  # as long as a text may get
    longest = {path: [(ids, text) for ids in some] for path, some in encoded.items()}
    print(f"the first prompt, as the model sees it:\n{describe(encoded[config.data][:1], tokenizer)}")
    digests = {"model": digest_model(model), "data": digest_json(encoded[config.data])}
    digests |= {"reward_model": digest_weights(config.reward_model)} if config.reward_model else {}
    some = longest[config.data], longest.get(config.eval_data, [])
    check_inputs(config, model, *some, digests, length="max_new_tokens")
    reference = model  # with its adapter off
    if not config.lora_rank:
        reference = copy.deepcopy(model).requires_grad_(False)
        reference.attention = config.attention
        set_forward(reference, device, is_bfloat16(config, device), config.parallel == "fsdp")
    make_trainable(config, model, device)
    plan = plan_run(config, out, digests, len(encoded[config.data]))
    start_run(config, out, plan)

    def rollout(path: str, indices: list[int], step: int) -> dict[str, float]:
        """Sample the prompts, reward the texts, and add to the gradient; returns what to log."""
        times, k = [time.monotonic()], config.num_samples
        rank, world = parallel.get_rank(), parallel.get_world_size()
        mine = indices[rank::world]
        seeds = [[config.seed, step, i] for i in range(len(indices))][rank::world]
        model.eval()
        # with an adapter the two are one model, and the second does nothing
        with parallel.unsharded(model), parallel.unsharded(reference), torch.no_grad():
            prompts, limits = [encoded[path][i] for i in mine], (config.max_new_tokens, ends)
            with torch.compiler.set_stance("force_eager"):  # layers are compiled for packed rows
                by_prompt = sample_completions(model, prompts, seeds, k, *limits, config.sample_batch_size)
                drawn = list(itertools.chain.from_iterable(by_prompt))
            times.append(time.monotonic())
            asked, tokens = [i for i in mine for _ in range(k)], [c.tokens for c in drawn]
            with lora_disabled(reference):
                ref = score_completions(reference, [encoded[path][i] for i in asked], tokens, max_tokens)
        times.append(time.monotonic())
        texts = [completion_text(c, tokenizer) for c in drawn]
        given = np.asarray(reward([rows[path][i] for i in asked], texts) if texts else [], dtype=float)
        if given.shape != (len(texts),) or not np.isfinite(given).all():
            raise InputError(f"the reward must be a finite number for each text: {given}")
        if config.no_reward_if_cut:
            given = np.where([c.finish == "eos" for c in drawn], given, 0.0)
        parts = parallel.all_gather(list(zip(drawn, texts, given.tolist(), ref.tolist(), strict=True)))
        times.append(time.monotonic())

        # every process knows all texts: process i % world sampled prompt i as its (i // world)-th
        every = [parts[i % world][i // world * k + s] for i in range(len(indices)) for s in range(k)]
        drawn, texts, rewards, ref = zip(*every, strict=True)
        # float64: rewards of -100 cancel in the advantages
        columns = (rewards, [c.logp for c in drawn], ref)
        r, logp, ref = (torch.tensor(x, dtype=torch.float64).view(-1, k) for x in columns)
        returns = r - config.alpha * logp + config.beta * ref
        packed = split_texts([encoded[path][i] for i in indices], [c.tokens for c in drawn], max_tokens)
        known = Known(*(x.float().view(len(packed), -1) for x in (ref, advantages(returns))))
        row = forward_backward(model, packed, range(len(packed)), known, objective, max_tokens)
        times.append(time.monotonic())

        seconds, count = np.diff(times).tolist(), sum(len(c.tokens) for c in drawn)
        finish, groups = [c.finish for c in drawn], [slice(i, i + k) for i in range(0, len(texts), k)]
        row |= {
            "objective": returns.mean().item(),
            "reward": r.mean().item(),
            "entropy": -logp.mean().item(),  # nats a text, as the cross-entropy
            "cross_entropy": -ref.mean().item(),
            "tokens_per_text": count / len(texts),
            "share_cut": finish.count("length") / len(texts),
            "unique_texts": float(np.mean([len(set(texts[group])) / k for group in groups])),
            "equal_rewards": float(np.mean([len(set(rewards[group])) == 1 for group in groups])),
            "sampled_tokens_per_second": count / seconds[0],
            **{f"seconds_{name}": value for name, value in zip(PHASES, seconds, strict=True)},
        }
        if step % config.log_samples == 0 and step != EVALUATION and rank == 0:
            with atomic_write(out / "samples" / f"{step:06d}.jsonl") as file:
                for i, (text, value, end) in enumerate(zip(texts, rewards, finish, strict=True)):
                    sample = sample_row(rows[path][indices[i // k]], text, {"reward": value, "finish": end})
                    file.write(json.dumps(sample, ensure_ascii=False) + "\n")
        return row | {"tokens": sum(map(count_tokens, packed))}

    def gradient(step: int, batch: list[int]) -> tuple[dict[str, float], int]:
        row = rollout(config.data, batch, step)
        return row, int(row.pop("tokens"))

    def evaluate() -> dict[str, float]:
        with torch.no_grad(), error_prefix(f"--eval_data {config.eval_data}"):
            every = list(range(len(encoded[config.eval_data])))
            row = rollout(config.eval_data, every, EVALUATION)
        return {f"eval_{name}": value for name, value in row.items()}

    row = run_steps(config, out, plan, model, digests, gradient, evaluate if config.eval_data else None)
    export(out, config, model, tokenizer, row)


def main() -> None:
    """Train by the command line's flags."""
    train(parse_run(RLConfig, __doc__, "recipes/society_rl.txt"))


if __name__ == "__main__":
    run_command(main)
