"""--compile, of sample.py and of training: the same results, from code that is compiled for all steps."""

import copy
import importlib
import itertools
from functools import cache, partial

import pytest
import torch
from torch._dynamo.utils import counters

from common.files import ROOT, InputError
from core import attention, decode, trainer
from core import model as model_py
from core.checks import check_compile
from core.lora import add_lora
from core.model import pair_stats, wrap_layers
from core.pairs import pack
from sample import sample_completions
from scripts import SOCIETY, train
from tiny import CONFIGS, first_pairs, make, make_pairs

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [9, 4], [7, 7, 30]]  # of unequal length: shorter ones are masked
ENDS = list(range(0, 97, 9))  # so many end tokens that completions leave the batch at different steps


@pytest.fixture
def backend(monkeypatch):
    """Sets the backend of torch.compile; the default one needs a C++ compiler."""

    def use(backend):
        monkeypatch.setattr(decode, "compile_once", cache(partial(torch.compile, backend=backend)))
        monkeypatch.setattr(model_py, "compiled", partial(torch.compile, backend=backend))
        torch._dynamo.reset()
        counters.clear()

    return use


def sample(model, compiled):
    by_prompt = sample_completions(model, PROMPTS, [[0], [1], [2]], 4, 24, ENDS, 5, compile=compiled)
    return list(itertools.chain(*by_prompt))


def test_samples_are_those_without_compile(backend):
    backend("eager")  # how often code is compiled does not depend on the backend
    config = copy.deepcopy(CONFIGS["gemma2"])  # grouped heads, a layer with a window and one without, caps
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    model = make(config)
    wanted, found = sample(model, False), sample(model, True)
    assert len({len(c.tokens) for c in wanted}) > 2
    assert [c.tokens for c in found] == [c.tokens for c in wanted]
    assert [c.logp for c in found] == pytest.approx([c.logp for c in wanted], abs=1e-4)
    # variants: one completion or several, a grid or none, masks or none, window reached or not
    assert 1 <= counters["stats"]["unique_graphs"] <= 8
    graphs = counters["stats"]["unique_graphs"]
    sample(model, True)
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_compiler_s_failure_is_one_clear_error(backend):
    def fail(*_):
        raise OSError("no C++ compiler")

    backend(fail)
    with pytest.raises(InputError, match=r"--compile: torch\.compile failed: "):
        sample(make(CONFIGS["llama"]), True)


def test_compiled_layers_have_the_same_values_and_gradients(backend, monkeypatch):
    backend("aot_eager")
    config = copy.deepcopy(CONFIGS["gemma2"])
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    plain, model = make(config), make(config)
    for one in (plain, model):
        torch.manual_seed(1)
        add_lora(one, 4, 8.0)
    made, make_masks = [], attention.dense_masks
    monkeypatch.setattr(attention, "dense_masks", lambda *args: made.append(args[1]) or make_masks(*args))
    rows, graphs = [pack([pair]) for pair in make_pairs()], []
    pair_stats(model, rows[0])
    wrap_layers(model.model.layers, compile=True, checkpoint_activations=True)
    made.clear()
    for row in rows:
        for one in (plain, model):
            stats = pair_stats(one, row, entropy=True)
            (stats.logp[:, 0].sum() - stats.entropy.sum()).backward()
        for ours, wanted in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, wanted.grad, atol=1e-5, rtol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] >= 2 and graphs[1] == graphs[2] and not counters["graph_break"]
    assert sorted(made, key=str) == [config.sliding_window] * 6 + [None] * 6  # by no compiled layer


@pytest.mark.parametrize("script", ["train_dpl", "train_rl"])
def test_compiled_training_is_that_without_it(backend, tmp_path, monkeypatch, script):
    backend("eager")
    compiled, compile_layer = [], model_py.compiled
    monkeypatch.setattr(model_py, "compiled", lambda f: compiled.append(f) or compile_layer(f))
    monkeypatch.setattr(trainer, "check_compile", lambda model: None)  # which refuses the CPU
    flags = {"model": SOCIETY, "data": first_pairs("test", 6, tmp_path / "rows.jsonl"), "lora_dropout": 0.0}
    flags |= {"lr": 1e-3, "log_every": 1, "max_steps": 2, "batch_size": 3, "micro_batch_tokens": 1}
    if script == "train_rl":
        flags |= {"data": ROOT / "data/society/prompts.jsonl", "num_samples": 2, "max_new_tokens": 8}
    plain, ours = (
        train(importlib.import_module(script), out_dir=tmp_path / f"{compile}", compile=compile, **flags)
        for compile in (False, True)
    )
    assert compiled and counters["stats"]["unique_graphs"] >= 2
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in plain], abs=1e-4)


def test_layers_that_do_not_compile_are_one_clear_error(backend):
    def fail(*_):
        raise OSError("no C++ compiler")

    backend(fail)
    model = make(CONFIGS["llama"])
    pair_stats(model, pack(make_pairs()))
    with pytest.raises(InputError, match=r"^--compile: needs FlexAttention"):
        check_compile(model)
    wrap_layers(model.model.layers, compile=True, checkpoint_activations=False)
    model.mask_kinds = ()
    with pytest.raises(InputError, match=r"^--compile: torch\.compile failed: "):
        check_compile(model)
