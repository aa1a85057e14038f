"""The model: log-probability, length and entropy of every completion of a micro-batch.

One forward pass over one row `[prompt | chosen | rejected | prompt | ...]` serves a whole micro-batch. The
prompt is computed once for both completions, and nothing is padded. One rule says which keys a query may
attend to (`attention_rule`):

    same example,  and key in the prompt or in the query's own completion,  and key position <= query position
    [, and within the sliding window]

It compares *positions in the text*, not indices in the row, so that sliding windows stay correct. On CUDA the
rule becomes a FlexAttention BlockMask; on the CPU each example gets a dense boolean mask.

Logits are computed for a chunk of tokens at a time (`TokenLogProbs`), so the logits of a whole batch never
exist. With hidden state h, logits z = W h and p = softmax(z), the log-probability of a token y and the
next-token entropy H have the gradients

    d log p_y / dh  =  W_y - sum_v p_v W_v            d H / dh  =  - sum_v p_v (log p_v + H) W_v

Neither depends on the loss, so both are computed in the forward pass, while p is at hand. The backward pass
multiplies them by one number per token. (Only the gradient of a trained head needs p again there.)
"""

import functools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from pairs import Packed

CHUNK = {"cpu": 2**24, "cuda": 2**27}  # logits computed at once: 64 and 512 MiB in float32


class Stats(NamedTuple):
    """What a loss sees of a micro-batch of pairs: (pairs, 2) each, column 0 chosen and column 1 rejected.

    For examples with a single completion, (examples, 1). A reward model has its rewards in the place of logp.
    """

    logp: Tensor  # sum of the completion's token log-probabilities, end token included, in nats
    length: Tensor  # number of tokens of the completion, end token included
    entropy: Tensor | None = None  # mean over those tokens of the next-token entropy, in nats per token


# ---- the packed forward pass


def pair_stats(model: PreTrainedModel, packed: Packed, entropy: bool = False) -> Stats:
    """Log-probability, length and, if asked for, mean token entropy of every completion of a packed row.

    Gradients flow through logp and entropy. `model` is any causal LM of transformers that checks.py accepts,
    or a reward model: a sequence classifier with one label, whose head `score` reads the hidden state at the
    last fed token of each completion.
    """
    # parallel.shard() makes packed_forward a method of a sharded model: FSDP gathers the weights around it.
    # It would also copy the row to the GPU, tensor by tensor, and wait for each
    packed = packed.to(model.get_input_embeddings().weight.device)
    forward = getattr(model, "packed_forward", partial(packed_forward, model))
    return forward(packed, entropy)


def packed_forward(model: PreTrainedModel, packed: Packed, entropy: bool) -> Stats:
    """What pair_stats runs, on a row that is on the model's device."""
    use_packed_attention(model)
    device = packed.ids.device
    attend = RowAttention(packed, getattr(model, "attention", "flex"))
    hidden = model.base_model(
        input_ids=packed.ids[None],
        position_ids=packed.position[None],
        attention_mask=torch.empty(1, 1, 1, 1, device=device),  # transformers builds no mask if given 4-D
        use_cache=False,
        attend=attend,  # transformers hands it on to packed_attention in every layer
    ).last_hidden_state[0]
    require_attention(model, attend.calls)
    hidden = hidden.index_select(0, packed.source)
    if (head := model.get_output_embeddings()) is None:
        last = packed.counts.cumsum(0) - 1
        reward = F.linear(hidden[last].float(), model.score.weight.float())
        length = packed.counts.float()
        return Stats(*(x.view(-1, packed.completions).clone() for x in (reward, length)))
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    weight, kind = head.weight, device.type
    if torch.is_autocast_enabled(kind):
        hidden, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, weight))
    with torch.autocast(kind, enabled=False):
        logp, token_entropy = TokenLogProbs.apply(hidden, weight, head.bias, packed.target, softcap, entropy)

    def sum_by_completion(values: Tensor) -> Tensor:  # index_add would add in a random order on a GPU
        # unsafe: without it, the CPU waits twice for the GPU to check the lengths, which pack() counted
        sums = torch.segment_reduce(values, "sum", lengths=packed.counts, unsafe=True)
        return sums.view(-1, packed.completions).clone()  # FSDP's hooks on outputs warn of views

    length = packed.counts.to(logp.dtype).view(-1, packed.completions).clone()
    mean_entropy = sum_by_completion(token_entropy) / length if entropy else None
    return Stats(sum_by_completion(logp), length, mean_entropy)


# ---- attention within a packed row


def attention_rule(packed: Packed, window: int | None) -> Callable[[Any, Any, Any, Any], Tensor]:
    """FlexAttention's mask_mod(batch, head, query, key) for a packed row; works on broadcasting indices."""
    example, branch, position = packed.example, packed.branch, packed.position

    def may_attend(_batch: Any, _head: Any, q: Any, k: Any) -> Tensor:
        same_text = (example[q] == example[k]) & ((branch[k] == 0) | (branch[k] == branch[q]))
        allowed = same_text & (position[k] <= position[q])
        return allowed if window is None else allowed & (position[q] - position[k] < window)

    return may_attend


def dense_masks(packed: Packed, window: int | None) -> list[Tensor]:
    """The rule as one boolean (n, n) mask for each example of n tokens."""
    rule = attention_rule(packed, window)
    spans = torch.arange(len(packed.ids), device=packed.ids.device).split(packed.lengths)
    return [rule(None, None, span[:, None], span[None, :]) for span in spans]


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


@functools.cache
def compile_once(function: Callable, **options: Any) -> Callable:
    """torch.compile(function, **options): one compiled function for all layers and steps.

    Each window, grad mode and size class compiles a variant (FlexAttention in Gemma: 12). Beyond 8 variants,
    torch would by default run the function eagerly, and FlexAttention would store all attention scores.
    """
    torch._dynamo.config.recompile_limit = 64  # an argument of torch.compile only from torch 2.12
    return torch.compile(function, **options)


def flex(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, softcap: float | None
) -> Tensor:
    """FlexAttention over the row, (1, heads, T, head size) in and out; compiled on CUDA."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    run = compile_once(flex_attention) if query.is_cuda else flex_attention
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
    query: Tensor, key: Tensor, value: Tensor, masks: list[Tensor], scale: float, softcap: float | None
) -> Tensor:
    """Attention one example at a time with dense masks, (1, heads, T, head size) in and out.

    It costs the sum of n^2 over the examples; one mask over the row would cost (sum of n)^2.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    lengths = [len(mask) for mask in masks]
    out = []
    parts = (x.split(lengths, 2) for x in (query, key, value))
    for q, k, v, mask in zip(*parts, masks, strict=True):
        if softcap is None:
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))
        else:
            score = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
            out.append(score.masked_fill(~mask, -torch.inf).softmax(-1) @ v)
    return torch.cat(out, 2)


class RowAttention:
    """Attention of a packed row. Layers with the same window share one mask.

    `attention` is "flex" (FlexAttention on CUDA, wherever it compiles) or "dense".
    """

    def __init__(self, packed: Packed, attention: str = "flex"):
        self.mask = functools.cache(lambda make_mask, window: make_mask(packed, window))
        self.attention, self.calls = attention, 0

    def __call__(
        self, _layer: nn.Module, *qkv: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        self.calls += 1
        if self.attention == "flex" and qkv[0].is_cuda:
            mask = self.mask(block_mask, window)
            if flex_compiles(*qkv, mask, scale, softcap):
                return flex(*qkv, mask, scale, softcap)
        return dense(*qkv, self.mask(dense_masks, window), scale, softcap)


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


# ---- log-probability and entropy of tokens


class TokenLogProbs(torch.autograd.Function):
    """(logp, entropy), each (M,), of M target tokens, from hidden states (M, D) and the head's weight (V, D).

    Logits, softmax and both results are float32; the other products are in the dtype of hidden and weight.
    `softcap` bounds the logits, softcap * tanh(z / softcap), as in Gemma 2. Without `with_entropy`, entropy
    is zeros. Both outputs are differentiable with respect to hidden, weight and bias. Call it outside of
    autocast: it would round the sums over the vocabulary to bfloat16.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, softcap, with_entropy):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropy = torch.zeros_like(logp)
        dlogp_dh = torch.empty_like(hidden) if hidden.requires_grad else None
        dentropy_dh = torch.empty_like(hidden) if hidden.requires_grad and with_entropy else None
        for chunk in _chunks(hidden, weight):
            y = target[chunk, None]
            z = _capped_logits(hidden[chunk], weight, bias, softcap)
            log_p = z.log_softmax(-1)
            logp[chunk] = log_p.gather(1, y).squeeze(1)
            if dlogp_dh is None and not with_entropy:
                continue
            p = log_p.exp() if with_entropy else log_p.exp_()
            if with_entropy:
                entropy[chunk] = -torch.linalg.vecdot(p, log_p)
            if dentropy_dh is not None:
                dentropy_dh[chunk] = _dentropy_dz(p, z, softcap).to(weight.dtype) @ weight
            if dlogp_dh is not None:
                dlogp_dh[chunk] = _dlogp_dz(p, z, y, softcap).to(weight.dtype) @ weight  # overwrites p
        ctx.save_for_backward(dlogp_dh, dentropy_dh, hidden, weight, bias, target)
        ctx.softcap, ctx.with_entropy = softcap, with_entropy
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        dlogp_dh, dentropy_dh, hidden, weight, bias, target = ctx.saved_tensors
        grad_hidden = grad_weight = grad_bias = None
        if dlogp_dh is not None:
            grad_hidden = dlogp_dh * grad_logp[:, None].to(dlogp_dh.dtype)
        if dentropy_dh is not None:
            grad_hidden += dentropy_dh * grad_entropy[:, None].to(dentropy_dh.dtype)
        weight_needs_grad = ctx.needs_input_grad[1]
        if weight_needs_grad:  # a sum over tokens, weighted by the incoming gradients: p is computed again
            grad_weight = torch.zeros_like(weight, dtype=grad_logp.dtype)
            grad_bias = None if bias is None else torch.zeros_like(bias)
            for chunk in _chunks(hidden, weight):
                z = _capped_logits(hidden[chunk], weight, bias, ctx.softcap)
                p, grad_z = z.softmax(-1), 0.0
                if ctx.with_entropy:
                    grad_z = _dentropy_dz(p, z, ctx.softcap) * grad_entropy[chunk, None]
                grad_z = grad_z + _dlogp_dz(p, z, target[chunk, None], ctx.softcap) * grad_logp[chunk, None]
                grad_weight += grad_z.to(hidden.dtype).T @ hidden[chunk]
                if bias is not None:
                    grad_bias += grad_z.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    step = max(1, CHUNK[hidden.device.type] // len(weight))
    if hidden.is_cuda:  # whole tiles of the matrix product
        step = max(128, step // 128 * 128)
    return [slice(start, start + step) for start in range(0, len(hidden), step)]


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The head's logits (..., V) in float32, from hidden states (..., D) and weight (V, D) in any dtype.

    A product of bfloat16 numbers is summed in float32. nn.Linear rounds that sum to bfloat16 again, which
    moves the log-probability of a completion by tenths of a nat.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.is_cuda and weight.dtype != dtype:
        z = torch.mm(hidden.flatten(0, -2), weight.T, out_dtype=dtype).view(*hidden.shape[:-1], -1)
    else:
        z = F.linear(hidden.to(dtype), weight.to(dtype))
    return z if bias is None else z.add_(bias)


def _capped_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = head_logits(hidden, weight, bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _dlogp_dz(p: Tensor, z: Tensor, y: Tensor, softcap: float | None) -> Tensor:
    """d log p_y / d(logits before the cap) = onehot(y) - p, times the cap's own derivative. Overwrites p."""
    gradient = p.neg_().scatter_add_(1, y, torch.ones_like(y, dtype=p.dtype))
    return gradient if softcap is None else gradient * (1 - (z / softcap) ** 2)


def _dentropy_dz(p: Tensor, z: Tensor, softcap: float | None) -> Tensor:
    """dH / d(logits before the cap) = -p (log p + H) = p (sum_v p_v z_v - z), times the cap's derivative."""
    gradient = p * (torch.linalg.vecdot(p, z)[:, None] - z)
    return gradient if softcap is None else gradient * (1 - (z / softcap) ** 2)
