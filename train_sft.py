"""Supervised fine-tuning: makes a reference policy from (prompt, completion) rows by maximum likelihood.

    loss = -log pi(completion | prompt), summed over the completion's tokens and its end token

    python train_sft.py --model HuggingFaceTB/SmolLM2-135M --data mine.jsonl --lora_rank 0 --out_dir out/sft

Rows: {"prompt": ..., "completion": ...}, both strings or both message lists, or {"messages": [...]}; also
rows that sample.py wrote, of which a text that it cut ("finish": "length") gets no end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from common.encode import encode_rows
from common.files import error_prefix
from common.flags import flag, run_command
from common.rows import read_examples
from core.model import Stats
from core.trainer import TrainConfig, parse_run, train


@dataclass
class SFTConfig(TrainConfig):
    """Flags of train_sft.py."""

    out_dir: str = flag("out/sft", "Folder for the adapter or model, metrics.jsonl and checkpoint/.")


def objective(policy: Stats, reference: None) -> dict[str, Tensor]:
    """-log pi(completion | prompt) in nats, (examples,)."""
    return {"loss": -policy.logp[:, 0]}


def load_examples(path: str, tokenizer: PreTrainedTokenizerBase, max_length: int, chat: bool) -> Sequence:
    """Token ids (prompt, completion) of a file's rows, each at most max_length tokens together."""
    rows = read_examples(path, chat)
    with error_prefix(path):
        examples, cut = encode_rows(rows, ("prompt", "completion"), tokenizer, max_length)
    print(f"{len(examples):,} examples: truncated {cut:,} to {max_length} tokens")
    return examples


def finetune(config: SFTConfig) -> None:
    """Train by `config`, without a reference."""
    train(config, objective, reference=False, load=load_examples)


def main() -> None:
    """Train by the command line's flags."""
    finetune(parse_run(SFTConfig, __doc__, society=None))


if __name__ == "__main__":
    run_command(main)
