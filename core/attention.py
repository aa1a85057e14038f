"""Attention within a packed row `[prompt | chosen | rejected | prompt | ...]`: who may attend to whom.

One rule (`attention_rule`) says which keys a query may attend to:

    same example,  and key in the prompt or in the query's own completion,  and key position <= query position
    [, and within the sliding window]

It compares *positions in the text*, not indices in the row, so that sliding windows stay correct. Two engines
obey it: FlexAttention with a BlockMask (on CUDA, wherever it compiles), and PyTorch's attention with a dense
mask for each example. `packed_attention` is what the layers of a transformers model call.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from core.pairs import Packed


def attention_rule(packed: Packed, window: int | None) -> Callable[[Any, Any, Any, Any], Tensor]:
    """FlexAttention's mask_mod(batch, head, query, key) for a packed row; works on broadcasting indices."""
    example, branch, position = packed.example, packed.branch, packed.position

    def may_attend(_batch: Any, _head: Any, q: Any, k: Any) -> Tensor:
        same_text = (example[q] == example[k]) & ((branch[k] == 0) | (branch[k] == branch[q]))
        allowed = same_text & (position[k] <= position[q])
        return allowed if window is None else allowed & (position[q] - position[k] < window)

    return may_attend


def dense_masks(packed: Packed, window: int | None) -> list[Tensor]:
    """The rule as one (n, n) mask for each example of n tokens: 0, and -inf where no attention is allowed.

    Of a boolean mask, PyTorch's attention would make and keep such a copy in every layer.
    """
    rule, device = attention_rule(packed, window), packed.ids.device
    spans = torch.arange(len(packed.ids), device=device).split(packed.lengths)
    allowed = (rule(None, None, span[:, None], span[None, :]) for span in spans)
    return [torch.zeros(x.shape, device=device).masked_fill_(~x, -torch.inf) for x in allowed]


def block_mask(packed: Packed, window: int | None) -> BlockMask:
    """The rule as a FlexAttention BlockMask over the row: which blocks of 128 x 128 hold allowed pairs.

    The kernel skips blocks without any, and asks the rule only in blocks where not every pair is allowed.
    Equal to create_block_mask's, whose vmaps keep the CPU busy for ten times as long.
    """
    rule, tokens, size = attention_rule(packed, window), len(packed.ids), 128
    index = torch.arange(tokens, device=packed.ids.device)
    allowed = F.pad(rule(None, None, index[:, None], index), (0, -tokens % size, 0, -tokens % size))
    counts = allowed.view(-(-tokens // size), size, -1, size).sum((1, 3))[None, None]
    full = counts == size * size
    lists = []  # for each row of blocks: how many key blocks to visit, and a permutation that has them first
    for visit in ((counts > 0) & ~full, full):
        order = visit.int().argsort(dim=-1, descending=True, stable=True)
        lists += [visit.sum(-1, dtype=torch.int32), order.int()]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=size, mask_mod=rule, seq_lengths=(tokens, tokens))


def compiled(function: Callable, **options: Any) -> Callable:
    """torch.compile(function, **options), with up to 64 variants.

    Each window, grad mode and size class compiles a variant (FlexAttention in Gemma: 12). Beyond 8 variants,
    torch would by default run the function eagerly, and FlexAttention would store all attention scores.
    """
    torch._dynamo.config.recompile_limit = 64  # an argument of torch.compile only from torch 2.12
    return torch.compile(function, **options)


compile_once = functools.cache(compiled)  # one compiled function for all layers and steps


def flex(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, softcap: float | None
) -> Tensor:
    """FlexAttention over the row, (1, heads, T, head size) in and out; compiled on CUDA."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    alone = query.is_cuda and not torch.compiler.is_compiling()
    run = compile_once(flex_attention) if alone else flex_attention
    return run(
        query,
        key,
        value,
        capped if softcap else None,
        mask,
        scale,
        enable_gqa=query.shape[1] != key.shape[1],
        # rows under 128 tokens would get the kernel made for decoding, which takes no such groups of heads
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    masks: list[Tensor | None],
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention one example at a time with dense masks, (1, heads, T, head size) in and out.

    It costs the sum of n^2 over the examples; one mask over the row would cost (sum of n)^2. Without a mask
    an example is one text, and without a softcap: every token attends to all up to it.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = []
    parts = (x.split(lengths, 2) for x in (query, key, value))
    for q, k, v, mask in zip(*parts, masks, strict=True):
        if softcap is None:
            mask = mask if mask is None else mask.to(q.dtype)
            causal = mask is None
            out.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale))
        else:
            score = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
            out.append((score + mask.to(q.dtype)).softmax(-1) @ v)
    return torch.cat(out, 2)


class RowAttention:
    """Attention of a packed row. Layers with the same window share one mask.

    `attention` is "flex" (FlexAttention on CUDA, wherever it compiles) or "dense". `kinds` are the masks that
    layers will ask for, if they are known: compiled layers must not make them.
    """

    def __init__(self, packed: Packed, attention: str = "flex", kinds: Iterable[tuple] = ()):
        self.packed, self.attention, self.calls = packed, attention, 0
        self.masks: dict[tuple, Any] = {}
        for kind in kinds:
            self.mask(*kind)

    def mask(self, make_mask: Callable[[Packed, int | None], Any], window: int | None) -> Any:
        """The row's mask of a kind, made once."""
        if (make_mask, window) not in self.masks:
            self.masks[make_mask, window] = make_mask(self.packed, window)
        return self.masks[make_mask, window]

    def __call__(
        self, _layer: nn.Module, *qkv: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        self.calls += 1
        if self.attention == "flex" and qkv[0].is_cuda:
            mask = self.mask(block_mask, window)
            if flex_compiles(*qkv, mask, scale, softcap):
                return flex(*qkv, mask, scale, softcap)
        return dense(*qkv, self.packed.lengths, self.mask(dense_masks, window), scale, softcap)


COMPILES: dict[tuple, bool] = {}  # what flex_compiles found, by heads, head sizes, dtypes and softcap


def flex_compiles(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, softcap: float | None
) -> bool:
    """Whether FlexAttention compiles for such heads, forward and backward; warns once if it does not.

    It needs Triton and a C compiler, and not every accelerator has both.
    """
    kind = (query.shape[1], key.shape[1:4:2], value.shape[3], query.dtype, value.dtype, softcap)
    if kind not in COMPILES:
        try:
            with torch.enable_grad():
                trial = [x.detach().requires_grad_() for x in (query, key, value)]
                torch.autograd.grad(flex(*trial, mask, scale, softcap).sum(), trial)
            COMPILES[kind] = True
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            text = "FlexAttention does not compile here, and the dense masks in its place take longer"
            print(f"warning: {text}: {reason}", file=sys.stderr)
            COMPILES[kind] = False
    return COMPILES[kind]


# Keywords of attention calls: two that are obeyed, and those that do not change what a layer computes.
# (Dropout is 0 in eval mode, and attention_rule says what is causal.)
KEYWORDS = {"sliding_window", "softcap", "dropout", "is_causal", "position_ids", "cache_position"}
KEYWORDS |= {"use_cache", "output_attentions", "output_hidden_states", "output_router_logits"}


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make the layers of a model call packed_attention. Raises ValueError if they cannot."""
    config, can_set = model.config, model._supports_attention_backend or model._supports_sdpa
    if config._attn_implementation != "packed" and can_set:
        model.set_attn_implementation("packed")
    if config._attn_implementation != "packed":
        require_attention(model, 0)


def require_attention(model: PreTrainedModel, calls: int) -> None:
    """Raise ValueError if a forward pass called packed_attention fewer times than the model has layers."""
    layers = model.config.get_text_config().num_hidden_layers
    if calls < layers:
        raise ValueError(f"only {calls} of its {layers} layers use transformers' attention interface")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    attend: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that every layer of a transformers model calls; `attend` does the work.

    Raises ValueError for whatever else changes the result: unknown keywords (attention sinks, a position
    bias, the keys chosen by sparse attention), a mask that the layer changed, chunks, or a window that only
    the mask knows.
    """
    if attend is None:  # called by generate() or model(...), not packed_forward: use eager attention
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if unknown := [name for name in kwargs if name not in KEYWORDS and kwargs[name] is not None]:
        raise ValueError(f"its attention takes more than is packed here: {', '.join(unknown)}")
    if attention_mask is not None and attention_mask.numel() > 1:  # Doge
        raise ValueError("its attention changes the mask, which is not used here")
    if getattr(module.config, "attention_chunk_size", None):  # Llama 4
        raise ValueError("it attends in chunks by index")
    if "sliding_window" not in kwargs and getattr(module.config, "sliding_window", None):  # PhiMoE
        raise ValueError("its sliding window is only in its attention mask, which is not used here")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    limits = {"window": kwargs.get("sliding_window"), "softcap": kwargs.get("softcap")}
    out = attend(module, query, key, value, scale=scale, **limits)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", eager_mask)
