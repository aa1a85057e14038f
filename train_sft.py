"""Supervised fine-tuning: makes a reference policy from (prompt, completion) rows by maximum likelihood.

    loss = -log pi(completion | prompt), summed over the completion's tokens, its end token included

    python train_sft.py --model HuggingFaceTB/SmolLM2-135M --data mine.jsonl --lora_rank 0 --out_dir out/sft

Rows: {"prompt": ..., "completion": ...}, both strings or both message lists, or {"messages": [...]}.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from files import InputError, flag, naming, parse, read_rows, run_command
from model import Stats
from preferences import check_messages, encode_answers, encode_prompts, fit
from trainer import TrainConfig, train


@dataclass
class SFTConfig(TrainConfig):
    """SFT's own flags."""

    data: str = flag("out/society/corpus.jsonl", "Training rows: .jsonl[.gz], .json, .parquet.")
    out_dir: str = flag("out/sft", "Where the adapter or model, metrics.jsonl and checkpoint/ go.")


def sft_loss(policy: Stats) -> Tensor:
    """-log pi(completion | prompt), (examples,) nats a sequence."""
    return -policy.logp[:, 0]


def read_example(row: dict[str, Any], where: str) -> tuple[Any, Any]:
    """(prompt, completion) of a row, both strings or both message lists. Raises InputError naming the row."""
    if isinstance(row.get("messages"), list) and row["messages"]:
        prompt, completion = row["messages"][:-1], row["messages"][-1:]
    else:
        prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        check_messages([*prompt, *completion], where)
        if len(completion) != 1 or completion[0]["role"] != "assistant" or not completion[0]["content"]:
            raise InputError(f"{where}: the completion must be one assistant message with content")
    elif not (isinstance(prompt, str) and isinstance(completion, str) and completion):
        raise InputError(f"{where}: needs 'prompt' and a non-empty 'completion', strings or message lists")
    return prompt, completion


def load_examples(path: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequence:
    """Token ids (prompt, completion) of a file's rows, each at most max_length tokens together."""
    prompts, completions = zip(*(read_example(row, where) for where, row in read_rows(path)), strict=True)
    with naming(path):
        encoded = encode_prompts(prompts, tokenizer), encode_answers(prompts, completions, tokenizer)
        bos = tokenizer.bos_token_id
        return [fit(pair, bos, max_length) for pair in zip(*encoded, strict=True)]


def finetune(config: SFTConfig) -> None:
    """Train by `config`: no reference, no margins."""
    train(config, lambda *_: lambda policy, _: (sft_loss(policy), None), load_examples, reference=False)


def main() -> None:
    """Train by the command line's flags."""
    finetune(parse(SFTConfig, __doc__))


if __name__ == "__main__":
    run_command(main)
