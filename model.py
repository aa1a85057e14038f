"""The model side: load a causal LM, and read off log-probability, length and entropy of each completion.

One forward over one row `[prompt | chosen | rejected | prompt | ...]` serves a whole micro-batch: the prompt
is computed once for both completions and nothing is padded. What a token may see is one rule (`may_attend`):

    the same example, and the prompt or its own completion, and no later position [, and inside the window]

by *position in the text*, not by index in the row, so that sliding windows stay right. On CUDA the rule is a
FlexAttention BlockMask over the row; elsewhere each example takes its own dense mask in turn.

Logits are computed for a chunk of tokens at a time. With z = W h and p = softmax(z), the log-probability of a
token y has the gradient

    d log p_y / d h  =  W_y - sum_v p_v W_v,

which does not depend on the loss, so it is formed in the forward pass while p is at hand. Under a frozen head
a token costs two products of vocabulary size, as with autograd where it keeps all logits (three where it
computes them again); but the logits of a batch never exist at once. A trained head adds two.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.masking_utils import eager_mask
from transformers.utils import logging as transformers_logging

from files import InputError
from lora import load_lora, merge_lora, read_adapter_config
from parallel import world
from preferences import Packed, pack

transformers_logging.disable_progress_bar()  # a small model loads faster than its bar draws
CHUNK = 2**24  # logits held at once; in float32, 64 MiB


class Stats(NamedTuple):
    """What the losses see; each (pairs, 2), column 0 chosen and column 1 rejected."""

    logp: Tensor  # sum of the completion's token log-probabilities, end token included, in nats
    length: Tensor  # tokens of the completion, end token included
    entropy: Tensor | None = None  # mean over those tokens of the next-token entropy, in nats a token


def load_model(
    path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer, from a folder or the hub; an adapter's folder gives its base, merged.

    Only safetensors weights are read. Raises InputError if either cannot be loaded whole.
    """
    path = str(path)
    with _reporting(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if (Path(path) / "adapter_config.json").is_file():
        base = read_adapter_config(path).get("base_model_name_or_path")
        if not isinstance(base, str) or Path(base).resolve() == Path(path).resolve():
            raise InputError(f"--model {path}: adapter_config.json names no other base_model_name_or_path")
        model, _ = load_model(base, "cpu", dtype)  # on the CPU: merged weights are the same on any device
        return merge_lora(load_lora(model, path)).to(device), tokenizer
    if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        raise InputError(f"--model {path}: no *.safetensors weights there (other formats are not read)")
    options = {"use_safetensors": True, "output_loading_info": True, "trust_remote_code": False}
    with _reporting(path):
        model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    broken = sorted(info["missing_keys"]) + [str(name) for name in info["mismatched_keys"]]
    if broken:  # transformers would train on from random numbers
        raise InputError(f"--model {path}: {len(broken)} weights are missing or misshapen, first {broken[0]}")
    return model.to(device).eval(), tokenizer


@contextlib.contextmanager
def _reporting(path: str):
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"--model {path}: cannot be loaded: {reason}") from error


class Layout:
    """How the tokens of one packed row attend to each other; all layers share one mask for each window."""

    def __init__(self, packed: Packed):
        self.run, make = (flex, block_mask) if packed.ids.is_cuda else (dense, dense_masks)
        self.masks_for = functools.cache(partial(make, packed))  # window -> what self.run takes as its mask
        self.calls = 0

    def attend(
        self, layer: nn.Module, *qkv: Tensor, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        """Attention within the row: queries, keys, values and result are (1, heads, T, head size)."""
        self.calls += 1
        return self.run(*qkv, self.masks_for(window), scale, cap)


def may_attend(packed: Packed, window: int | None) -> Callable[[Any, Any, Any, Any], Tensor]:
    """FlexAttention's mask_mod(batch, head, query, key) for a packed row; broadcasts over index tensors."""
    example, branch, position = packed.example, packed.branch, packed.position

    def rule(_batch: Any, _head: Any, q: Any, k: Any) -> Tensor:
        allowed = (example[q] == example[k]) & ((branch[k] == 0) | (branch[k] == branch[q]))
        allowed = allowed & (position[k] <= position[q])
        return allowed if window is None else allowed & (position[q] - position[k] < window)

    return rule


def dense_masks(packed: Packed, window: int | None) -> list[Tensor]:
    """The rule as one boolean (n, n) mask for each example, n its tokens."""
    rule = may_attend(packed, window)
    spans = torch.arange(len(packed.ids), device=packed.ids.device).split(packed.lengths)
    return [rule(None, None, span[:, None], span[None, :]) for span in spans]


def block_mask(packed: Packed, window: int | None) -> Any:
    """The rule as a FlexAttention BlockMask over the whole row."""
    size = len(packed.ids)
    return create_block_mask(may_attend(packed, window), None, None, size, size, device=packed.ids.device)


compile_once = functools.cache(torch.compile)  # one wrapper for all layers and steps, made at first use


def flex(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, softcap: float | None) -> Tensor:
    """FlexAttention over the row, (1, heads, T, head size); compiled where it runs for real, on CUDA."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    run = compile_once(flex_attention) if query.is_cuda else flex_attention
    grouped = query.shape[1] != key.shape[1]
    return run(query, key, value, capped if softcap else None, mask, scale, enable_gqa=grouped)


def dense(
    query: Tensor, key: Tensor, value: Tensor, masks: list[Tensor], scale: float, softcap: float | None
) -> Tensor:
    """Attention example by example with dense masks, (1, heads, T, head size) in and out.

    Work is the sum of n^2 over examples where one mask over the row would cost (sum of n)^2.
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


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention that transformers' layers call: `layout.attend`, or without a layout their own eager one.

    Raises ValueError if a layer asks a layout for more than attention by position.
    """
    if layout is None:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if any(kwargs.get(name) is not None for name in ("s_aux", "position_bias")):
        raise ValueError("its attention has sinks or a bias of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if getattr(module.config, "attention_chunk_size", None):
        raise ValueError("it attends in chunks by index")
    if "sliding_window" not in kwargs and getattr(module.config, "sliding_window", None):
        raise ValueError("its sliding window is in its mask alone")
    limits = {"window": kwargs.get("sliding_window"), "cap": kwargs.get("softcap")}
    out = layout.attend(module, query, key, value, scale=scale, **limits)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", eager_mask)


class TokenLogProbs(torch.autograd.Function):
    """(logp, entropy), each (M,), of M targets given hidden states (M, D) and the head (V, D).

    In float32 at least. `softcap` bounds logits, softcap * tanh(z / softcap), as in Gemma 2. Differentiable
    in hidden, weight and bias through logp alone; entropy is zeros unless asked for.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, softcap, want_entropy):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logp = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        entropy = torch.zeros_like(logp)
        slope = torch.empty_like(hidden) if hidden.requires_grad else None
        for rows in _chunks(len(hidden), len(weight)):
            y = target[rows, None]
            z = _logits(hidden[rows], weight, bias, softcap)
            log_z = z.logsumexp(-1, keepdim=True)
            logp[rows] = (z.gather(1, y) - log_z).squeeze(1)
            if slope is None and not want_entropy:
                continue
            p = (z - log_z).exp_()
            if want_entropy:
                entropy[rows] = log_z.squeeze(1) - torch.linalg.vecdot(p, z)
            if slope is not None:
                slope[rows] = _slope(p, z, y, softcap).to(weight.dtype) @ weight
        ctx.save_for_backward(slope, hidden, weight, bias, target)
        ctx.softcap = softcap
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad, _):
        slope, hidden, weight, bias, target = ctx.saved_tensors
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:  # a sum over tokens weighted by `grad`, so p is computed again
            grad_weight = torch.zeros_like(weight)
            grad_bias = None if bias is None else torch.zeros_like(bias)
            for rows in _chunks(len(hidden), len(weight)):
                z = _logits(hidden[rows], weight, bias, ctx.softcap)
                grad_z = _slope(z.softmax(-1), z, target[rows, None], ctx.softcap) * grad[rows, None]
                grad_weight += grad_z.to(hidden.dtype).T @ hidden[rows]
                if bias is not None:
                    grad_bias += grad_z.sum(0)
        grad_hidden = None if slope is None else slope * grad[:, None].to(slope.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    step = max(1, CHUNK // vocabulary)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = F.linear(hidden, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _slope(p: Tensor, z: Tensor, y: Tensor, softcap: float | None) -> Tensor:
    """d log p_y / d(logits before the cap) = onehot(y) - p, times the cap's own slope; overwrites p."""
    slope = p.neg_().scatter_add_(1, y, torch.ones_like(y, dtype=p.dtype))
    return slope if softcap is None else slope * (1 - (z / softcap) ** 2)


def pair_stats(model: PreTrainedModel, packed: Packed, entropy: bool = False) -> Stats:
    """Log-probability, length and (without gradient) mean token entropy of each completion, all (pairs, 2).

    For examples with one completion, (examples, 1). `model` is any transformers causal LM whose layers go
    through the library's attention interface; check_packable tells.
    """
    run = getattr(model, "pair_stats", partial(_pair_stats, model))  # the first is shard()'s
    return run(packed, entropy)


def _pair_stats(model: PreTrainedModel, packed: Packed, entropy: bool = False) -> Stats:
    if model.config._attn_implementation != "packed":
        model.set_attn_implementation("packed")
    device = model.get_input_embeddings().weight.device
    packed = Packed(*(x.to(device) if isinstance(x, Tensor) else x for x in packed))
    layout = Layout(packed)
    hidden = model.base_model(
        input_ids=packed.ids[None],
        position_ids=packed.position[None],
        attention_mask=torch.empty(1, 1, 1, 1, device=device),  # 4-D: "already prepared", so none is built
        use_cache=False,
        layout=layout,
    ).last_hidden_state[0]
    if layout.calls < model.config.get_text_config().num_hidden_layers:
        raise ValueError("some of its layers are no attention")
    head = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    hidden = hidden.index_select(0, packed.source)
    logp, h = TokenLogProbs.apply(hidden, head.weight, head.bias, packed.target, softcap, entropy)
    size = len(packed.lengths) * packed.completions

    def per_completion(values: Tensor) -> Tensor:
        flat = values.new_zeros(size).index_add(0, packed.column, values)
        return flat.view(-1, packed.completions).clone()  # FSDP puts hooks on outputs, and warns of views

    length = per_completion(torch.ones_like(h))
    return Stats(per_completion(logp), length, per_completion(h) / length if entropy else None)


def max_positions(model: PreTrainedModel) -> float:
    """The positions that a text may have; infinity if the model names no limit.

    LongRoPE (Phi-3) turns to other factors for the whole row once any text in it is longer than its original
    length: there, no text may be.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = [getattr(config, "max_position_embeddings", None)]
    if rope.get("rope_type") == "longrope":
        limits.append(rope.get("original_max_position_embeddings"))
    return min(filter(None, limits), default=math.inf)


@torch.no_grad()
def check_packable(model: PreTrainedModel, path: str) -> None:
    """Raise InputError unless packing leaves this model's log-probabilities as they are.

    Compares the packed forward with a plain one for each text, on a few ids. Finds what would be silently
    wrong: recurrent layers, biases by index, attention sinks, windows that only the mask knows, odd heads.
    """
    ids = torch.arange(12).remainder(model.config.get_text_config().vocab_size - 1).add(1).tolist()
    pairs = [(ids[:4], ids[4:8], ids[5:10]), (ids[2:5], ids[6:7], ids[7:12])]
    try:
        plain = []
        for prompt, *completions in pairs:
            for completion in completions:
                row = torch.tensor([prompt + completion], device=model.device)
                logp = model(row).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                plain.append(logp.gather(1, row[0, len(prompt) :, None]).sum())
        gap = (pair_stats(model, pack(pairs)).logp.flatten() - torch.stack(plain)).abs().max().item()
        if not gap <= (1e-2 if model.dtype == torch.float32 else 0.5):  # SmolLM2 rounds to 2e-3
            raise ValueError(f"log-probabilities move by {gap:.2g} nats")
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--model {path}: {type(model).__name__} cannot be packed: {reason}") from None


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks: modules of the classes in `_no_split_modules`."""
    return [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Activation checkpointing, in place: a block keeps its input only and runs again in the backward."""
    for layer in decoder_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def shard(model: PreTrainedModel, device: torch.device, mixed: bool) -> None:
    """Shard a model on the CPU over all processes with FSDP2, in place, onto `device`.

    Weights move one block at a time: no device holds more than its shard and one block. On the CPU, weights
    in their file's own dtype are memory-mapped, one copy a node; in another dtype each process holds a copy
    until then. If `mixed`, trained weights are gathered as bfloat16 and gradients summed in float32.
    """
    mesh = init_device_mesh(device.type, (world(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    for module in [*decoder_layers(model), model]:
        # the root too, which FSDP2 would keep whole after an evaluation: a checkpoint must find shards
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # a sum: losses are divided by the global batch already
        module.set_force_sum_reduction_for_comms(True)
    model.pair_stats = partial(_pair_stats, model)
    register_fsdp_forward_method(model, "pair_stats")  # weights are gathered around such methods alone
