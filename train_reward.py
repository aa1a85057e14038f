"""Reward models: a number for every text, learned from preferences (a quality metric of the DPL paper).

In the Bradley-Terry model the text y_w is preferred to y_l with probability sigmoid(r(y_w) - r(y_l)), so
the reward r is trained by

    loss = -log sigmoid(r(y_w) - r(y_l))  [+ center (r(y_w) + r(y_l))^2].

The preferences fix r only up to a constant for each prompt. The optional second term keeps it near 0
(Eisenstein et al., 2023), so that rewards of different prompts can be compared.

r is a language model whose head is one row of weights, `score`. It reads the hidden state of the text's last
token. That is a sequence classifier of transformers with one label, and so is what this script writes:

    AutoModelForSequenceClassification.from_pretrained("out/reward", num_labels=1)

    python train_reward.py                       # the embedded society
    python train_reward.py --model MODEL --data pairs.jsonl --eval_data held_out.jsonl --chat
    python evaluate.py quality --reward_model out/reward
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.encode import answer_lead, encode_answers, encode_prompts, render
from common.files import InputError, error_prefix
from common.flags import flag, run_command
from common.parallel import get_device, get_dtype
from common.rows import Text, message, read_pairs
from core.checks import check_packable
from core.hub import load_reward_model
from core.model import Stats
from core.pairs import Pair
from core.reference import score_completions
from core.trainer import TrainConfig, parse_run, train


@dataclass
class RewardConfig(TrainConfig):
    """Flags of train_reward.py."""

    out_dir: str = flag("out/reward", "Folder for the adapter or model, metrics.jsonl and checkpoint/.")
    center: float = flag(0.0, "Weight of (r(chosen) + r(rejected))^2; 0.01 is usual.", "[0, inf)")


def objective(policy: Stats, reference: None, *, center: float) -> dict[str, Tensor]:
    """Bradley-Terry loss (pairs,), and the rewards; `policy.logp` (pairs, 2) holds the rewards."""
    chosen, rejected = policy.logp.unbind(-1)
    loss = -F.logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2
    return {
        "loss": loss,
        "reward_margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }


def encode_texts(
    prompts: Sequence[Text],
    answers: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    options: Sequence[dict] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """Token ids (prompt, answer) of each text as a reward model reads it, one after the other.

    Messages go through the chat template as a whole conversation, which writes the only BOS. A sampled text
    after messages becomes the assistant's message. Strings end with the end token. Padding tokens at the end
    of a text are removed: transformers skips them too. pack() never feeds the last id of an answer, so each
    answer gets one padding token more.
    """
    texts, starts = [], encode_prompts(prompts, tokenizer, options)
    for number, (prompt, answer, start) in enumerate(zip(prompts, answers, starts, strict=True), 1):
        some = options[number - 1] if options else None
        if isinstance(prompt, str):
            text = start + encode_answers([prompt], [answer], tokenizer)[0]
        else:
            with error_prefix(f"row {number}"):
                if isinstance(answer, str):  # the template writes its space before the answer again
                    lead = answer_lead(prompt, tokenizer, some)
                    answer = message("assistant", answer.removeprefix(lead).strip())
                whole = render([*prompt, *answer], tokenizer, False, some)
            text = tokenizer(whole, add_special_tokens=False).input_ids
        while len(text) > 1 and text[-1] == tokenizer.pad_token_id:
            text.pop()
        size = max(1, min(len(start), len(text) - 1)) if text[: len(start)] == start else 1
        texts.append((text[:size], text[size:] + [tokenizer.pad_token_id]))
    return texts


def load_texts(
    path: str, tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool = False
) -> list[Pair]:
    """Token ids of a file's pairs. Raises InputError naming the file.

    Pairs above `max_length` tokens are dropped: a model that judges a text by its last token would judge a
    text that was cut by a token in its middle.
    """
    rows = read_pairs(path, chat)
    prompts, chosen, rejected = ([row[key] for row in rows] for key in Pair._fields)
    options = [row.get("template_options") for row in rows]
    with error_prefix(path):
        texts = (encode_texts(prompts, answers, tokenizer, options) for answers in (chosen, rejected))
        pairs = []
        for (start, a), (other, b) in zip(*texts, strict=True):
            if start != other:
                start, a, b = start[:1], start[1:] + a, other[1:] + b
            pairs.append(Pair(*(array("i", ids) for ids in (start, a, b))))
        fits = [pair for pair in pairs if len(pair.prompt) + max(map(len, pair[1:])) - 1 <= max_length]
        kept = [pair for pair in fits if pair.chosen != pair.rejected]
        dropped = f"dropped {len(pairs) - len(fits):,} longer than {max_length} tokens"
        dropped += f" and {len(fits) - len(kept):,} with chosen equal to rejected"
        if not kept:
            raise InputError(f"no pair left of {len(pairs):,}: {dropped}; --max_length sets the length")
    print(f"{len(kept):,} pairs: {dropped}")
    return kept


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    answers: Sequence[Text],
    options: Sequence[dict] | None = None,
) -> np.ndarray:
    """The reward of each answer to its prompt, (texts,). Raises InputError for a text that is too long."""
    texts = encode_texts(prompts, answers, tokenizer, options)
    return score_completions(model, *zip(*texts, strict=True))


def load_scorer(path: str) -> Callable[..., np.ndarray]:
    """score_texts() with a trained reward model and its tokenizer, from a folder or the hub.

    Raises InputError if it cannot be loaded, has no reward head or cannot be packed.
    """
    model, tokenizer = load_reward_model(path, str(get_device()), get_dtype())
    if not model.score.weight.any():
        raise InputError(f"{path}: is a language model without a reward head; see train_reward.py")
    check_packable(model, path)
    return partial(score_texts, model, tokenizer)


def main() -> None:
    """Train by the command line's flags."""
    config = parse_run(RewardConfig, __doc__)
    loss = partial(objective, center=config.center)
    train(config, loss, reference=False, load_model=load_reward_model, load=load_texts)


if __name__ == "__main__":
    run_command(main)
