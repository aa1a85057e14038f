"""Metrics of samples, by subcommand.

`society` compares samples of the embedded world with its exact optimum, the best policy of the DPL objective
over well-formed texts: pi ~ pi_ref^(beta/alpha) exp(r/alpha) (DPL paper, equation 35). The defaults continue
from those of train_dpl.py and sample.py:

    python train_dpl.py               # writes out/dpl
    python sample.py                  # writes out/dpl/samples.jsonl
    python evaluate.py society        # --samples out/dpl/samples.jsonl --alpha 0.2 --beta 0.1
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.society.truth import poll_distributions, read_story, story_distributions
from files import InputError, raise_input_error, read_rows, run_command, write_json

WORLD = Path(__file__).parent / "data/society/world.json"
OTHER = "(other)"  # any text that the grammar cannot write: misspelt, malformed or missing


def frequencies(observed: Iterable[str], values: Iterable[str]) -> dict[str, float]:
    """Share of each of `values` among the observed strings, and of all other strings as OTHER."""
    counts = Counter(observed)
    total = counts.total()
    shares = {value: counts[value] / total for value in values}
    return shares | {OTHER: 1 - sum(counts[value] for value in shares) / total}


def total_variation(p: dict[str, float], q: dict[str, float]) -> float:
    """Half the L1 distance of two distributions; a value that one of them lacks has probability 0 there."""
    return sum(abs(p.get(value, 0.0) - q.get(value, 0.0)) for value in p.keys() | q.keys()) / 2


def entropy_bits(distribution: dict[str, float]) -> float:
    """Shannon entropy in bits, OTHER left out and the rest renormalised: misspellings are no diversity."""
    p = [share for value, share in distribution.items() if value != OTHER and share > 0]
    return sum(x / sum(p) * math.log2(sum(p) / x) for x in p)


def society(
    samples: list[tuple[str, str]], world: dict[str, Any], alpha: float, beta: float
) -> dict[str, Any]:
    """Compare (prompt, completion) samples with the optimum at alpha and beta, and with the reference.

    Returns for each slot of the stories and each poll its sampled, target and reference distribution, total
    variations and entropies; and the share of stories whose name is misspelt or missing, and of those that
    the grammar cannot write. Raises InputError if no sample answers a prompt of the society.
    """
    texts: dict[str, list[str]] = {}
    for prompt, completion in samples:
        texts.setdefault(prompt.strip(), []).append(completion)

    def compare(observed: list[str], target: dict, reference: dict) -> dict[str, Any]:
        sampled = frequencies(observed, target)
        return {
            "sampled": sampled,
            "target": target,
            "reference": reference,
            "tv_target": total_variation(sampled, target),
            "tv_reference": total_variation(sampled, reference),
            "entropy_bits": entropy_bits(sampled),
            "target_entropy_bits": entropy_bits(target),
        }

    result: dict[str, Any] = {"alpha": alpha, "beta": beta, "stories": {}, "polls": {}}
    if stories := [read_story(text, world) for text in texts.get(world["story_prompt"].strip(), [])]:
        target, reference = story_distributions(world, alpha, beta)
        for slot in world["slots"]:
            observed = [story[slot] for story in stories]
            result["stories"][slot] = compare(observed, target[slot], reference[slot])
        wrong = [[slot for slot in story if story[slot] not in world["slots"][slot]] for story in stories]
        result["misspelt"] = sum("name" in slots for slots in wrong) / len(stories)
        result["malformed"] = sum(map(bool, wrong)) / len(stories)
    for prompt, poll in world["polls"].items():
        if prompt.strip() in texts:
            comparison = compare(texts[prompt.strip()], *poll_distributions(poll, alpha, beta))
            tv_shares = total_variation(comparison["sampled"], poll["shares"])
            result["polls"][prompt.strip()] = comparison | {"shares": poll["shares"], "tv_shares": tv_shares}
    if not result["stories"] and not result["polls"]:
        raise InputError("no sample answers a prompt of the society")
    return result


def print_society(result: dict[str, Any]) -> None:
    """Print what society() returned as a table, one line per slot and poll."""
    print(f"{'':36} {'TV to target':>12} {'to reference':>12} {'bits':>6} {'target bits':>11} {'other':>6}")
    for name, row in [*result["stories"].items(), *result["polls"].items()]:
        numbers = [row[key] for key in ("tv_target", "tv_reference", "entropy_bits", "target_entropy_bits")]
        print(
            "{:36} {:12.3f} {:12.3f} {:6.2f} {:11.2f}".format(name, *numbers), f"{row['sampled'][OTHER]:6.1%}"
        )
    print("TV: total variation; bits: entropy of the values without 'other', which is misspelt or malformed")
    if "misspelt" in result:
        print(f"name misspelt or missing {result['misspelt']:.1%}, malformed {result['malformed']:.1%}")


def read_sample(row: dict[str, Any], where: str) -> tuple[str, str]:
    """(prompt, completion) of a row that sample.py wrote in any --format; of messages, the last two.

    Raises InputError with `where`, the file and row, for any other row.
    """
    try:
        if "messages" in row:  # messages, arena_hard
            prompt, completion = (message["content"] for message in row["messages"][-2:])
        elif "instruction" in row:  # alpaca_eval
            prompt, completion = row["instruction"], row["output"]
        else:
            prompt, completion = row["prompt"], row["completion"]
        prompt = prompt[-1]["content"] if isinstance(prompt, list) else prompt
        completion = completion["answer"] if isinstance(completion, dict) else completion
    except (KeyError, IndexError, TypeError, ValueError):
        prompt = completion = None
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        raise InputError(f"{where}: needs string 'prompt' and 'completion', or another --format of sample.py")
    return prompt, completion


def main() -> None:
    """Run one subcommand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "society",
        help="samples of the embedded world against its exact optimum",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--samples", default="out/dpl/samples.jsonl", help="File that sample.py wrote.")
    command.add_argument("--alpha", type=float, default=0.2, help="The policy was trained with this alpha.")
    command.add_argument("--beta", type=float, default=0.1, help="The policy was trained with this beta.")
    command.add_argument("--out_file", help="Also write all results to this file, as JSON.")
    parser.error = command.error = raise_input_error
    args = parser.parse_args()
    if not (0 < args.alpha < math.inf and 0 < args.beta < math.inf):
        raise InputError("--alpha and --beta must be positive numbers")
    samples = [read_sample(row, where) for where, row in read_rows(args.samples)]
    result = society(samples, json.loads(WORLD.read_bytes()), args.alpha, args.beta)
    print_society(result)
    if args.out_file:
        write_json(args.out_file, result)


if __name__ == "__main__":
    run_command(main)
