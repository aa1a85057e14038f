"""Sampling against transformers' logits processors, generate, and exact enumeration."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from test_model import CONFIGS, make
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model import pair_stats
from preferences import pack
from sample import next_token_probs, sample


@given(
    st.integers(0, 10**6),
    st.floats(0.2, 3.0),
    st.integers(0, 40),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.9),
)
@settings(deadline=None)
def test_next_token_probs_equals_transformers(seed, temperature, top_k, top_p, min_p):
    logits = 3 * torch.randn(4, 31, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    steps = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [MinPLogitsWarper(min_p)] if min_p else []
    wanted = LogitsProcessorList(steps)(None, logits).softmax(-1)
    found = next_token_probs(logits, temperature, top_k, top_p, min_p)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma3", "gpt_neox", "gpt2"])
def test_greedy_equals_generate(name):
    model = make(CONFIGS[name])
    prompt = list(range(5, 25))
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=2)
    for found in sample(model, prompt, 3, 30, 2, temperature=0):
        assert found.tokens == wanted[0, len(prompt) :].tolist()


def test_frequencies_and_log_probabilities_are_the_model_s():
    """Every sequence of up to three tokens over a vocabulary of five, by chi-square and by pair_stats."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    model, prompt, end = make(config), [3, 4], 1
    whole = [t for n in (1, 2, 3) for t in itertools.product(range(5), repeat=n) if end not in t[:-1]]
    texts = [list(t) for t in whole if len(t) == 3 or t[-1] == end]
    with torch.no_grad():
        logp = pair_stats(model, pack([(prompt, text) for text in texts])).logp[:, 0]
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5)

    drawn = sample(model, prompt, 20_000, 3, end, generator=torch.Generator().manual_seed(0))
    index = {tuple(text): i for i, text in enumerate(texts)}
    counts = torch.zeros(len(texts))
    for completion in drawn:
        i = index[tuple(completion.tokens)]
        counts[i] += 1
        assert completion.logp == pytest.approx(logp[i].item(), abs=1e-4)
        assert completion.sampled_logp == pytest.approx(completion.logp, abs=1e-4)
        assert completion.finish == ("eos" if completion.tokens[-1] == end else "length")
    expected = logp.exp() * len(drawn)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic < chi2.ppf(1 - 1e-4, len(texts) - 1)


def test_the_sampling_law_s_log_probability_follows_the_cuts():
    model, prompt = make(CONFIGS["llama"]), [5, 6, 7]
    law = {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05}
    for completion in sample(model, prompt, 4, 6, 2, generator=torch.Generator().manual_seed(3), **law):
        total, ids = 0.0, prompt
        for token in completion.tokens:
            logits = model(torch.tensor([ids])).logits[:, -1]
            total += math.log(next_token_probs(logits, **law)[0, token].item())
            ids = ids + [token]
        assert completion.sampled_logp == pytest.approx(total, abs=1e-3)
