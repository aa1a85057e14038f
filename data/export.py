"""Samples that sample.py wrote, in the layouts that other programs read.

    messages      {"messages": [..., {"role": "assistant", "content": ...}]}
    alpaca_eval   a JSON list for AlpacaEval; one answer a prompt, the first sample
    arena_hard    rows for Arena-Hard 2, likewise; --prompts has their uid

The command:

    python data/export.py --samples out/dpl/samples.jsonl --format alpaca_eval --name dpl --out_file dpl.json
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from common.files import InputError, atomic_write
from common.flags import Flags, flag, parse, require, require_new, run_command
from common.rows import last_turn, message, options_of, read_prompts, read_rows, read_sample


@dataclass
class ExportConfig(Flags):
    """Flags of data/export.py."""

    samples: str = flag("out/dpl/samples.jsonl", "File that sample.py wrote.")
    format: str = flag("messages", "Layout of --out_file.", ("messages", "alpaca_eval", "arena_hard"))
    name: str = flag("policy", "What alpaca_eval and arena_hard call the policy.")
    prompts: str | None = flag(None, "For arena_hard: the file of prompts, whose rows have a uid.")
    out_file: str | None = flag(None, "File to write.")
    overwrite: bool = flag(False, "Replace --out_file.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "out_file", self.out_file is not None, "given")
        require_new(self, "out_file")
        known = self.prompts is not None or self.format != "arena_hard"
        require(self, "prompts", known, "given for arena_hard, whose rows have the uid of their prompt")


def convert(config: ExportConfig, uids: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of --samples in the layout of --format. `uids` are Arena-Hard's, by question."""
    rows, seen = [], set()
    for where, row in read_rows(config.samples):
        sample = read_sample(row, where)
        question, is_message = last_turn(sample.prompt), isinstance(sample.prompt, list)
        text = sample.text.strip() if is_message else sample.text  # a chat template writes its own space
        turns = sample.prompt if is_message else message("user", question)
        stats = {key: row[key] for key in ("tokens", "logp", "sampled_logp", "finish") if key in row}
        if config.format == "messages":
            rows.append({"messages": turns + message("assistant", text)} | options_of(sample.options) | stats)
        elif json.dumps(sample.prompt) not in seen:
            seen.add(json.dumps(sample.prompt))
            if config.format == "alpaca_eval":
                rows.append({"instruction": question, "output": text, "generator": config.name} | stats)
            else:
                answer = {"role": "assistant", "content": {"answer": text}}
                if question not in uids:
                    raise InputError(f"{where}: its question has no uid in --prompts {config.prompts}")
                new = {"uid": uids[question], "ans_id": str(len(rows)), "model": config.name}
                new |= {"messages": [*turns, answer], "metadata": {"token_len": row.get("tokens")}}
                rows.append(new | stats)
    return rows


def main() -> None:
    """Write --out_file."""
    config = parse(ExportConfig, __doc__)
    prompts = read_prompts(config.prompts) if config.prompts else ()
    uids = {last_turn(row["prompt"]): row["uid"] for row in prompts if "uid" in row}
    rows = convert(config, uids)
    with atomic_write(config.out_file) as file:
        if config.format == "alpaca_eval":
            file.write(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(rows):,} rows in {config.out_file}")


if __name__ == "__main__":
    run_command(main)
