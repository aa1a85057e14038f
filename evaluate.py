"""Evaluate models and the files that sample.py wrote. Each subcommand prints a table and can write JSON.

    society     the embedded society's samples against its exact optimum (DPL paper, equation 35)
    diversity   how different the samples of a prompt are, by embeddings and by n-grams
    quality     reward under a reward model, and cross-entropy to the reference policy
    judge       diversity as a language model rates it (DPL paper, B.1)
    winrate     one policy's samples against another's (MallowsPO paper, C.3.1)
    answers     best-of-N on problems with a right answer (DPL paper, 4.2)
    choices     calibration on multiple choice (DPL paper, 4.3)

diversity, quality, judge and winrate compute a metric for each prompt, from that prompt's samples, and print
its mean over prompts with a 95% bootstrap interval. The interval is over prompts: samples of one prompt are
not independent. --baseline adds the samples of another policy, such as the reference. For diversity, quality
and judge, the table then has the difference too, taken prompt by prompt. Its interval is often narrower
than that of either mean.

    python evaluate.py society
    python evaluate.py diversity --samples dpl.jsonl --baseline dpo.jsonl --embedder ENCODER
    python evaluate.py quality --samples dpl.jsonl --baseline dpo.jsonl --reward_model out/reward
    python evaluate.py judge --samples dpl.jsonl --endpoint http://localhost:8000/v1 --judge_model NAME
    python evaluate.py winrate --samples dpl.jsonl --baseline dpo.jsonl --reward_model out/reward
    python evaluate.py answers --problems gsm8k.jsonl --samples dpo.jsonl dpl.jsonl
    python evaluate.py choices --questions mmlu.jsonl --models out/dpo out/dpl
"""

import importlib
import sys

from common.files import InputError
from common.flags import parse, run_command

COMMANDS = ("society", "diversity", "quality", "judge", "winrate", "answers", "choices")  # files in metrics/


def main() -> None:
    """Run the subcommand that the command line names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in COMMANDS:
        raise InputError(f"evaluate.py {name}: no such subcommand; give one of {', '.join(COMMANDS)}")
    command = importlib.import_module(f"metrics.{name}")
    command.run(parse(command.Config, command.__doc__, sys.argv[2:]))


if __name__ == "__main__":
    run_command(main)
