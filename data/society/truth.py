"""What is true in the society: its raters' preferences, and the optimal policy for every alpha and beta.

Stories and polls have utilities r, and raters are Plackett-Luce: P(a over b) = sigmoid(r(a) - r(b)). Debates
have a central ranking and a dispersion phi, and raters are Mallows: the probability of a rater's own ranking
is proportional to phi^(number of pairs that it orders unlike the central ranking). Near phi = 0 all raters
agree; at phi = 1 every ranking is equally likely.
"""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from common.files import InputError
from metrics.formulas import OTHER, entropy_bits, frequencies, total_variation

WORLD = Path(__file__).parent / "world.json"


def list_stories(world: dict[str, Any]) -> list[str]:
    """All 1,024 stories of the grammar, in the order of world["story_reference_logp"]: last slot fastest."""
    slots = world["slots"]
    return [
        world["template"].format(**dict(zip(slots, values, strict=True)))
        for values in itertools.product(*slots.values())
    ]


def read_story(text: str, world: dict[str, Any]) -> dict[str, str]:
    """A text's slots as written, misspelt or not; all are empty if the text does not fit the template."""
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(world["template"]))
    match = re.fullmatch(pattern, text, re.DOTALL)
    return match.groupdict() if match else dict.fromkeys(world["slots"], "")


def utility(prompt: str, text: str, world: dict[str, Any]) -> float:
    """The raters' utility of a story or an opinion, in nats; minus infinity for any other text."""
    if prompt in world["polls"]:
        share = world["polls"][prompt]["shares"].get(text)
        return math.log(share) if share else -math.inf
    story = read_story(text, world)
    return sum(values.get(story[slot], -math.inf) for slot, values in world["slots"].items())


def mallows_pair(distance: int, phi: float) -> float:
    """P(a rater prefers an item to one ranked `distance` >= 1 places below it), for 0 < phi < 1.

    This is g(distance) of MallowsPO's equation 13, from Mallows (1957).
    """
    return (distance + 1) / (1 - phi ** (distance + 1)) - distance / (1 - phi**distance)


def mallows_favourites(phi: float, items: int) -> np.ndarray:
    """Share of raters who rank each item first, (items,), best item first: proportional to phi^rank."""
    weights = phi ** np.arange(items)
    return weights / weights.sum()


def preference(prompt: str, a: str, b: str, world: dict[str, Any]) -> float | None:
    """P(a rater prefers text a to b), of any prompt; None if the grammar can write neither text."""
    if prompt in world["debates"]:
        debate = world["debates"][prompt]
        is_answer = [text in debate["ranking"] for text in (a, b)]
        if not all(is_answer):
            return float(is_answer[0]) if any(is_answer) else None
        lead = debate["ranking"].index(b) - debate["ranking"].index(a)
        p = mallows_pair(abs(lead), debate["phi"])
        return p if lead > 0 else 1 - p
    r_a, r_b = (utility(prompt, text, world) for text in (a, b))
    return None if r_a == r_b == -math.inf else 1 / (1 + math.exp(min(r_b - r_a, 700)))


def optimum(reference_logp: np.ndarray, reward: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """The optimal policy, pi ~ pi_ref^(beta/alpha) exp(r/alpha), in the shape given (DPL, equation 35)."""
    score = beta / alpha * reference_logp + reward / alpha
    p = np.exp(score - score.max())
    return p / p.sum()


def slot_distributions(p: np.ndarray, world: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{slot: {value: probability}} of a distribution over list_stories(world), (1024,), renormalised."""
    slots = world["slots"]
    joint = (p / p.sum()).reshape([len(values) for values in slots.values()])
    axes = set(range(joint.ndim))
    marginals = (joint.sum(tuple(axes - {axis})).tolist() for axis in range(joint.ndim))
    return {slot: dict(zip(slots[slot], m, strict=True)) for slot, m in zip(slots, marginals, strict=True)}


def story_distributions(world: dict[str, Any], alpha: float, beta: float) -> tuple[dict, dict]:
    """The optimal policy's and the reference's distribution of every slot, {slot: {value: probability}}."""
    logp = np.array(world["story_reference_logp"])
    reward = sum(np.ix_(*(list(values.values()) for values in world["slots"].values()))).ravel()
    target = optimum(logp, reward, alpha, beta)
    return slot_distributions(target, world), slot_distributions(np.exp(logp), world)


def poll_distributions(poll: dict[str, Any], alpha: float, beta: float) -> tuple[dict, dict]:
    """The optimal policy's and the reference's distribution of a poll's opinions; r = log share."""
    logp, reward = np.array(poll["reference_logp"]), np.log(list(poll["shares"].values()))
    target, reference = optimum(logp, reward, alpha, beta), np.exp(logp) / np.exp(logp).sum()
    return dict(zip(poll["shares"], target, strict=True)), dict(zip(poll["shares"], reference, strict=True))


# ---- samples against the truth


def compare_samples(
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


def print_comparison(result: dict[str, Any]) -> None:
    """Print what compare_samples() returned as a table, one line per slot and poll."""
    print(f"{'':36} {'TV to target':>12} {'to reference':>12} {'bits':>6} {'target bits':>11} {'other':>6}")
    for name, row in [*result["stories"].items(), *result["polls"].items()]:
        numbers = [row[key] for key in ("tv_target", "tv_reference", "entropy_bits", "target_entropy_bits")]
        print(
            "{:36} {:12.3f} {:12.3f} {:6.2f} {:11.2f}".format(name, *numbers), f"{row['sampled'][OTHER]:6.1%}"
        )
    print("TV: total variation; bits: entropy of the values without 'other', which is misspelt or malformed")
    if "misspelt" in result:
        print(f"name misspelt or missing {result['misspelt']:.1%}, malformed {result['malformed']:.1%}")
