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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import model as models
from checks import max_positions
from files import InputError, error_prefix, flag, parse, require, run_command
from formats import Text, read_pairs
from model import Stats
from preferences import Pair, encode_answers, encode_prompts, micro_batches, truncate
from trainer import TrainConfig, train


@dataclass
class RewardConfig(TrainConfig):
    """Flags of train_reward.py."""

    out_dir: str = flag("out/reward", "Folder for the adapter or model, metrics.jsonl and checkpoint/.")
    center: float = flag(0.0, "Weight of (r(chosen) + r(rejected))^2; 0.01 is usual, 0 leaves it out.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "center", 0 <= self.center < math.inf, "0 or more, and finite")


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


def load_reward_model(
    path: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A reward model and its tokenizer, from a folder or the hub; a causal LM gets a head of zeros.

    Both know the same padding token. transformers reads the score at the last token that is not padding.
    Raises InputError if it cannot be loaded.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # no warning of a new head
    model, tokenizer = models.load_model(path, device, dtype, reward=True)
    transformers_logging.set_verbosity(verbosity)
    config = model.config.get_text_config()
    for pad in (config.pad_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if pad is not None:
            config.pad_token_id = tokenizer.pad_token_id = pad
            return model, tokenizer
    raise InputError(f"--model {path}: its tokenizer has neither a padding nor an end token")


def encode_texts(
    prompts: Sequence[Text], answers: Sequence[Text], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of each prompt with its answer, as a reward model reads them.

    Messages go through the chat template as a whole conversation, which writes the only BOS. Strings are
    joined, and end with the end token. Padding tokens at the end are removed: transformers skips them.
    """
    texts = []
    encoded = encode_prompts(prompts, tokenizer), encode_answers(prompts, answers, tokenizer)
    for prompt, answer, *ids in zip(prompts, answers, *encoded, strict=True):
        text = ids[0] + ids[1]
        if not isinstance(prompt, str):  # encode_answers stops at the end token, a template may go on
            text = tokenizer.apply_chat_template([*prompt, *answer], return_dict=False)
        while len(text) > 1 and text[-1] == tokenizer.pad_token_id:
            text.pop()
        texts.append(text)
    return texts


def load_texts(
    path: str, tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool = False
) -> list[Pair]:
    """Token ids of a file's pairs, each text at most `max_length` tokens.

    The "prompt" is all that the two texts share from the start; it is computed once. pack() never feeds the
    last id of a completion, so each gets a padding token more. Raises InputError naming the file.
    """
    rows, pairs, not_fed = read_pairs(path, chat), [], [tokenizer.pad_token_id]
    prompts = [row["prompt"] for row in rows]
    with error_prefix(path):
        answers = ([row[key] for row in rows] for key in ("chosen", "rejected"))
        for chosen, rejected in zip(*(encode_texts(prompts, a, tokenizer) for a in answers), strict=True):
            shared = max(1, min(len(commonprefix([chosen, rejected])), len(chosen) - 1, len(rejected) - 1))
            pair = (chosen[:shared], chosen[shared:], rejected[shared:])
            pair = truncate(pair, tokenizer.bos_token_id, max_length)
            if pair[1] != pair[2]:
                pairs.append(Pair(pair[0], pair[1] + not_fed, pair[2] + not_fed))
        if not pairs:
            raise InputError("no pair left: chosen and rejected are equal in every row")
    print(f"{len(pairs):,} pairs, dropped {len(rows) - len(pairs):,} with chosen equal to rejected")
    return pairs


@torch.no_grad()
def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    answers: Sequence[Text],
    max_tokens: int = 4096,
) -> np.ndarray:
    """The reward of each answer to its prompt, (texts,), by any sequence classifier with one label.

    Texts of similar length are padded on the right, in batches of at most about `max_tokens` tokens. Equal
    texts are computed once, so that they tie. Raises InputError for a text that is too long for the model.
    """
    encoded = [tuple(text) for text in encode_texts(prompts, answers, tokenizer)]
    texts = list(dict.fromkeys(encoded))
    longest = max(map(len, texts))
    if longest > max_positions(model):
        raise InputError(f"--reward_model: a text has {longest} tokens, more than the model's positions")
    rewards = np.empty(len(texts))
    batches = micro_batches(range(len(texts)), [[text] for text in texts], max_tokens)
    bar = tqdm(total=len(texts), desc="rewards", unit="text", disable=None)
    for batch in batches:
        rows = [torch.tensor(texts[i]) for i in batch]
        mask = [torch.ones_like(row) for row in rows]
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        ids, mask = pad(rows, padding_value=tokenizer.pad_token_id), pad(mask)
        scores = model(ids.to(model.device), attention_mask=mask.to(model.device)).logits
        rewards[batch] = scores[:, 0].float().cpu().numpy()
        bar.update(len(batch))
    bar.close()
    index = {text: i for i, text in enumerate(texts)}
    return rewards[[index[text] for text in encoded]]


def main() -> None:
    """Train by the command line's flags."""
    config = parse(RewardConfig, __doc__)
    loss = partial(objective, center=config.center)
    train(config, loss, reference=False, load_model=load_reward_model, load=load_texts)


if __name__ == "__main__":
    run_command(main)
