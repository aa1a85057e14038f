"""What is refused before training, because it would go wrong in silence: data, models and losses.

- check_inputs: token ids without an embedding, texts that are too long, too few pairs for the processes
- check_packable: models whose log-probabilities change when pairs are packed into one row
- check_objective: losses that return a mean, mix pairs, or have no gradient
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from files import InputError
from model import Stats, pair_stats
from parallel import all_gather, get_world_size
from preferences import pack


def check_inputs(
    config: Any, model: PreTrainedModel, examples: Sequence, held_out: Sequence, digests: dict
) -> None:
    """Raise InputError unless model, data and number of processes fit together."""
    every = [*examples, *held_out]
    largest = max(max(map(max, example)) for example in every)
    if largest >= model.get_input_embeddings().weight.shape[0]:
        raise InputError(f"--model {config.model}: has no embedding for the tokenizer's id {largest}")
    longest = max(len(prompt) + max(map(len, answers)) - 1 for prompt, *answers in every)
    if longest > max_positions(model):
        raise InputError(f"--max_length {config.max_length}: more positions than {config.model} has")
    processes = get_world_size()
    if processes > min(config.batch_size, len(examples), len(held_out) or processes):
        raise InputError(f"{processes} processes need as many pairs in --batch_size and in --eval_data")
    if any(other != digests for other in all_gather(digests)):
        raise InputError(f"--model {config.model}, --data {config.data}: not the same for all processes")


def check_objective(
    objective: Callable[..., dict[str, Tensor]], completions: int, has_reference: bool, device: torch.device
) -> bool:
    """Try an objective on random Stats of three examples; returns whether it uses policy.entropy.

    Raises InputError if it breaks the contract of `Objective`: in training it would go wrong in silence.
    """
    generator, shape = torch.Generator().manual_seed(0), (3, completions)
    length = torch.randint(1, 20, shape, generator=generator).float().to(device)
    random = [torch.rand(shape, generator=generator).to(device) for _ in range(4)]
    logp, entropy = (-length * random[0]).requires_grad_(), random[1].requires_grad_()
    reference = Stats(-length * random[2], length, random[3]) if has_reference else None

    def evaluate(rows: slice, with_entropy: bool) -> dict[str, Tensor]:
        policy = Stats(logp[rows], length[rows], entropy[rows] if with_entropy else None)
        return objective(policy, reference and Stats(*(x[rows] for x in reference)))

    try:
        values, uses_entropy = evaluate(slice(None), False), False
    except (TypeError, AttributeError):  # policy.entropy was None
        values, uses_entropy = evaluate(slice(None), True), True
    if not isinstance(values, dict) or "loss" not in values:
        raise InputError('the objective must return a dict with the key "loss"')
    for name, value in values.items():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != (3,):
            raise InputError(f'objective: "{name}" must have shape (pairs,), one value per pair, not {shape}')
    if not values["loss"].requires_grad:
        raise InputError('objective: "loss" does not depend on the policy: it has no gradient')
    for i in range(3):
        for name, value in evaluate(slice(i, i + 1), uses_entropy).items():
            alone = value.shape == (1,) and torch.allclose(value, values[name][i : i + 1], 1e-4, 1e-5)
            if not (alone or values[name][i].isnan()):
                reason = "depends on the other pairs of its micro-batch (no batch statistics, no squeeze())"
                raise InputError(f'objective: "{name}" of a pair {reason}')
    return uses_entropy


def max_positions(model: PreTrainedModel) -> float:
    """The longest text in tokens that the model allows; infinity if it names no limit.

    LongRoPE (Phi-3) changes its factors for the whole row once any text in it passes the original length, so
    no text may pass it.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [getattr(config, "max_position_embeddings", None)]
    if rope.get("rope_type") == "longrope":
        limits.append(rope.get("original_max_position_embeddings"))
    return min(filter(None, limits), default=math.inf)


@torch.no_grad()
def check_packable(model: PreTrainedModel, path: str) -> None:
    """Raise InputError unless the packed forward gives this model's own log-probabilities.

    Compares it with one plain forward for each text, on a few token ids. This finds what would be silently
    wrong: recurrent layers, biases by index, attention sinks, windows known to the mask alone, unusual heads.
    """
    ids = torch.arange(12).remainder(model.config.get_text_config().vocab_size - 1).add(1).tolist()
    pairs = [(ids[:4], ids[4:8], ids[5:10]), (ids[2:5], ids[6:7], ids[7:12])]
    try:
        plain = []
        for prompt, *completions in pairs:
            for completion in completions:
                row = torch.tensor([prompt + completion], device=model.device)
                if model.get_output_embeddings() is None:
                    plain.append(model.score(model.base_model(row[:, :-1]).last_hidden_state[0, -1])[0])
                    continue
                logp = model(row).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                plain.append(logp.gather(1, row[0, len(prompt) :, None]).sum())
        gap = (pair_stats(model, pack(pairs)).logp.flatten() - torch.stack(plain)).abs().max().item()
        if not gap <= (1e-2 if model.dtype == torch.float32 else 0.5):  # SmolLM2 rounds to 2e-3
            raise ValueError(f"log-probabilities move by {gap:.2g} nats")
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--model {path}: {type(model).__name__} cannot be packed: {reason}") from None
