"""What is done for a GPU, as far as it shows without one: a meta tensor stands for a tensor on a GPU.

bench/gpu.py checks the rest, on a GPU.
"""

import contextlib
import json

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from common import logs, parallel
from common.checkpoint import load_checkpoint, save_checkpoint
from common.files import InputError
from core import attention, checks, trainer
from core.attention import RowAttention, attention_rule, block_mask, compile_once, dense, dense_masks, flex
from core.lora import add_lora
from core.model import pair_stats
from core.pairs import Pair, pack
from tiny import CONFIGS, make, make_pairs

CUDA, PAIRS = torch.device("cuda", 0), make_pairs()


def test_a_row_is_moved_before_fsdp_sees_it_and_only_once():
    """FSDP moves the forward's arguments to the GPU, tensor by tensor; a tensor there cannot be pinned."""
    model, seen = make(CONFIGS["llama"]).to("meta"), []
    model.packed_forward = lambda packed, entropy: seen.append(packed)
    pair_stats(model, pack(PAIRS))
    assert {x.device.type for x in seen[0][:7]} == {"meta"} and seen[0].to(torch.device("meta")) is seen[0]


def test_a_restored_optimizer_counts_its_steps_on_the_weights_device(tmp_path):
    """AdamW(fused=True) refuses a count on the CPU."""
    model = add_lora(make(CONFIGS["llama"]), 2, 2.0)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights)
    sum(p.sum() for p in weights).backward()
    optimizer.step()
    save_checkpoint(tmp_path / "checkpoint", 1, {}, model, optimizer, 1)
    path = tmp_path / "checkpoint" / "000001"
    state, on_gpu = json.loads((path / "state.json").read_bytes()), model.to("meta")
    optimizer = torch.optim.AdamW(p for p in on_gpu.parameters() if p.requires_grad)
    load_checkpoint(path, state, on_gpu, optimizer)
    found = [(name, x.device.type) for values in optimizer.state.values() for name, x in values.items()]
    assert set(found) == {(name, "meta") for name in ("step", "exp_avg", "exp_avg_sq")}


def test_short_rows_keep_off_the_kernel_for_decoding(monkeypatch):
    """It does not compile for rows under 128 tokens with grouped heads."""
    seen = []
    monkeypatch.setattr(attention, "flex_attention", lambda *_, **options: seen.append(options))
    flex(*torch.zeros(3, 1, 4, 18, 16), None, 1.0, None)
    assert seen[0]["kernel_options"]["FORCE_USE_FLEX_ATTENTION"]


def test_torch_2_11_compiles_too(monkeypatch):
    """Its torch.compile has no recompile_limit; the configuration has."""

    def compile(model, *, fullgraph=False, dynamic=None, backend="inductor", mode=None, options=None):
        return model

    monkeypatch.setattr(torch, "compile", compile)
    with torch._dynamo.config.patch(recompile_limit=8):
        assert compile_once(len) is len and compile_once(sum, dynamic=True) is sum
        assert torch._dynamo.config.recompile_limit == 64


# ---- FlexAttention


def test_block_masks_equal_create_block_mask_s():
    rng = np.random.default_rng(0)
    for _ in range(10):
        lengths = rng.integers(1, 300, (int(rng.integers(1, 5)), 3)).tolist()
        packed = pack([Pair(*([3] * n for n in pair)) for pair in lengths])
        size = len(packed.ids)
        for window in (None, 50):
            rule = attention_rule(packed, window)
            wanted = create_block_mask(rule, None, None, size, size, device="cpu")
            found = block_mask(packed, window)
            assert torch.equal(found.to_dense(), wanted.to_dense())
            assert (found.seq_lengths, found.BLOCK_SIZE) == (wanted.seq_lengths, wanted.BLOCK_SIZE)
            for side in ("kv", "q", "full_kv", "full_q"):
                counts = [getattr(mask, f"{side}_num_blocks")[0, 0] for mask in (found, wanted)]
                assert torch.equal(*counts)
                lists = [getattr(mask, f"{side}_indices")[0, 0] for mask in (found, wanted)]
                for row, count in enumerate(counts[0].tolist()):
                    assert torch.equal(*(some[row, :count] for some in lists))


def test_where_flex_attention_does_not_compile_the_dense_masks_serve(monkeypatch, capsys):
    """The CPU is such a place: FlexAttention has no backward pass there."""
    monkeypatch.setattr(attention, "COMPILES", {})
    packed = pack(PAIRS)
    qkv = torch.randn(3, 1, 2, len(packed.ids), 16)
    wanted = dense(*qkv, packed.lengths, dense_masks(packed, None), 0.25, None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.ndim == 4))  # queries, keys and values
    monkeypatch.setattr(attention, "compile_once", lambda function: function)
    attend = RowAttention(packed)
    for _ in range(2):
        assert torch.equal(attend(None, *qkv, scale=0.25, window=None, softcap=None), wanted)
    error = capsys.readouterr().err
    assert error.startswith("warning: FlexAttention does not compile here") and error.count("\n") == 1
    monkeypatch.setattr(attention, "flex_compiles", lambda *_: pytest.fail("tried"))
    RowAttention(packed, "dense")(None, *qkv, scale=0.25, window=None, softcap=None)


# ---- processes and memory


def test_gradients_are_summed_in_buckets(monkeypatch):
    sizes = []

    def double(flat):
        sizes.append(len(flat))
        flat *= 2

    monkeypatch.setattr(parallel, "BUCKET", 10)
    monkeypatch.setattr(parallel, "get_world_size", lambda: 2)
    monkeypatch.setattr(parallel.dist, "all_reduce", double)
    weights = [torch.nn.Parameter(torch.zeros(n, 2)) for n in (1, 4, 9, 2, 2, 3)]
    for number, weight in enumerate(weights[1:], 1):  # the first has no gradient
        weight.grad = torch.full_like(weight, number)
    parallel.all_reduce_gradients(weights)
    assert sizes == [8, 18, 8, 6]
    assert [weight.grad.unique().tolist() for weight in weights[1:]] == [[2], [4], [6], [8], [10]]


def test_micro_batches_grow_with_the_gpu_s_memory(monkeypatch):
    class Properties:
        total_memory = 48e9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    assert trainer.default_micro_batch_tokens(torch.device("cpu")) == 512
    assert trainer.default_micro_batch_tokens(CUDA) == 2048
    Properties.total_memory = 85e9
    assert trainer.default_micro_batch_tokens(CUDA) == 8192


@pytest.mark.parametrize("dtype, fits", [("float32", False), ("bfloat16", True)])
def test_the_host_s_memory_must_hold_what_each_process_loads(tiny_model_folder, monkeypatch, dtype, fits):
    """Weights in their files' dtype, here float32 on a host that cannot hold them, are mapped: no load."""
    config = trainer.TrainConfig(model=str(tiny_model_folder), lora_rank=2, dtype="float32")
    config.parallel, config.dtype = "fsdp", "bfloat16" if dtype == "float32" else "float32"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1e12, 1e12))
    monkeypatch.setattr(checks.os, "sysconf", lambda name: 1)
    with contextlib.nullcontext() if fits else pytest.raises(InputError, match="on the host has 0 GB"):
        checks.check_memory(config, CUDA)


@pytest.mark.parametrize(
    "build, smi, visible, words",
    [
        ("13.0", None, None, "finds none"),
        (None, "/usr/bin/nvidia-smi", None, "made for CPUs"),
        ("13.0", "/usr/bin/nvidia-smi", "", None),  # hidden on purpose
        (None, None, None, None),
    ],
)
def test_training_on_the_cpu_by_mistake_is_said_aloud(monkeypatch, capsys, build, smi, visible, words):
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(logs.shutil, "which", lambda _: smi)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    logs.print_device(torch.device("cpu"), "float32")
    out, error = capsys.readouterr()
    assert out == f"cpu, float32, torch {torch.__version__}\n"
    assert (words in error and error.startswith("WARNING: training ON THE CPU")) if words else not error
