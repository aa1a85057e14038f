"""Keys and values of prompts, each stored once, and of the completions that continue them.

A step of decoding feeds the newest token of every unfinished completion. Its query attends to the keys of its
prompt and to the keys of its own completion, under one softmax:

    scores  =  [ q @ K_prompt^T  |  q @ K_completion^T ]

All completions of a prompt share K_prompt and V_prompt, so a step reads them once per prompt. An ordinary KV
cache stores and reads a copy for every completion; with long prompts that is most of a step's memory traffic.
(Hydragen, Juravsky et al. 2024, splits attention so too.)
"""

import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.parallel import to_device
from core.attention import dense, dense_masks
from core.pairs import Packed

NEW_TOKENS = 256  # tokens of each completion that there is room for at first; when it is full, twice as many


class SharedPromptCache:
    """The keys and values of a Batch.

    `layers` has an entry for each attention call of a forward pass: the prompts' keys and values, each
    (prompts or more, kv heads, longest prompt or more, head size), then the completions', each (batch,
    kv heads, longest completion or more, head size). `masks` holds a mask for each window, which layers
    share; `calls` counts the attention calls of the forward pass. `last`, one prompt's index or none, is a
    prompt that is kept without a completion: others may follow.
    """

    def __init__(self, batch: int, max_new_tokens: int, device: torch.device):
        self.batch, self.max_new_tokens, self.device = batch, max_new_tokens, device
        self.layers: list[list[Tensor]] = []
        self.prompt_lengths, self.prompt_index, self.last = torch.zeros(3, 0, dtype=torch.long)
        self.calls, self.masks = 0, {}

    def add_prompts(self, lengths: list[int]) -> None:
        """Make room for prompts of these lengths, behind the others."""
        self.prompt_lengths = torch.cat([self.prompt_lengths, torch.tensor(lengths, dtype=torch.long)])
        for layer in self.layers:
            layer[:2] = [grow(x, len(self.prompt_lengths), int(self.prompt_lengths.max())) for x in layer[:2]]

    def prefill(
        self,
        packed: Packed,
        first: int,
        _: nn.Module,
        *qkv: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention within packed prompts; stores keys and values as those of prompts first, first + 1, ...

        q, k, v and the result are (1, heads or kv heads, T, head size).
        """
        q, k, v = qkv
        if self.calls == len(self.layers):
            prompts, longest = len(self.prompt_lengths), int(self.prompt_lengths.max())
            layer = [x.new_zeros(prompts, x.shape[1], longest, x.shape[-1]) for x in (k, v)]
            # zeros: what is masked has the weight 0, and 0 times a NaN would be NaN
            new = min(self.max_new_tokens, NEW_TOKENS)
            layer += [x.new_zeros(self.batch, x.shape[1], new, x.shape[-1]) for x in (k, v)]
            self.layers.append(layer)
        for stored, new in zip(self.layers[self.calls], (k, v), strict=False):
            for prompt, part in enumerate(new[0].split(packed.lengths, 1), first):
                stored[prompt, :, : part.shape[1]] = part
        self.calls += 1
        if window not in self.masks:  # a long prompt's would be large, and plain causal attention needs none
            plain = softcap is None and (window is None or window >= max(packed.lengths))
            masks = [] if plain else [mask.to(self.device) for mask in dense_masks(packed, window)]
            self.masks[window] = masks or [None] * len(packed.lengths)
        return dense(q, k, v, packed.lengths, self.masks[window], scale, softcap)

    def attend(
        self, _: nn.Module, *qkv: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attention of each completion's newest token to all tokens up to it; stores its key and value.

        q, k, v and the result are (batch, heads or kv heads, 1, head size).
        """
        q, k, v = qkv
        prompt_k, prompt_v, own_k, own_v = self.filled[self.calls]
        self.calls += 1
        own_k[self.rows, :, self.ends], own_v[self.rows, :, self.ends] = k[:, :, 0], v[:, :, 0]
        q = (q * scale).reshape(len(k), k.shape[1], -1, q.shape[-1])  # query heads grouped by their kv head
        scores = torch.cat([self.prompt_matmul(q, prompt_k.mT), q @ own_k.mT], -1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        longest = prompt_k.shape[2]
        if (mask := self.masks[window]) is not None:
            scores.masked_fill_(mask, -math.inf)
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

    def mask(self, window: int | None, lengths: Tensor) -> Tensor | None:
        """True at padding and outside the window, (batch, 1, 1, tokens of prompt and completion); or None."""
        prompt_lengths, lengths = self.prompt_lengths[self.prompt_index][:, None], lengths[:, None]
        prompt, own = torch.arange(self.longest), torch.arange(int(lengths.max()) + 1)
        masks = [prompt >= prompt_lengths, own > lengths]
        if window is not None:
            masks[0] |= prompt_lengths + lengths - prompt >= window
            masks[1] |= lengths - own >= window
        mask = torch.cat(masks, 1)
        return to_device(mask[:, None, None], self.device) if mask.any() else None

    def reindex(self, indices: Tensor) -> None:
        """Reindex the batch: new completion i is old completion indices[i]."""
        self.move([x for layer in self.layers for x in layer[2:]], indices)
        self.set_prompts(self.prompt_index[indices])

    def move(self, tensors: list[Tensor], indices: Tensor) -> None:
        """Row i becomes what was row indices[i]."""
        changed = (indices != torch.arange(len(indices))).nonzero()[:, 0]
        source, target = indices[changed].to(self.device), changed.to(self.device)
        for x in tensors if len(changed) else []:
            x[target] = x[source]

    def set_prompts(self, prompt_index: Tensor) -> None:
        """Completion i now continues prompt prompt_index[i].

        Prompts without a completion are dropped, but for `last`.

        prompt_matmul makes one product per prompt, so completions get slots of a grid, a row for each prompt:

            completion   0  1  2  3  4           grid   0  2  3    completions of prompt 0
            its prompt   0  1  0  0  1                  1  4  -    completions of prompt 1
            its slot     0  3  1  2  4                             (- is 0: what comes of it is not read)

        `grid` is None if the batch fills it in order.
        """
        # new prompt p is old prompt kept[p]
        used = torch.cat([prompt_index, self.last]).unique().tolist()
        kept = torch.tensor(keep_in_place(used), dtype=torch.long)
        self.move([x for layer in self.layers for x in layer[:2]], kept)
        new_index = torch.zeros(len(self.prompt_lengths), dtype=torch.long)
        new_index[kept] = torch.arange(len(kept))
        self.prompt_index, self.last = new_index[prompt_index], new_index[self.last]
        self.prompt_lengths = self.prompt_lengths[kept]
        if not len(prompt_index):
            return
        self.longest = int(self.prompt_lengths.max())
        column = F.one_hot(self.prompt_index).cumsum(0).gather(1, self.prompt_index[:, None])[:, 0] - 1
        width = int(column.max()) + 1
        slots, self.grid = self.prompt_index * width + column, None
        if not torch.equal(slots, torch.arange(len(self.prompt_lengths) * width)):
            grid = torch.zeros(len(self.prompt_lengths) * width, dtype=torch.long)
            grid[slots] = torch.arange(len(slots))
            self.grid, self.slots = grid.view(-1, width).to(self.device), slots.to(self.device)

    def start_step(self, lengths: Tensor) -> None:
        """Slice the layers up to the longest completion, and make masks, for the attend() calls of a step.

        Completion i has lengths[i] tokens here; its newest one comes behind them. attend() takes all sizes
        from tensors: torch.compile would compile an int attribute as a constant, and so again for every step.
        """
        self.calls, n, end = 0, len(lengths), int(lengths.max()) + 1
        if end > (size := self.layers[0][2].shape[2]):  # full
            more, self.filled = min(size, self.max_new_tokens - size), []  # its views would keep the old ones
            for layer in self.layers:
                layer[2:] = [F.pad(x, (0, 0, 0, more)) for x in layer[2:]]
        self.rows, self.ends = torch.arange(n, device=self.device), to_device(lengths, self.device)
        prompts = slice(len(self.prompt_lengths)), slice(None), slice(self.longest)
        self.filled = [
            (*(x[prompts] for x in layer[:2]), *(x[:n, :, :end] for x in layer[2:])) for layer in self.layers
        ]
        self.masks = {window: self.mask(window, lengths) for window in self.masks}


def grow(x: Tensor, prompts: int, longest: int) -> Tensor:
    """x (prompts, kv heads, tokens, head size), with room for at least so many prompts and tokens."""
    if x.shape[0] >= prompts and x.shape[2] >= longest:
        return x
    larger = x.new_zeros(max(x.shape[0], prompts), x.shape[1], max(x.shape[2], longest), x.shape[3])
    larger[: x.shape[0], :, : x.shape[2]] = x
    return larger


def keep_in_place(indices: list[int]) -> list[int]:
    """Permute `indices` so that result[i] == i wherever possible: reindexing by it copies the fewest rows."""
    present = set(indices)
    others = list((Counter(indices) - Counter(range(len(indices)))).elements())
    return [i if i in present else others.pop() for i in range(len(indices))]
