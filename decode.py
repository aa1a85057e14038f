"""Decode many completions of few prompts: each prompt is computed once and stored once.

    batch = Batch(model, prompts, prompt_index, max_new_tokens, eos_token_id)
    while batch.active:
        probs = next_token_probs(batch.logits)
        batch.append(gumbel_max(probs, exponential_noise(rng, *probs.shape)), probs)

A step feeds the newest token of every unfinished completion. Its query attends to the keys of its prompt and
to the keys of its own completion, under one softmax:

    scores  =  [ q @ K_prompt^T  |  q @ K_completion^T ]

All completions of a prompt share K_prompt and V_prompt, so a step reads them once per prompt. An ordinary KV
cache stores and reads a copy for every completion; with long prompts that is most of a step's memory traffic.
(Hydragen, Juravsky et al. 2024, splits attention so too.) Completions get their memory at the start.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from attention import compile_once, dense, dense_masks, require_attention, use_packed_attention
from checks import probe_ids, refused
from common.files import InputError
from common.parallel import to_device
from model import head_logits
from pairs import Packed, pack

FINISH = ("", "eos", "stop", "length")  # Completion.finish by code; "" while it is active
ACTIVE, EOS, STOP, LENGTH = range(4)  # the codes: indices into FINISH
NUCLEUS = 1024  # tokens that top_p sorts first: sorting a large vocabulary takes as long as a small model
BLOCK = 128  # tokens per block in gumbel_max
PREFILL = 2048  # prompt tokens per forward pass


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


class SharedPromptCache:
    """KV cache of prompts, each stored once, and of the completions that continue them.

    `layers` has an entry for each attention call of a forward pass: the prompts' keys and values, each
    (prompts, kv heads, longest prompt, head size), then the completions' keys and values, each (batch,
    kv heads, max_new_tokens, head size), of which the first `length` tokens are filled. `masks` holds a mask
    for each window, which layers share; `calls` counts the attention calls of the forward pass.
    """

    def __init__(
        self, prompt_lengths: Tensor, prompt_index: Tensor, max_new_tokens: int, device: torch.device
    ):
        """prompt_lengths (prompts,). Completion i continues prompt prompt_index[i]; every prompt has one."""
        self.prompt_lengths, self.max_new_tokens, self.device = prompt_lengths, max_new_tokens, device
        self.layers: list[list[Tensor]] = []
        self.length, self.calls, self.masks = 0, 0, {}
        self.set_prompts(prompt_index)

    def prefill(
        self, packed: Packed, first: int, _: nn.Module, *qkv: Tensor, window: int | None, **options: Any
    ) -> Tensor:
        """Attention within packed prompts; stores keys and values as those of prompts first, first + 1, ...

        q, k, v and the result are (1, heads or kv heads, T, head size).
        """
        q, k, v = qkv
        if self.calls == len(self.layers):
            prompts, batch = len(self.prompt_lengths), len(self.prompt_index)
            layer = [x.new_zeros(prompts, x.shape[1], self.longest, x.shape[-1]) for x in (k, v)]
            layer += [x.new_empty(batch, x.shape[1], self.max_new_tokens, x.shape[-1]) for x in (k, v)]
            self.layers.append(layer)
        for stored, new in zip(self.layers[self.calls], (k, v), strict=False):
            for prompt, part in enumerate(new[0].split(packed.lengths, 1), first):
                stored[prompt, :, : part.shape[1]] = part
        self.calls += 1
        if window not in self.masks:
            self.masks[window] = [mask.to(self.device) for mask in dense_masks(packed, window)]
        return dense(q, k, v, self.masks[window], **options)

    def attend(
        self, _: nn.Module, *qkv: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attention of each completion's newest token to all tokens up to it; stores its key and value.

        q, k, v and the result are (batch, heads or kv heads, 1, head size).
        """
        q, k, v = qkv
        prompt_k, prompt_v, own_k, own_v = self.filled[self.calls]
        self.calls += 1
        own_k[:, :, -1], own_v[:, :, -1] = k[:, :, 0], v[:, :, 0]
        if window is not None:
            own_k, own_v = own_k[:, :, -window:], own_v[:, :, -window:]
        q = (q * scale).reshape(len(k), k.shape[1], -1, q.shape[-1])  # query heads grouped by their kv head
        scores = torch.cat([self.prompt_matmul(q, prompt_k.mT), q @ own_k.mT], -1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        longest = prompt_k.shape[2]
        if (mask := self.masks[window]) is not None:
            scores[..., :longest].masked_fill_(mask, -math.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        out = self.prompt_matmul(weights[..., :longest], prompt_v) + weights[..., longest:] @ own_v
        return out.reshape(len(k), -1, 1, v.shape[-1])

    def prompt_matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """x[i] @ y[prompt_index[i]] with one product per prompt: (batch, kv heads, group, b).

        x is (batch, kv heads, group, a) and y (prompts, kv heads, a, b).
        """
        (_, kv_heads, group, a), (prompts, _, _, b) = x.shape, y.shape
        x = x.view(prompts, -1, kv_heads, group, a) if self.grid is None else x[self.grid]
        x = x.transpose(1, 2).reshape(prompts, kv_heads, -1, a) @ y
        x = x.view(prompts, kv_heads, -1, group, b).transpose(1, 2).reshape(-1, kv_heads, group, b)
        return x if self.grid is None else x[self.slots]

    def prompt_mask(self, window: int | None) -> Tensor | None:
        """True at padding and at prompt tokens outside the window, (batch, 1, 1, longest prompt); or None."""
        lengths, position = self.prompt_lengths[self.prompt_index][:, None], torch.arange(self.longest)
        mask = position >= lengths
        if window is not None:
            mask |= lengths + self.length - position >= window
        return mask[:, None, None].to(self.device) if mask.any() else None

    def reindex(self, indices: Tensor) -> None:
        """Reindex the batch: new completion i is old completion indices[i]."""
        changed = (indices != torch.arange(len(indices))).nonzero()[:, 0]
        source, target = indices[changed].to(self.device), changed.to(self.device)
        for layer in self.layers:
            for x in layer[2:]:
                x[target, :, : self.length] = x[source, :, : self.length]
        self.set_prompts(self.prompt_index[indices])

    def set_prompts(self, prompt_index: Tensor) -> None:
        """Completion i now continues prompt prompt_index[i]. Prompts without a completion are dropped.

        prompt_matmul makes one product per prompt, so completions get slots of a grid, a row for each prompt:

            completion   0  1  2  3  4           grid   0  2  3    completions of prompt 0
            its prompt   0  1  0  0  1                  1  4  -    completions of prompt 1
            its slot     0  3  1  2  4                             (- is 0: what comes of it is not read)

        `grid` is None if the batch fills it in order.
        """
        present, self.prompt_index = prompt_index.unique(return_inverse=True)
        if len(present) < len(self.prompt_lengths):
            self.prompt_lengths = self.prompt_lengths[present]
            for layer in self.layers:
                layer[:2] = [x[present.to(self.device), :, : self.prompt_lengths.max()] for x in layer[:2]]
        self.longest = int(self.prompt_lengths.max())
        column = F.one_hot(self.prompt_index).cumsum(0).gather(1, self.prompt_index[:, None])[:, 0] - 1
        width = int(column.max()) + 1
        slots, self.grid = self.prompt_index * width + column, None
        if not torch.equal(slots, torch.arange(len(self.prompt_lengths) * width)):
            grid = torch.zeros(len(self.prompt_lengths) * width, dtype=torch.long)
            grid[slots] = torch.arange(len(slots))
            self.grid, self.slots = grid.view(-1, width).to(self.device), slots.to(self.device)

    def start_step(self) -> None:
        """Slice the layers up to the newest token, and make the masks, for the attend() calls of a step.

        attend() takes all sizes from tensors: torch.compile would compile an int attribute as a constant, and
        so again for every step.
        """
        self.calls, batch, end = 0, len(self.prompt_index), self.length + 1
        self.filled = [(k, v, *(x[:batch, :, :end] for x in own)) for k, v, *own in self.layers]
        self.masks = {window: self.prompt_mask(window) for window in self.masks}


class Batch:
    """Completions that grow by a token at a time. The unfinished ones have batch indices [0, active).

    `logits` (active, vocab), float32, are those of the next token. `ancestor` (batch,) is the initial batch
    index of each completion; a copy made by reindex() has that of its original.
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
    ):
        """Prefill the prompts (token ids). Completion i continues prompts[prompt_index[i]].

        It ends at an end token, when has_stop(its tokens) is true, or after max_new_tokens. With `compile`,
        the decoding steps run under torch.compile. Raises InputError if check_decoding refuses the model.
        """
        self.model, self.device = model, model.get_input_embeddings().weight.device
        self.eos = torch.tensor([] if eos_token_id is None else eos_token_id).flatten()
        self.has_stop, self.active = has_stop, len(prompt_index)
        self.step_model = compile_once(model, dynamic=True) if compile else model
        self.tokens = torch.zeros(self.active, max_new_tokens, dtype=torch.long)
        self.scores = torch.zeros(self.active, 2, dtype=torch.float64)  # Completion's logp and sampled_logp
        self.length, self.finish = torch.zeros(2, self.active, dtype=torch.long)
        self.ancestor = torch.arange(self.active)
        lengths, prompt_index = torch.tensor([len(ids) for ids in prompts]), torch.tensor(prompt_index)
        self.cache = SharedPromptCache(lengths, prompt_index, max_new_tokens, self.device)
        with refused(f"{type(model).__name__} cannot be sampled"):
            self.logits = self.prefill(prompts)[prompt_index.to(self.device)]

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Compute the prompts, packed end to end without padding; returns logits (prompts, vocab)."""
        if not getattr(self.model, "can_decode", False):
            check_decoding(self.model)
        use_packed_attention(self.model)
        head = self.model.get_output_embeddings()
        if isinstance(head, nn.Linear):  # float32 logits; caps and scales that the model applies come after
            head.forward = lambda hidden: head_logits(hidden, head.weight, head.bias)
        logits, size = [], max(1, PREFILL // max(map(len, prompts)))
        for first in range(0, len(prompts), size):
            packed = pack([[prompt] for prompt in prompts[first : first + size]])
            last = torch.tensor(packed.lengths, device=self.device).cumsum(0) - 1
            attend = partial(self.cache.prefill, packed, first)
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
        try:
            return run(ids, position_ids=position, **options).logits.flatten(0, 1).float()
        except TorchDynamoException as error:
            raise InputError(f"--compile: torch.compile failed: {str(error).splitlines()[0]}") from error

    def append(self, token: Tensor, probs: Tensor) -> Tensor:
        """Append to every active completion its token (active,), sampled from probs (active, vocab).

        Computes the next logits. Moves finished completions behind the active ones and returns the new order,
        as reindex() does. Raises InputError if log-probabilities are NaN.
        """
        n, step, column = self.active, self.cache.length, token[:, None]
        logp = -F.cross_entropy(self.logits, token, reduction="none")
        # the one copy of a step that the CPU waits for; float32 holds any token id
        rows = torch.stack([logp, probs.gather(1, column)[:, 0].log(), token], 1).cpu()
        if rows.isnan().any():
            raise InputError("the model's log-probabilities are NaN")
        self.scores[:n] += rows[:, :2]
        self.tokens[:n, step] = rows[:, 2].long()
        self.length[:n] = step + 1
        finish = torch.isin(self.tokens[:n, step], self.eos) * EOS
        if self.has_stop:
            for i in (finish == ACTIVE).nonzero()[:, 0].tolist():
                finish[i] = STOP * self.has_stop(self.tokens[i, : step + 1].tolist())
        if step + 1 == self.tokens.shape[1]:
            finish[finish == ACTIVE] = LENGTH
        self.finish[:n] = finish
        order = torch.arange(len(self.finish))
        if finish.any():
            order = self.reindex(order.tolist())
        if self.active:
            position = self.cache.prompt_lengths[self.cache.prompt_index] + step
            ids = self.tokens[: self.active, step]
            self.cache.start_step()
            self.logits = self.forward(self.step_model, ids[:, None], position[:, None], 1, self.cache.attend)
            self.cache.length += 1
        return order

    def reindex(self, indices: list[int]) -> Tensor:
        """Replace the batch by the completions at these batch indices, active ones first. Repeats are copies.

        Returns the new order (batch,): new completion i is old completion order[i].
        """
        active = (self.finish == ACTIVE).tolist()
        first = keep_in_place([i for i in indices if active[i]])
        order = torch.tensor(first + [i for i in indices if not active[i]])
        for name in ("tokens", "scores", "length", "finish", "ancestor"):
            setattr(self, name, getattr(self, name)[order])
        self.active = len(first)
        self.logits = self.logits[order[: self.active].to(self.device)]
        if self.active:
            self.cache.reindex(order[: self.active])
        return order

    def completions(self, indices: Sequence[int]) -> list[Completion]:
        """The completions with these batch indices."""
        tokens = [ids[:n] for ids, n in zip(self.tokens.tolist(), self.length.tolist(), strict=True)]
        scores, finish = self.scores.tolist(), [FINISH[code] for code in self.finish.tolist()]
        return [Completion(tokens[i], *scores[i], finish[i]) for i in indices]


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


def keep_in_place(indices: list[int]) -> list[int]:
    """Permute `indices` so that result[i] == i wherever possible: reindexing by it copies the fewest rows."""
    present = set(indices)
    others = list((Counter(indices) - Counter(range(len(indices)))).elements())
    return [i if i in present else others.pop() for i in range(len(indices))]
