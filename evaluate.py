"""The metrics, by subcommand.

    python evaluate.py society --samples out/dpl/samples.jsonl --alpha 0.2 --beta 0.1

`society` compares samples with the embedded world's truth: the optimum of the DPL objective over well-formed
texts, pi ~ pi_ref^(beta/alpha) exp(r/alpha), which data/society/world.json makes exact.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.society.truth import poll_laws, read_story, story_laws
from files import InputError, raise_input_error, read_rows, run_command, write_json

WORLD = Path(__file__).parent / "data/society/world.json"
OTHER = "(other)"  # what the grammar cannot write: misspelt or malformed


def frequencies(values: Iterable[str], known: Iterable[str]) -> dict[str, float]:
    """Share of each known value, and of everything else as OTHER."""
    counts = Counter(values)
    total, known = sum(counts.values()), list(known)
    law = {value: counts[value] / total for value in known}
    return law | {OTHER: 1 - sum(counts[value] for value in known) / total}


def total_variation(p: dict[str, float], q: dict[str, float]) -> float:
    """Half the L1 distance of two laws; a value that one lacks has probability 0 there."""
    return sum(abs(p.get(value, 0.0) - q.get(value, 0.0)) for value in p.keys() | q.keys()) / 2


def entropy_bits(law: dict[str, float]) -> float:
    """Shannon entropy in bits."""
    return -sum(p * math.log2(p) for p in law.values() if p > 0)


def society(samples: list[dict], world: dict[str, Any], alpha: float, beta: float) -> dict[str, Any]:
    """Each slot's and poll's law as sampled, its target, the reference's; the shares of stories whose name is
    misspelt or missing, and of malformed ones.
    """
    texts: dict[str, list[str]] = {}
    for row in samples:
        texts.setdefault(row["prompt"], []).append(row["completion"])

    def compare(values: list[str], target: dict, reference: dict) -> dict[str, Any]:
        law = frequencies(values, target)
        found = {"sampled": law, "target": target, "reference": reference}
        found |= {"tv_target": total_variation(law, target), "tv_reference": total_variation(law, reference)}
        return found | {"entropy_bits": entropy_bits(law), "target_entropy_bits": entropy_bits(target)}

    result: dict[str, Any] = {"alpha": alpha, "beta": beta, "stories": {}, "polls": {}}
    if stories := [read_story(text, world) for text in texts.get(world["story_prompt"], [])]:
        target, reference = story_laws(world, alpha, beta)
        for slot in world["slots"]:
            values = [story[slot] for story in stories]
            result["stories"][slot] = compare(values, target[slot], reference[slot])
        wrong = [[slot for slot in story if story[slot] not in world["slots"][slot]] for story in stories]
        result["misspelt"] = sum("name" in slots for slots in wrong) / len(stories)
        result["malformed"] = sum(map(bool, wrong)) / len(stories)
    for prompt, poll in world["polls"].items():
        if prompt in texts:
            found = compare(texts[prompt], *poll_laws(poll, alpha, beta))
            found["tv_shares"] = total_variation(found["sampled"], poll["shares"])
            result["polls"][prompt.strip()] = found | {"shares": poll["shares"]}
    if not result["stories"] and not result["polls"]:
        raise InputError("no sample answers a prompt of the society")
    return result


def print_society(result: dict[str, Any]) -> None:
    """The comparison as a table."""
    print(f"{'':36} {'TV to target':>12} {'to reference':>12} {'bits':>6} {'target bits':>11}")
    for name, found in [*result["stories"].items(), *result["polls"].items()]:
        numbers = [found[k] for k in ("tv_target", "tv_reference", "entropy_bits", "target_entropy_bits")]
        print("{:36} {:12.3f} {:12.3f} {:6.2f} {:11.2f}".format(name, *numbers))
    if "misspelt" in result:
        print(f"name misspelt or missing {result['misspelt']:.1%}, malformed {result['malformed']:.1%}")


def main() -> None:
    """Run one subcommand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("society", help="samples against the embedded world's exact targets")
    command.add_argument("--samples", required=True, help="rows of sample.py")
    command.add_argument("--alpha", type=float, required=True, help="entropy bonus it was trained with")
    command.add_argument("--beta", type=float, default=0.1, help="cross-entropy penalty it was trained with")
    command.add_argument("--out_file", help="also write everything there, as JSON")
    parser.error = command.error = raise_input_error
    args = parser.parse_args()
    if not (0 < args.alpha < math.inf and 0 < args.beta < math.inf):
        raise InputError("--alpha and --beta must be positive numbers")
    samples = []
    for where, row in read_rows(args.samples):
        if not isinstance(row.get("completion"), str) or not isinstance(row.get("prompt"), str):
            raise InputError(f"{where}: needs string 'prompt' and 'completion', as sample.py writes them")
        samples.append(row)
    result = society(samples, json.loads(WORLD.read_bytes()), args.alpha, args.beta)
    print_society(result)
    if args.out_file:
        write_json(args.out_file, result)


if __name__ == "__main__":
    run_command(main)
