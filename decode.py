"""Many continuations of few prompts: a prompt is computed and kept once, whatever the number of its samples.

A step feeds the newest token of every unfinished text. Its query attends to two sets of keys, under one
softmax:

    scores  =  [ q @ K(prompt) | q @ K(own) ]

All texts of a prompt share the first product, so the prompt's keys are stored and read once; an ordinary
cache stores and reads them once per sample, which with long prompts is most of what a step moves. Room for
the texts' own keys and values is allocated at the start. When a text ends it leaves the batch, and another
takes its row.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from files import InputError
from model import dense, dense_masks
from preferences import Packed, pack

FINISH = ("", "eos", "stop", "length")  # why a text ended
GOING, EOS, STOP, LENGTH = range(4)
BLOCK = 128  # tokens that race together
PREFILL = 2048  # prompt tokens in one forward pass


class Completion(NamedTuple):
    """One sampled completion."""

    tokens: list[int]  # the end token included, if it ended
    logp: float  # log-probability under the model, temperature 1 and no cuts, in nats
    sampled_logp: float  # log-probability under the law it was drawn from
    finish: str  # "eos", "stop" at a stop string, or "length" when max_new_tokens came first


def race(probs: Tensor, streams: Sequence[np.random.Generator]) -> Tensor:
    """A token for each row of probs (rows, vocab), which need not sum to 1, from the row's stream: (rows,).

    With exponential E(v), argmax p(v) / E(v) has the law p. A rounding error in p changes the token only
    where two nearly tie, while an inverse CDF adds up the errors of all tokens before. Two races, between
    blocks of the vocabulary and inside the block that won, need few random numbers.
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


class SharedCache:
    """Keys and values of S prompts, once each, and of R texts behind them.

    A layer keeps prompt keys and values (S, kv heads, P, size), P the longest prompt's tokens, and the texts'
    own (R, kv heads, room, size), of which t are filled.
    """

    def __init__(self, lengths: Tensor, owner: Tensor, room: int, device: torch.device):
        """lengths (S,) of the prompts; text r continues prompt owner[r] by up to `room` tokens."""
        self.lengths, self.owner, self.room, self.device, self.t = lengths, owner, room, device, 0
        self.layers: dict[nn.Module, list[Tensor]] = {}
        self.masks: dict[int | None, Any] = {}  # of this forward pass, for each window
        self.row: Packed | None = None  # the prompts that it computes; none while texts grow
        self.filled = 0  # prompts computed before those
        self.calls = 0  # of layers, while prompts are computed

    def arrange(self, owner: Tensor) -> None:
        """Row r now belongs to prompt owner[r]; prompts without rows are dropped.

        Rows lie on a grid of prompts x `width`, the most rows of a prompt; `cell` is each row's place in it.
        """
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
        padding = torch.arange(int(self.lengths.max())) >= self.lengths[self.owner][:, None]
        self.padding = padding[:, None, None].to(self.device) if padding.any() else None

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
        *,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        """Attention of each row's newest token to all before it; keeps k and v, (rows, kv heads, 1, size).

        While prompts are computed, they lie end to end in one row, and each attends to itself. q and the
        result are (rows, heads, 1 or the row's tokens, size).
        """
        if self.row:
            self.keep_prompts(layer, k, v)
            if window not in self.masks:
                self.masks[window] = [mask.to(self.device) for mask in dense_masks(self.row, window)]
            return dense(q, k, v, self.masks[window], scale, cap)
        rows, kv, _, _ = k.shape
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

    def keep_prompts(self, layer: nn.Module, k: Tensor, v: Tensor) -> None:
        """Keep k and v (1, kv heads, tokens, size) of the row of prompts that is computed."""
        if layer not in self.layers:
            prompts, texts, longest = len(self.lengths), len(self.owner), int(self.lengths.max())
            self.layers[layer] = [x.new_zeros(prompts, x.shape[1], longest, x.shape[-1]) for x in (k, v)]
            self.layers[layer] += [x.new_empty(texts, x.shape[1], self.room, x.shape[-1]) for x in (k, v)]
        self.calls += 1
        for kept, new in zip(self.layers[layer], (k, v), strict=False):
            for prompt, part in enumerate(new[0].split(self.row.lengths, 1), self.filled):
                kept[prompt, :, : part.shape[1]] = part

    def times_prompts(self, x: Tensor, y: Tensor) -> Tensor:
        """Rows of x (rows, kv, group, a) times their prompts' y (S, kv, a, b), one product per prompt."""
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
        if window is None:
            return self.padding
        if window not in self.masks:
            length, position = self.lengths[self.owner][:, None], torch.arange(int(self.lengths.max()))
            hidden = (position >= length) | (length + self.t - position >= window)
            self.masks[window] = hidden[:, None, None].to(self.device)
        return self.masks[window]


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
        self.scores = torch.zeros(rows, 2, dtype=torch.float64)  # log-probability under model and law
        self.length, self.finish = torch.zeros(2, rows, dtype=torch.long)
        self.start = lengths[owners]  # position of the first token
        self.root = torch.arange(rows)  # the row that a row descends from
        self.weight = torch.zeros(rows, dtype=torch.float64)  # a particle's log-weight

        usual = model.config._attn_implementation
        try:
            self.shared, self.cache = SharedCache(lengths, owners, room, self.device), None
            logits = self.prefill(prompts)
            self.shared.arrange(owners)
        except ValueError:
            model.set_attn_implementation(usual)
            logits = self.fall_back(prompts, owners)
        self.logits = logits[owners.to(self.device)]

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Compute the prompts, several end to end in one row, without padding: logits (S, vocab).

        Raises ValueError if some layer is no attention by position (recurrence, chunks, biases, sinks).
        """
        if not self.model._supports_attention_backend:
            raise ValueError("no attention by position")
        if self.model.config._attn_implementation != "packed":
            self.model.set_attn_implementation("packed")
        logits, size = [], max(1, PREFILL // max(map(len, prompts)))
        for first in range(0, len(prompts), size):
            row = pack([[prompt] for prompt in prompts[first : first + size]])
            self.shared.row, self.shared.filled = row, first
            last = torch.tensor(row.lengths, device=self.device).cumsum(0) - 1
            logits.append(self.forward(row.ids[None], row.position[None], last))
        self.shared.row = None
        if self.shared.calls != self.model.config.get_text_config().num_hidden_layers * len(logits):
            raise ValueError("not one attention by position in each layer")
        return torch.cat(logits)

    def fall_back(self, prompts: list[list[int]], owners: Tensor) -> Tensor:
        """Compute one prompt, (1, vocab), and keep it in transformers' own cache, a row a text."""
        name = type(self.model).__name__
        if len(prompts) > 1:
            raise InputError(
                f"{name} samples one prompt at a time: give --batch_size no more than --num_samples"
            )
        self.shared, self.cache = None, DynamicCache(config=self.model.config)
        try:
            logits = self.forward(torch.tensor(prompts))
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} cannot be sampled: {error}") from None
        if not self.cache.is_initialized:
            raise InputError(f"{name} cannot be sampled: it does not use transformers' DynamicCache")
        self.cache.reorder_cache(owners.to(self.device))
        return logits

    @torch.no_grad()
    def forward(self, ids: Tensor, position: Tensor | None = None, last: int | Tensor = 1) -> Tensor:
        """Logits (., vocab) in float32 after ids (rows, n) at position (rows, n).

        After the last of each row's, or after those of one row with the indices `last`.
        """
        if self.shared:
            self.shared.masks = {}
            extra = {"layout": self.shared, "use_cache": False, "position_ids": position.to(self.device)}
            extra["attention_mask"] = torch.empty(1, 1, 1, 1, device=self.device)  # 4-D: none is built
        else:
            extra = {"past_key_values": self.cache, "use_cache": True}
        return self.model(ids.to(self.device), logits_to_keep=last, **extra).logits.flatten(0, 1).float()

    def reorder(self, parents: list[int]) -> Tensor:
        """The texts become copies of texts `parents`, going ones first; returns those' old rows, (going,)."""
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
        """The completions of these rows."""
        texts = (self.tokens[row, : self.length[row]].tolist() for row in rows)
        ends = (FINISH[self.finish[row]] for row in rows)
        return [
            Completion(t, *self.scores[row].tolist(), e) for row, t, e in zip(rows, texts, ends, strict=True)
        ]


def settle(parents: list[int]) -> list[int]:
    """`parents` in an order that leaves each in its own row if it can: the fewest keys and values move."""
    rows, late = [None] * len(parents), []
    for parent in parents:
        if parent < len(rows) and rows[parent] is None:
            rows[parent] = parent
        else:
            late.append(parent)
    return [late.pop() if row is None else row for row in rows]
