"""The model: log-probability, length and entropy of every completion of a micro-batch.

One forward pass over one row `[prompt | chosen | rejected | prompt | ...]` serves a whole micro-batch. The
prompt is computed once for both completions, and nothing is padded; attention.py keeps the texts apart.

Logits are computed for a chunk of tokens at a time (`TokenLogProbs`), so the logits of a whole batch never
exist. With hidden state h, logits z = W h and p = softmax(z), the log-probability of a token y and the
next-token entropy H have the gradients

    d log p_y / dh  =  W_y - sum_v p_v W_v            d H / dh  =  - sum_v p_v (log p_v + H) W_v

Neither depends on the loss, so both are computed in the forward pass, while p is at hand. The backward pass
multiplies them by one number per token. (Only the gradient of a trained head needs p again there.)
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from common.parallel import shard
from core.attention import RowAttention, compiled, require_attention, use_packed_attention
from core.pairs import Packed

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
    packed = packed.to(model.get_input_embeddings().weight.device)
    forward = getattr(model, "packed_forward", partial(packed_forward, model))  # see set_forward
    return forward(packed, entropy)


def set_forward(model: PreTrainedModel, device: torch.device, mixed: bool, fsdp: bool) -> None:
    """Make packed_forward a method of a model that is trained: in its precision, and on its shards.

    `mixed`: weights are float32 and matrix products bfloat16. `fsdp`: each process keeps a shard of every
    weight, on `device`, and FSDP gathers whole weights around the method.
    """
    model.mixed = mixed
    if fsdp:
        shard(model, device, mixed)
    forward = torch.autocast(device.type, torch.bfloat16, enabled=mixed)(packed_forward)
    model.packed_forward = partial(forward, model)
    register_fsdp_forward_method(model, "packed_forward")  # does nothing to a model without shards


def wrap_layers(layers: Sequence[nn.Module], compile: bool, checkpoint_activations: bool) -> None:
    """Compile decoder layers, and have them keep only their input and run again in the backward pass.

    Compiled layers take their masks from the row, so the model must have run before (see RowAttention).
    """
    for layer in layers:
        if compile:
            layer.forward = compiled(layer.forward)
        if checkpoint_activations:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def packed_forward(model: PreTrainedModel, packed: Packed, entropy: bool) -> Stats:
    """What pair_stats runs, on a row that is on the model's device."""
    use_packed_attention(model)
    device = packed.ids.device
    attend = RowAttention(packed, getattr(model, "attention", "flex"), getattr(model, "mask_kinds", ()))
    hidden = model.base_model(
        input_ids=packed.ids[None],
        position_ids=packed.position[None],
        attention_mask=torch.empty(1, 1, 1, 1, device=device),  # transformers builds no mask if given 4-D
        use_cache=False,
        attend=attend,  # transformers hands it on to packed_attention in every layer
    ).last_hidden_state[0]
    require_attention(model, attend.calls)
    model.mask_kinds = tuple(attend.masks)
    hidden = hidden.index_select(0, packed.source)
    if (head := model.get_output_embeddings()) is None:
        last = packed.counts.cumsum(0) - 1
        reward, length = model.score(hidden[last]), packed.counts.float()
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


def float32_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    """head_logits, as the forward method of a language model's head."""
    return head_logits(hidden, head.weight, head.bias)


def float32_score(score: nn.Linear, hidden: Tensor) -> Tensor:
    """The forward method of a reward model's head, (..., 1) from hidden (..., D): float32, as it is trained.

    Rounded to bfloat16, the rewards of similar texts would often be equal.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.float(), score.weight.float())


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
