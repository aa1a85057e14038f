"""sample.py --compile: the samples are those without it, and the code is compiled for all steps at once."""

import copy
import itertools
from functools import cache, partial

import pytest
import torch
from torch._dynamo.utils import counters

import decode
from common.files import InputError
from sample import sample_completions
from tiny import CONFIGS, make

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [9, 4], [7, 7, 30]]  # of unequal length: shorter ones are masked
ENDS = list(range(0, 97, 9))  # so many end tokens that completions leave the batch at different steps


@pytest.fixture
def backend(monkeypatch):
    """Sets the backend of torch.compile; the default one needs a C++ compiler."""

    def use(backend):
        monkeypatch.setattr(decode, "compile_once", cache(partial(torch.compile, backend=backend)))
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
