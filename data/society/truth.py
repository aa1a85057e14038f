"""What is true in the society: what its raters think of a text, and the optimum of every (alpha, beta).

Stories and polls have utilities r, and raters are Plackett-Luce: P(a over b) = sigmoid(r(a) - r(b)). Debates
have a ranking and a dispersion phi, and raters are Mallows: a rater's own ranking has probability
phi^(pairs it orders otherwise): phi near 0, all agree; phi = 1, every ranking is equally likely.
"""

import math
import re
from typing import Any

import numpy as np


def read_story(text: str, world: dict[str, Any]) -> dict[str, str]:
    """A story's slots as written, right or wrong; all empty if it is no story of this grammar."""
    pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(world["template"]))
    match = re.fullmatch(pattern, text, re.DOTALL)
    return match.groupdict() if match else dict.fromkeys(world["slots"], "")


def utility(prompt: str, text: str, world: dict[str, Any]) -> float:
    """What raters think of a story or an opinion, in nats; minus infinity for any other text."""
    if prompt in world["polls"]:
        share = world["polls"][prompt]["shares"].get(text)
        return math.log(share) if share else -math.inf
    story = read_story(text, world)
    return sum(values.get(story[slot], -math.inf) for slot, values in world["slots"].items())


def mallows_pair(distance: int, phi: float) -> float:
    """P(a rater prefers the item `distance` places higher in the ranking) (Mallows, 1957; 0 < phi < 1)."""
    return (distance + 1) / (1 - phi ** (distance + 1)) - distance / (1 - phi**distance)


def mallows_favourites(phi: float, items: int) -> np.ndarray:
    """Share of raters whose favourite is each item, best ranked first: proportional to phi^rank."""
    weights = phi ** np.arange(items)
    return weights / weights.sum()


def preference(prompt: str, a: str, b: str, world: dict[str, Any]) -> float | None:
    """P(a rater prefers text a to b); None where there is nothing to choose between."""
    if prompt in world["debates"]:
        debate = world["debates"][prompt]
        known = [text in debate["ranking"] for text in (a, b)]
        if not all(known):
            return float(known[0]) if any(known) else None
        lead = debate["ranking"].index(b) - debate["ranking"].index(a)
        p = mallows_pair(abs(lead), debate["phi"])
        return p if lead > 0 else 1 - p
    lead = [utility(prompt, text, world) for text in (a, b)]
    return None if lead[0] == lead[1] == -math.inf else 1 / (1 + math.exp(min(lead[1] - lead[0], 700)))


def optimum(reference_logp: np.ndarray, reward: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """pi ~ pi_ref^(beta/alpha) exp(r/alpha): probabilities, in the shape given (DPL paper, appendix A)."""
    score = beta / alpha * reference_logp + reward / alpha
    p = np.exp(score - score.max())
    return p / p.sum()


def story_laws(world: dict[str, Any], alpha: float, beta: float) -> tuple[dict, dict]:
    """({slot: target law}, {slot: reference law}) over each slot's values, exact."""
    slots = world["slots"]
    shape = [len(values) for values in slots.values()]
    logp = np.array(world["story_reference_logp"]).reshape(shape)
    reward = sum(np.ix_(*(list(values.values()) for values in slots.values())))

    def margins(joint: np.ndarray) -> dict[str, dict[str, float]]:
        axes = range(len(shape))
        laws = (joint.sum(tuple(a for a in axes if a != axis)).tolist() for axis in axes)
        return {slot: dict(zip(slots[slot], law, strict=True)) for slot, law in zip(slots, laws, strict=True)}

    return margins(optimum(logp, reward, alpha, beta)), margins(optimum(logp, 0 * reward, 1, 1))


def poll_laws(poll: dict[str, Any], alpha: float, beta: float) -> tuple[dict, dict]:
    """(target law, reference law) over a poll's opinions, exact; r = log share."""
    logp, reward = np.array(poll["reference_logp"]), np.log(list(poll["shares"].values()))
    laws = optimum(logp, reward, alpha, beta), optimum(logp, 0 * reward, 1, 1)
    return tuple(dict(zip(poll["shares"], law.tolist(), strict=True)) for law in laws)
