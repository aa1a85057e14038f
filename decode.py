"""Many continuations of few prompts: a prompt is computed and kept once, whatever the number of its samples.

A step feeds one token of every text that goes on. Its query meets two sets of keys, under one softmax:

    scores  =  [ q @ K(prompt) | q @ K(own) ]

The texts of a prompt share the first product, which reads its keys once; a cache of whole texts keeps and
reads them for every sample: with long prompts, most of what a step moves. Own keys and values go to blocks
that are allocated at the start. A text that has ended leaves the batch, and the last one takes its row.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from files import InputError
from model import dense

FINISH = ("", "eos", "stop", "length")  # why a text ended
GOING, EOS, STOP, LENGTH = range(4)
BLOCK = 128  # tokens that race together


class Completion(NamedTuple):
    """One sampled completion."""

    tokens: list[int]  # the end token included, if it ended
    logp: float  # log-probability under the model, temperature 1 and no cuts, in nats
    sampled_logp: float  # log-probability under the law it was drawn from
    finish: str  # "eos", "stop" at a stop string, or "length" when max_new_tokens came first


def race(probs: Tensor, streams: Sequence[np.random.Generator]) -> Tensor:
    """A token (rows,) by each row of probs (rows, vocab), which need not sum to 1, and its random numbers.

    With exponential E(v), argmax p(v) / E(v) has the law p. A rounding error in p moves it only where two
    tokens nearly tie, while an inverse CDF adds up the errors of all tokens before. Two races, between blocks
    of the vocabulary and inside the block that won, need few random numbers.
    """
    rows, vocab = probs.shape
    if vocab % BLOCK:
        probs = F.pad(probs, (0, -vocab % BLOCK))
    blocks = probs.view(rows, -1, BLOCK)
    count = blocks.shape[1]
    noise = np.stack([stream.standard_exponential(count + BLOCK) for stream in streams])
    between, within = torch.from_numpy(noise).to(probs.device).split([count, BLOCK], 1)
    block = (blocks.sum(-1) / between).argmax(-1)
    return block * BLOCK + (blocks[torch.arange(rows, device=block.device), block] / within).argmax(-1)


@functools.lru_cache(maxsize=4)
def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """What each token of a prompt may attend to: (length, length) boolean."""
    position = torch.arange(length, device=device)
    behind = position[:, None] - position
    return (behind >= 0) & (behind < (length if window is None else window))


class SharedCache:
    """Keys and values of S prompts, once each, and of R texts behind them.

    A layer keeps prompt keys and values (S, kv heads, P, size), P the longest prompt's tokens, and the texts'
    own (R, kv heads, room, size), of which t are filled.
    """

    def __init__(self, lengths: Tensor, owner: Tensor, room: int, device: torch.device):
        """lengths (S,) of the prompts; text r continues prompt owner[r] by up to `room` tokens."""
        self.lengths, self.owner, self.room, self.device, self.t = lengths, owner, room, device, 0
        self.layers: dict[nn.Module, list[Tensor]] = {}
        self.hidden: dict[int | None, Tensor | None] = {}  # this step's masks, for each window
        self.prompt: int | None = 0  # the one being computed, then None
        self.plain = True  # no layer has asked for more than attention by position

    def arrange(self, owner: Tensor) -> None:
        """Row r now belongs to prompt owner[r]; prompts without rows are dropped."""
        present, self.owner = owner.unique(return_inverse=True)
        if len(present) < len(self.lengths):
            self.lengths = self.lengths[present]
            for layer in self.layers.values():
                layer[:2] = [x[present.to(self.device), :, : self.lengths.max()] for x in layer[:2]]
        rank = F.one_hot(self.owner).cumsum(0).gather(1, self.owner[:, None])[:, 0]  # in its prompt, from 1
        self.width = int(rank.max())
        cell = self.owner * self.width + rank - 1
        full = torch.arange(len(self.lengths) * self.width)
        self.cell = None if torch.equal(cell, full) else cell.to(self.device)  # None: every cell, in order

    def move(self, rows: Tensor) -> None:
        """Row r goes on as a copy of what was row rows[r]."""
        here = (rows != torch.arange(len(rows))).nonzero()[:, 0]
        there, here = rows[here].to(self.device), here.to(self.device)
        for layer in self.layers.values():
            for x in layer[2:]:
                x[here, :, : self.t] = x[there, :, : self.t]
        self.arrange(self.owner[rows])

    def attend(
        self,
        layer: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        """Attention of a prompt to itself, or of each row's newest token to all before it; keeps k and v.

        q is (rows, heads, n, size), k and v (rows, kv heads, n, size); gives (rows, heads, n, size).
        """
        rows, kv, n, _ = k.shape
        if self.prompt is not None:
            if layer not in self.layers:
                prompts, longest = len(self.lengths), int(self.lengths.max())
                self.layers[layer] = [x.new_zeros(prompts, kv, longest, x.shape[-1]) for x in (k, v)]
                self.layers[layer] += [
                    x.new_empty(len(self.owner), kv, self.room, x.shape[-1]) for x in (k, v)
                ]
            for kept, new in zip(self.layers[layer], (k, v), strict=False):
                kept[self.prompt, :, :n] = new[0]
            return dense(q, k, v, [causal_mask(n, window, q.device)], scale, cap)
        prompt_k, prompt_v, own_k, own_v = self.layers[layer]
        own_k[:rows, :, self.t], own_v[:rows, :, self.t] = k[:, :, 0], v[:, :, 0]
        first = 0 if window is None else max(0, self.t + 1 - window)
        own_k, own_v = (x[:rows, :, first : self.t + 1] for x in (own_k, own_v))
        q = (q * scale).reshape(rows, kv, -1, q.shape[-1])
        score = torch.cat([self.times_prompts(q, prompt_k.mT), q @ own_k.mT], -1)
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        length = prompt_k.shape[2]
        if (hidden := self.hidden_from(window)) is not None:
            score[..., :length].masked_fill_(hidden, -math.inf)
        weight = score.softmax(-1, dtype=torch.float32).to(v.dtype)
        out = self.times_prompts(weight[..., :length], prompt_v) + weight[..., length:] @ own_v
        return out.reshape(rows, -1, 1, v.shape[-1])

    def times_prompts(self, x: Tensor, y: Tensor) -> Tensor:
        """Rows of x (rows, kv, group, a) times their prompts' y (S, kv, a, b): one product a prompt."""
        if self.cell is None and self.width == 1:
            return x @ y
        (_, kv, group, a), (prompts, _, _, b) = x.shape, y.shape
        if self.cell is not None:
            x = x.new_zeros(prompts * self.width, kv, group, a).index_copy_(0, self.cell, x)
        x = x.view(prompts, self.width, kv, group, a).transpose(1, 2).reshape(prompts, kv, -1, a) @ y
        x = x.view(prompts, kv, self.width, group, b).transpose(1, 2).reshape(-1, kv, group, b)
        return x if self.cell is None else x[self.cell]

    def hidden_from(self, window: int | None) -> Tensor | None:
        """(rows, 1, 1, P) boolean: padding and prompt tokens that the window has left; None if none."""
        if window not in self.hidden:
            length, position = self.lengths[self.owner][:, None], torch.arange(int(self.lengths.max()))
            behind = length + self.t - position
            hidden = (position >= length) | (behind >= (math.inf if window is None else window))
            self.hidden[window] = hidden[:, None, None].to(self.device) if hidden.any() else None
        return self.hidden[window]


def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    shared: SharedCache,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers' layers call during Batch.forward."""
    shared.plain &= kwargs.get("s_aux") is None and kwargs.get("position_bias") is None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = shared.attend(module, query, key, value, scale, sliding_window, softcap)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("shared", shared_attention)


class Batch:
    """Texts that grow a token at a time. Those still going come first, as rows [0, going) of every tensor."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        owner: Sequence[int],
        room: int,
        ends: int | list[int] | None,
        stopped: Callable[[list[int]], bool] | None = None,
    ):
        """Compute the prompts. Text r continues prompts[owner[r]] until a token of `ends`, until stopped(its
        tokens), or for `room` tokens; `logits` (going, vocab) in float32 are for the next token.
        """
        self.model, self.device = model, model.get_input_embeddings().weight.device
        self.ends, self.stopped = torch.tensor([] if ends is None else ends).flatten(), stopped
        rows, lengths, owners = len(owner), torch.tensor([len(ids) for ids in prompts]), torch.tensor(owner)
        self.going, self.step = rows, 0
        self.tokens = torch.zeros(rows, room, dtype=torch.long)
        self.scores = torch.zeros(
            rows, 2, dtype=torch.float64
        )  # log-probability under model and law, in nats
        self.length, self.finish = torch.zeros(2, rows, dtype=torch.long)
        self.start = lengths[owners]  # position of the first token
        self.root = torch.arange(rows)  # the row that a row descends from
        self.weight = torch.zeros(rows, dtype=torch.float64)  # a particle's log-weight

        self.shared, self.cache = SharedCache(lengths, owners, room, self.device), None
        logits = self.prefill(prompts) if model._supports_attention_backend else None
        config = model.config.get_text_config()
        whole = self.shared.plain and len(self.shared.layers) == config.num_hidden_layers
        if whole and not getattr(config, "attention_chunk_size", None):
            self.shared.arrange(owners)
        else:
            logits = self.fall_back(prompts, owners)
        self.logits = logits[owners.to(self.device)]

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Compute the prompts one by one, so that none depends on the others: logits (S, vocab)."""
        logits = []
        for self.shared.prompt, ids in enumerate(prompts):
            logits.append(self.forward(torch.tensor([ids]), torch.arange(len(ids))[None]))
        self.shared.prompt = None
        return torch.cat(logits)

    def fall_back(self, prompts: list[list[int]], owners: Tensor) -> Tensor:
        """Some layer is no attention by position (recurrence, biases, sinks): use transformers' own cache."""
        name = type(self.model).__name__
        if len(prompts) > 1:
            raise InputError(
                f"{name} samples one prompt at a time: give --batch_size no more than --num_samples"
            )
        self.shared, self.cache = None, DynamicCache(config=self.model.config)
        logits = self.forward(torch.tensor(prompts))
        if not self.cache.is_initialized:
            raise InputError(f"{name} cannot be sampled: it does not use transformers' DynamicCache")
        self.cache.reorder_cache(owners.to(self.device))
        return logits

    @torch.no_grad()
    def forward(self, ids: Tensor, position: Tensor | None = None) -> Tensor:
        """Logits (rows, vocab) in float32 after the last of ids (rows, n) at position (rows, n)."""
        config, usual = self.model.config, self.model.config._attn_implementation
        if self.shared:
            self.shared.hidden, config._attn_implementation = {}, "shared"
            extra = {"shared": self.shared, "use_cache": False, "position_ids": position.to(self.device)}
        else:
            extra = {"past_key_values": self.cache, "use_cache": True}
        try:
            return self.model(ids.to(self.device), logits_to_keep=1, **extra).logits[:, -1].float()
        finally:
            config._attn_implementation = usual

    def reorder(self, parents: list[int]) -> Tensor:
        """The texts become copies of `parents`, going ones first; tells the rows those were, (going,)."""
        goes = (self.finish == GOING).tolist()
        alive = settle([p for p in parents if goes[p]])
        order = torch.tensor(alive + [p for p in parents if not goes[p]])
        for name in ("tokens", "scores", "length", "finish", "start", "root", "weight"):
            setattr(self, name, getattr(self, name)[order])
        self.going, rows = len(alive), order[: len(alive)]
        if self.going and self.shared:
            self.shared.move(rows)
        elif self.going:
            self.cache.reorder_cache(rows.to(self.device))
        return rows.to(self.device)

    def append(self, token: Tensor, law: Tensor) -> None:
        """Give each going text its token (going,), drawn from law (going, vocab); compute the next logits.

        Raises InputError if the model's log-probabilities are not numbers.
        """
        n, step, pick = self.going, self.step, token[:, None]
        logp = self.logits.gather(1, pick)[:, 0] - self.logits.logsumexp(-1)
        scores = torch.stack([logp, law.gather(1, pick)[:, 0].log()], 1).cpu()
        if scores.isnan().any():
            raise InputError("the model's log-probabilities are NaN")
        self.scores[:n] += scores
        self.tokens[:n, step] = token.cpu()
        self.length[:n] = step + 1
        finish = torch.isin(self.tokens[:n, step], self.ends) * EOS
        if self.stopped:
            for row in (finish == GOING).nonzero()[:, 0].tolist():
                finish[row] = STOP * self.stopped(self.tokens[row, : step + 1].tolist())
        if step + 1 == self.tokens.shape[1]:
            finish[finish == GOING] = LENGTH
        self.finish[:n] = finish
        if finish.any():
            self.reorder(list(range(len(self.root))))
        if self.going:
            position = self.start[: self.going] + step
            self.logits = self.forward(self.tokens[: self.going, step, None], position[:, None])
            self.step += 1
            if self.shared:
                self.shared.t = self.step

    def completions(self, rows: Sequence[int]) -> list[Completion]:
        """What these rows hold."""
        texts = (self.tokens[row, : self.length[row]].tolist() for row in rows)
        ends = (FINISH[self.finish[row]] for row in rows)
        return [
            Completion(t, *self.scores[row].tolist(), e) for row, t, e in zip(rows, texts, ends, strict=True)
        ]


def settle(parents: list[int]) -> list[int]:
    """The same parents, each in its own row if it can be, so that the fewest keys and values move."""
    rows, late = [None] * len(parents), []
    for parent in parents:
        if parent < len(rows) and rows[parent] is None:
            rows[parent] = parent
        else:
            late.append(parent)
    return [late.pop() if row is None else row for row in rows]
