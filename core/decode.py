"""Decode many completions of few prompts: each prompt is computed once and stored once.

    batch = Batch(model, prompts, prompt_index, max_new_tokens, eos_token_id)
    while batch.active:
        probs = next_token_probs(batch.logits)
        batch.append(gumbel_max(probs, exponential_noise(rng, *probs.shape)), probs)
        finished = batch.take_finished()      # and batch.start(...) gives their places to others

A step feeds the newest token of every unfinished completion (its attention: kv_cache.py). Completions end at
different times. The place of one that has ended can go to the next in line, so that steps stay full:

    step           1  2  3  4  5  6  7  8
    place 0        a  a  a  a  a  a  f  f         a, b, c, ... completions, in order
    place 1        b  b  b  d  d  d  d  d
    place 2        c  c  c  c  c  e  e  e
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.files import InputError
from common.parallel import to_device
from core.attention import compile_once, require_attention, use_packed_attention
from core.checks import compiling, probe_ids, refused
from core.kv_cache import SharedPromptCache, keep_in_place
from core.model import float32_head
from core.pairs import pack, split

FINISH = ("", "eos", "stop", "length")  # Completion.finish by code; "" while it is active
ACTIVE, EOS, STOP, LENGTH = range(4)  # the codes: indices into FINISH
NUCLEUS = 1024  # tokens that top_p sorts first: sorting a large vocabulary takes as long as a small model
BLOCK = 128  # tokens per block in gumbel_max
STATE = "tokens", "scores", "length", "finish", "ancestor"  # of a Batch: tensors with a row per completion
PREFILL = 2048  # prompt tokens per forward pass, unless one prompt has more


class Completion(NamedTuple):
    """One sampled completion."""

    tokens: list[int]  # with the end token, if it ended
    logp: float  # log-probability in nats under the model: temperature 1, no truncation
    sampled_logp: float  # log-probability in nats under the distribution that it was sampled from
    finish: str  # "eos", "stop" (a stop string) or "length" (max_new_tokens)


def next_token_probs(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Next-token distribution (batch, vocab) from logits (batch, vocab); temperature 0 is greedy.

    Temperature, then the top_k likeliest tokens, then the smallest set of tokens with probability top_p, then
    tokens with p(v) >= min_p max(p). Each step takes the result of the step before, as in transformers.
    top_k 0, top_p 1 and min_p 0 keep all tokens.
    """
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits if temperature == 1 else logits / temperature
    vocab = logits.shape[-1]
    if 0 < top_k < vocab:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    probs = logits.softmax(-1)
    if top_p < 1.0:
        for size in (min(NUCLEUS, vocab), vocab):
            top, order = probs.topk(size)
            before = top.cumsum(-1) - top  # probability of the likelier tokens
            if (before[..., -1] >= top_p).all():
                break
        probs = torch.zeros_like(probs).scatter_(-1, order, top.masked_fill(before >= top_p, 0.0))
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs / probs.sum(-1, keepdim=True) if top_p < 1.0 or min_p > 0 else probs


def exponential_noise(rng: np.random.Generator, count: int, vocab: int) -> np.ndarray:
    """The random numbers with which gumbel_max samples `count` tokens, a row for each."""
    return rng.standard_exponential((count, -(-vocab // BLOCK) + BLOCK))


def gumbel_max(probs: Tensor, noise: np.ndarray) -> Tensor:
    """Sample a token from each row p of probs (batch, vocab) with a row of noise. Returns token ids (batch,).

    This is the Gumbel-max trick in its exponential-race form: argmax_v p(v) / E(v), with independent E(v) ~
    Exponential(1), equals argmax_v [log p(v) + G(v)], since G = -log E is Gumbel noise. p need not sum to 1.
    A rounding error in p changes the token only where two tokens nearly tie; an inverse CDF would add up the
    rounding errors of all tokens before.

    A block of BLOCK tokens is sampled first, then a token in it: vocab / BLOCK + BLOCK random numbers.
    """
    batch, vocab = probs.shape
    if vocab % BLOCK:
        probs = F.pad(probs, (0, -vocab % BLOCK))
    blocks = probs.view(batch, -1, BLOCK)
    noise = to_device(torch.from_numpy(noise), probs.device)
    block_noise, token_noise = noise.split([blocks.shape[1], BLOCK], 1)
    block = (blocks.sum(-1) / block_noise).argmax(-1)
    chosen = blocks[torch.arange(batch, device=block.device), block]
    return block * BLOCK + (chosen / token_noise).argmax(-1)


class Batch:
    """Completions that grow by a token at a time. The unfinished ones have batch indices [0, active).

    `logits` (active, vocab), float32, are those of the next token. `ancestor` (batch,) is the number of each
    completion, in the order in which they were started; a copy made by reindex() has that of its original.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        prompt_index: Sequence[int],
        max_new_tokens: int,
        eos_token_id: int | list[int] | None,
        has_stop: Callable[[list[int]], bool] | None = None,
        compile: bool = False,
        keep_last: bool = False,
    ):
        """Prefill the prompts (token ids). Completion i continues prompts[prompt_index[i]]; see also start().

        It ends at an end token, when has_stop(its tokens) is true, or after max_new_tokens. With `compile`,
        the decoding steps run under torch.compile. Raises InputError if check_decoding refuses the model.
        """
        self.model, self.device = model, model.get_input_embeddings().weight.device
        self.eos = torch.tensor([] if eos_token_id is None else eos_token_id).flatten()
        self.has_stop, self.active, self.started = has_stop, 0, 0
        self.step_model = compile_once(model, dynamic=True) if compile else model
        self.tokens = torch.zeros(0, max_new_tokens, dtype=torch.long)
        self.scores = torch.zeros(0, 2, dtype=torch.float64)  # Completion's logp and sampled_logp
        self.length, self.finish, self.ancestor = torch.zeros(3, 0, dtype=torch.long)
        self.cache = SharedPromptCache(len(prompt_index), max_new_tokens, self.device)
        self.logits = self.last_logits = torch.zeros(0, device=self.device)
        with refused(f"{type(model).__name__} cannot be sampled"):
            self.start(prompts, prompt_index, keep_last)

    def start(self, prompts: list[list[int]], prompt_index: Sequence[int], keep_last: bool = False) -> None:
        """Start completions of prompts[prompt_index[i]], after take_finished() has made room for them.

        With `keep_last`, more completions of the last prompt follow: it is kept, and in the next call -1 is
        its index.
        """
        cache, first = self.cache, len(self.cache.prompt_lengths)
        kept, slots = [self.last_logits], torch.cat([torch.arange(first, first + len(prompts)), cache.last])
        if prompts:
            cache.add_prompts(list(map(len, prompts)))
            kept.insert(0, self.prefill(prompts, first))
        logits, index, n = torch.cat(kept), torch.tensor(prompt_index), len(prompt_index)
        self.logits = torch.cat([self.logits, logits[index.to(self.device)]])
        last = [len(prompts) - 1] if keep_last else []  # -1 if there are no new ones
        self.last_logits, cache.last = logits[last], slots[last]
        cache.set_prompts(torch.cat([cache.prompt_index, slots[index]]))
        self.ancestor = torch.cat([self.ancestor, torch.arange(self.started, self.started + n)])
        self.tokens, self.scores = (F.pad(x, (0, 0, 0, n)) for x in (self.tokens, self.scores))
        self.length, self.finish = (F.pad(x, (0, n)) for x in (self.length, self.finish))
        self.active, self.started = self.active + n, self.started + n

    def take_finished(self) -> dict[int, Completion]:
        """Remove the completions that have ended; returns them by their number (see `ancestor`)."""
        numbers = self.ancestor[self.active :].tolist()
        finished = dict(zip(numbers, self.completions(range(self.active, len(self.finish))), strict=True))
        for name in STATE:
            setattr(self, name, getattr(self, name)[: self.active])
        return finished

    def prefill(self, prompts: list[list[int]], slot: int) -> Tensor:
        """Compute prompts, packed end to end without padding, as the cache's prompts slot, slot + 1, ...

        Returns logits (prompts, vocab).
        """
        if not getattr(self.model, "can_decode", False):
            check_decoding(self.model)
        use_packed_attention(self.model)
        head = self.model.get_output_embeddings()
        # float32 logits, from the first call on; caps and scales that the model applies come after
        if isinstance(head, nn.Linear) and "forward" not in vars(head):
            head.forward = partial(float32_head, head)
        logits = []
        for part in split(range(len(prompts)), list(map(len, prompts)), PREFILL):
            packed = pack([[prompts[i]] for i in part])
            last = torch.tensor(packed.lengths, device=self.device).cumsum(0) - 1
            attend = partial(self.cache.prefill, packed, slot + part[0])
            self.cache.calls, self.cache.masks = 0, {}
            logits.append(self.forward(self.model, packed.ids[None], packed.position[None], last, attend))
        require_attention(self.model, self.cache.calls)
        return torch.cat(logits)

    @torch.no_grad()
    def forward(
        self,
        run: Callable[..., Any],
        ids: Tensor,
        position: Tensor,
        keep: int | Tensor,
        attend: Callable[..., Tensor],
    ) -> Tensor:
        """Logits (tokens kept, vocab) in float32 after token ids (batch, T) at positions (batch, T).

        `run` is the model, compiled or not. `keep` is transformers' logits_to_keep: the last `keep` tokens,
        or those with these indices.
        """
        ids, position = to_device(torch.stack([ids, position]), self.device)
        no_mask = torch.empty(1, 1, 1, 1, device=self.device)  # 4-D means "ready": transformers makes none
        options = {"attention_mask": no_mask, "use_cache": False, "logits_to_keep": keep, "attend": attend}
        if getattr(self.model.config.get_text_config(), "output_router_logits", False):
            options["output_router_logits"] = False  # a mixture of experts would count tokens by the mask
        with compiling("--compile"):
            return run(ids, position_ids=position, **options).logits.flatten(0, 1).float()

    def append(self, token: Tensor, probs: Tensor) -> Tensor:
        """Append to every active completion its token (active,), sampled from probs (active, vocab).

        Computes the next logits. Moves finished completions behind the active ones and returns the new order,
        as reindex() does. Raises InputError if log-probabilities are NaN.
        """
        n, column = self.active, token[:, None]
        logp = -F.cross_entropy(self.logits, token, reduction="none")
        # the one copy of a step that the CPU waits for; float32 holds any token id
        rows = torch.stack([logp, probs.gather(1, column)[:, 0].log(), token], 1).cpu()
        if rows.isnan().any():
            raise InputError("the model's log-probabilities are NaN")
        self.scores[:n] += rows[:, :2]
        newest = rows[:, 2].long()
        self.tokens[torch.arange(n), self.length[:n]] = newest
        self.length[:n] += 1
        finish = torch.isin(newest, self.eos) * EOS
        if self.has_stop:
            for i in (finish == ACTIVE).nonzero()[:, 0].tolist():
                finish[i] = STOP * self.has_stop(self.tokens[i, : self.length[i]].tolist())
        finish[(finish == ACTIVE) & (self.length[:n] == self.tokens.shape[1])] = LENGTH
        self.finish[:n] = finish
        order = torch.arange(len(self.finish))
        if finish.any():
            order = self.reindex(order.tolist())
        if self.active:
            ids, length = newest[order[: self.active]], self.length[: self.active] - 1
            position = self.cache.prompt_lengths[self.cache.prompt_index] + length
            self.cache.start_step(length)
            self.logits = self.forward(self.step_model, ids[:, None], position[:, None], 1, self.cache.attend)
        return order

    def reindex(self, indices: list[int]) -> Tensor:
        """Replace the batch by the completions at these batch indices, active ones first. Repeats are copies.

        Returns the new order (batch,): new completion i is old completion order[i].
        """
        active = (self.finish == ACTIVE).tolist()
        first = keep_in_place([i for i in indices if active[i]])
        order = torch.tensor(first + [i for i in indices if not active[i]])
        for name in STATE:
            setattr(self, name, getattr(self, name)[order])
        self.active = len(first)
        self.logits = self.logits[order[: self.active].to(self.device)]
        self.cache.reindex(order[: self.active])
        return order

    def completions(self, indices: Sequence[int]) -> list[Completion]:
        """The completions with these batch indices."""
        return [
            Completion(
                self.tokens[i, : self.length[i]].tolist(), *self.scores[i].tolist(), FINISH[self.finish[i]]
            )
            for i in indices
        ]


@torch.no_grad()
def check_decoding(model: PreTrainedModel) -> None:
    """Use packed attention. Raises an error unless a Batch then gives the model's own probabilities."""
    texts = torch.tensor(probe_ids(model)[:12], device=model.device).view(2, 6)
    model.set_attn_implementation("eager")
    own = model(texts, use_cache=False).logits[:, 3:5].float().softmax(-1)
    model.can_decode = True
    try:
        batch = Batch(model, texts[:, :4].tolist(), [0, 1], 3, None)
        for step in range(2):
            gap = (batch.logits.softmax(-1) - own[:, step]).abs().sum(-1).max() / 2  # total variation
            batch.append(texts[:, 4 + step], own[:, step])
            if not gap <= (1e-3 if model.dtype == torch.float32 else 0.25):  # rounding: 1e-5, a few percent
                # it may attend in both directions (BERT), or its positions do not start at 0 (RoBERTa)
                raise ValueError(f"probabilities of next tokens move by {gap:.2g}")
    except Exception:
        model.can_decode = False  # so that the next batch is refused too
        raise
