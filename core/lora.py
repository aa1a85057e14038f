"""Low-rank adaptation by hand (Hu et al., 2021), in PEFT's file format.

    y = W x + (alpha / rank) B A x        A (rank, in) random,  B (out, rank) zero

W is frozen and B starts at zero, so the untrained policy equals the reference policy exactly. Switching the
second term off gives the reference at any time, without a second model in memory.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from common.files import InputError, digest_tensors, error_prefix, parse_json, write_json, write_tensors
from common.parallel import full_tensor, get_rank

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # of an adapter's weights
EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
SCORE = "base_model.model.score.weight"  # the head of a reward model, in PEFT's naming


class DropoutLinear(torch.autograd.Function):
    """dropout(x) A^T, (..., rank), from x (..., in) and A (rank, in).

    The backward pass makes the dropped copy of x again, from x, which layers with the same input share, and a
    mask of one byte an element. Autograd would keep a dropped copy for each layer.
    """

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, dropout: float) -> Tensor:
        dropped, mask = torch.native_dropout(x, dropout, True)
        ctx.save_for_backward(x, a, mask)
        ctx.scale = 1 / (1 - dropout)
        return dropped @ a.T

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, a, mask = ctx.saved_tensors
        drop = torch.ops.aten.native_dropout_backward  # x * mask * scale
        grad_a = grad.flatten(0, -2).T @ drop(x, mask, ctx.scale).flatten(0, -2)
        return drop(grad @ a, mask, ctx.scale) if ctx.needs_input_grad[0] else None, grad_a, None


class LoRALinear(nn.Module):
    """A frozen nn.Linear (or GPT-2's Conv1D, whose weight is transposed) plus a trained low-rank term."""

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base, self.scale, self.dropout, self.enabled = base, alpha / rank, dropout, True
        out_size, in_size = base.weight.T.shape if isinstance(base, Conv1D) else base.weight.shape
        # float32 for any base, because bf16 loses small updates; drawn on the CPU: the same on any device
        a = nn.init.kaiming_uniform_(torch.empty(rank, in_size), a=math.sqrt(5))
        self.lora_A = nn.Parameter(a.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out_size, rank, device=base.weight.device))
        self.train(base.training)  # a new module is in training mode, which would switch dropout on

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        shape, x = x.shape[:-1], x.flatten(0, -2)
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype).T
        low = DropoutLinear.apply(x, a, self.dropout) if self.training and self.dropout else x @ a.T
        return self.base(x).addmm_(low, b, alpha=self.scale).view(*shape, -1)  # no second output is made

    @property
    def weight(self) -> Tensor:
        """The base's: some models look at its dtype (Hunyuan's routers)."""
        return self.base.weight

    def delta(self) -> Tensor:
        """(alpha / rank) B A as one matrix, in the layout of the base's weight."""
        delta = self.scale * (self.lora_B @ self.lora_A)
        return delta.T if isinstance(self.base, Conv1D) else delta


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, layer) of every adapted layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def add_lora(
    model: nn.Module, rank: int, alpha: float, dropout: float = 0.0, targets: list[str] | None = None
) -> nn.Module:
    """Freeze `model` and adapt linear layers, in place: all but the head, or those that `targets` name.

    The head `score` of a reward model is trained as it is. A target is a module's full name or its last part
    ("q_proj"). Raises InputError if no layer has that name.
    """
    score = getattr(model, "score", None)
    heads = (getattr(model, "get_output_embeddings", lambda: None)(), score)
    kinds = (nn.Linear, Conv1D)  # no subclass: routers, for one, return other things than x W
    linear = {n: m for n, m in model.named_modules() if type(m) in kinds and m not in heads}
    for target in targets or []:
        if not any(_named(name, [target]) for name in linear):
            real = ", ".join(sorted({name.split(".")[-1] for name in linear}))
            raise InputError(f"{target}: no linear layer to adapt (--lora_targets); this model has {real}")
    if not linear:
        raise InputError("--lora_rank: this model has no linear layer to adapt")
    model.requires_grad_(False)
    if score is not None:
        score.float().requires_grad_(True)
    for name, module in linear.items():
        if targets is None or _named(name, targets):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(module, rank, alpha, dropout))
    return model


def print_share(model: nn.Module) -> None:
    """Print the share of weights that LoRA adapts, if it leaves out experts (3-D, so no linear layers)."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    total = sum(p.numel() for p in frozen.values())
    experts = sum(p.numel() for name, p in frozen.items() if p.ndim == 3 and "experts" in name)
    if experts:
        share = sum(layer.weight.numel() for _, layer in lora_layers(model)) / total
        line = f"LoRA adapts {share:.0%} of the weights; the experts, {experts / total:.0%}, stay as they are"
        print(f"{line} (--lora_rank 0 trains all)")


def _named(name: str, targets: list[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


@contextlib.contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the adapter is off, so the model is the reference policy."""
    layers = [layer for _, layer in lora_layers(model)]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def merge_lora(model: nn.Module) -> nn.Module:
    """Add every low-rank term to its base weight, put the base layers back and unfreeze them, in place.

    model.merged_lora keeps the terms, {layer's name: (A, (alpha / rank) B)}. An adapter that is trained on
    top is saved together with them: PEFT, TRL and vLLM add one adapter to a base, not two.
    """
    model.merged_lora, layers = getattr(model, "merged_lora", {}), list(lora_layers(model))
    for name, layer in layers:
        a, b = model.merged_lora.get(name, (layer.lora_A[:0], layer.lora_B[:, :0]))
        term = torch.cat([a, layer.lora_A]).detach(), torch.cat([b, layer.scale * layer.lora_B], 1).detach()
        model.merged_lora[name] = term
        weight = layer.base.weight
        weight.data = (weight.data.float() + layer.delta().float()).to(weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base)
    return model.requires_grad_(True) if layers else model


def save_lora(model: nn.Module, folder: str | Path, base_model: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which PEFT, TRL and vLLM read.

    If merge_lora put adapters into the base before, they are part of the result, which so is one adapter of
    `base_model` without them: [B1 B2] [A1; A2] = B1 A1 + B2 A2, and the rank is the sum of ranks. Layers that
    lack one of the adapters are filled up with zeros, because all layers have the same rank.

    All processes must call it; rank 0 writes. The weights' metadata holds a checksum that load_lora verifies.
    """
    folder, layers = Path(folder), dict(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA layers to save")
    layer = next(iter(layers.values()))
    terms = {name: [(a, b / layer.scale)] for name, (a, b) in getattr(model, "merged_lora", {}).items()}
    for name, own in layers.items():
        a, b = (full_tensor(part.detach()).cpu() for part in (own.lora_A, own.lora_B))
        terms.setdefault(name, []).append((a, b))
    rank = max(sum(len(a) for a, _ in parts) for parts in terms.values())
    tensors = {}
    for name, parts in terms.items():
        a, b = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], 1)
        zeros = rank - len(a)
        tensors[f"base_model.model.{name}.lora_A.weight"] = F.pad(a, (0, 0, 0, zeros))
        tensors[f"base_model.model.{name}.lora_B.weight"] = F.pad(b, (0, zeros))
    is_reward_model = hasattr(model, "score")
    if is_reward_model:
        tensors[SCORE] = full_tensor(model.score.weight.detach()).cpu()
    # In a mixture of experts, PEFT takes modules with these names for the experts themselves, which are no
    # modules in transformers 5, and drops their weights. It does not mistake names of parameters
    mistaken = set()
    if any("experts" in name for name, _ in model.named_parameters()):
        mistaken = {name for name in terms if name.rsplit(".", 1)[-1] in EXPERT_NAMES}
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_reward_model else "CAUSAL_LM",
        "modules_to_save": ["score"] if is_reward_model else None,
        "base_model_name_or_path": str(base_model),
        "r": rank,
        "lora_alpha": layer.scale * rank,
        "lora_dropout": 0.0 if mistaken else layer.dropout,  # PEFT has no dropout before parameters
        "target_modules": sorted(set(terms) - mistaken),
        "target_parameters": [f"{name}.weight" for name in sorted(mistaken)] or None,
        "fan_in_fan_out": isinstance(layer.base, Conv1D),
        "bias": "none",
        "inference_mode": True,
    }
    if get_rank() == 0:
        write_tensors(folder / "adapter_model.safetensors", tensors, {"sha256": checksum(tensors, config)})
        write_json(folder / "adapter_config.json", config)


def checksum(tensors: dict[str, Tensor], config: dict[str, Any]) -> str:
    """SHA-256 of an adapter's weights and its scale, lora_alpha / r."""
    return digest_tensors(tensors | {"scale": torch.tensor(config["lora_alpha"] / config["r"])})


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The adapter_config.json of a LoRA adapter. Raises InputError if it is damaged or not plain LoRA."""
    path = Path(folder) / "adapter_config.json"
    other = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "layer_replication")
    other += ("alora_invocation_tokens",)
    plain = (None, True, False, "gaussian", "orthogonal")  # initializations that do not change the base
    try:
        config = parse_json(path.read_bytes())
        changed = any(config.get(key) for key in other) or config.get("init_lora_weights") not in plain
        if config["peft_type"] != "LORA" or changed:
            raise InputError(
                f"{path}: only plain LoRA adapters are read (no DoRA, rsLoRA, PiSSA, patterns ...)"
            )
        if config.get("revision") not in (None, "", "main"):
            raise InputError(f"{path}: revision {config['revision']!r} of the base: give a copy without it")
        rank, alpha = config["r"], config["lora_alpha"]
        numbers = type(rank) is int and type(alpha) in (int, float)  # true is an instance of int too
        if not (numbers and rank > 0 and 0 < alpha < math.inf):
            raise InputError(f"{path}: r must be a positive whole number and lora_alpha a positive number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: not a LoRA adapter's configuration: {error!r}") from None
    return config


def find_base(path: str) -> tuple[str, list[str]]:
    """The model that an adapter's folder goes with, and the adapters to merge into it, in this order.

    A base may itself be the folder of an adapter. Any other model is its own base, without adapters.
    """
    adapters, seen = [], set()
    while (Path(path) / "adapter_config.json").is_file():
        adapters.insert(0, path)
        seen.add(Path(path).resolve())
        path = read_adapter_config(path).get("base_model_name_or_path")
        if not isinstance(path, str) or "\0" in path or Path(path).resolve() in seen:
            raise InputError(f"--model {adapters[0]}: base_model_name_or_path {path!r} names no other model")
    return path, adapters


def model_folders(path: str | Path) -> list[Path]:
    """The folders that a model is read from, resolved: its own, or an adapter's base and all adapters.

    A name on the hub has none.
    """
    base, adapters = find_base(str(path))
    return [Path(one).resolve() for one in (base, *adapters) if Path(one).is_dir()]


def load_lora(model: nn.Module, folder: str | Path) -> nn.Module:
    """Add to `model`, in place, an adapter that save_lora or PEFT wrote.

    Raises InputError if the file is damaged or does not fit the model.
    """
    config, path = read_adapter_config(folder), Path(folder) / "adapter_model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
            expected = (file.metadata() or {}).get("sha256")  # PEFT writes none
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise InputError(f"{path}: {key} is {tensor.dtype}; only floats of 16, 32 or 64 bits are read")
        if key == SCORE and hasattr(model, "score") and tensor.shape == model.score.weight.shape:
            model.score.float().weight.data.copy_(tensor)
            continue
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", key)
        if not match:
            raise InputError(f"{path}: unexpected tensor {key}; only lora_A and lora_B weights are read")
        if config["r"] not in tensor.shape:  # before add_lora() makes weights of this rank
            raise InputError(
                f"{path}: {key} is {tuple(tensor.shape)}, but its configuration has r {config['r']}"
            )
        by_layer.setdefault(match[1], {})[match[2]] = tensor
    with error_prefix(path):
        dropout = config.get("lora_dropout") or 0.0
        add_lora(model, config["r"], config["lora_alpha"], dropout, sorted(by_layer))
    for name, layer in lora_layers(model):
        for part in ("lora_A", "lora_B"):
            tensor, weight = by_layer.get(name, {}).get(part), getattr(layer, part)
            if tensor is None or tensor.shape != weight.shape:
                shape = None if tensor is None else tuple(tensor.shape)
                raise InputError(f"{path}: {name}.{part} is {shape}, this model needs {tuple(weight.shape)}")
            weight.data.copy_(tensor)
    if not by_layer:
        raise InputError(f"{path}: holds no lora_A or lora_B weights")
    if expected not in (None, checksum(tensors, config)):
        raise InputError(f"{path}: damaged, or not the weights of its adapter_config.json")
    return model
