"""Sampling against transformers' logits processors, generate, and exact enumeration."""

import copy
import importlib
import itertools
import json
import math
import shutil
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import chi2
from transformers import AutoTokenizer, LlamaConfig

from common.encode import encode_prompts, end_tokens
from common.files import InputError
from core import decode, kv_cache
from core.decode import Batch, exponential_noise, gumbel_max, keep_in_place
from core.hub import load_model
from core.model import pair_stats
from core.pairs import pack
from sample import next_token_probs, sample, sample_completions, sample_global_batch
from scripts import SOCIETY, call, run_script
from tiny import CHATML, CONFIGS, NOT_PACKABLE, REASONS, TWICE, lines, make


@given(
    st.integers(0, 10**6),
    st.floats(0.2, 3.0),
    st.integers(0, 40),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.9),
    st.sampled_from([4, 1024]),
)
def test_next_token_probs_equals_transformers(seed, temperature, top_k, top_p, min_p, nucleus):
    logits = 3 * torch.randn(4, 31, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    steps = [transformers.TemperatureLogitsWarper(temperature)]
    steps += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    steps += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [transformers.MinPLogitsWarper(min_p)] if min_p else []
    wanted = transformers.LogitsProcessorList(steps)(None, logits).softmax(-1)
    with patch.object(decode, "NUCLEUS", nucleus):
        probs = next_token_probs(logits, temperature, top_k, top_p, min_p)
    torch.testing.assert_close(probs, wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("vocab", [5, 128, 300])
def test_gumbel_max_samples_in_proportion_to_probs(vocab):
    probs = torch.rand(vocab, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    count, rng = 40_000, np.random.default_rng(0)
    tokens = gumbel_max(probs.expand(count, -1), exponential_noise(rng, count, vocab))
    expected = probs / probs.sum() * count
    statistic = ((tokens.bincount(minlength=vocab) - expected) ** 2 / expected).sum().item()
    assert statistic < chi2.ppf(1 - 1e-4, vocab - 1)


GREEDY = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "gpt_neox", "gpt2"]
GREEDY = {name: CONFIGS[name] for name in GREEDY} | TWICE


@pytest.mark.parametrize("config", GREEDY.values(), ids=GREEDY)
def test_greedy_equals_generate(config):
    """One prompt, then prompts of different lengths whose completions end at different steps."""
    model, long = make(config), list(range(5, 25))
    prompts = [long, long[:7], long[3:], long[:1]]
    alone, options = [], {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    for prompt in prompts:
        alone.append(model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist())
    for completion in sample(model, long, 3, 30, None, temperature=0):
        assert completion.tokens == alone[0]
    ends = [alone[1][4], alone[3][11]]
    prompts, alone, seeds = prompts * 2, alone * 2, [[i] for i in range(8)]
    for batch_size in (2, 5, 16):  # places of ended completions go to others of this prompt, or of the next
        with patch.object(decode, "PREFILL", 50):  # two prompts per forward pass
            drawn = sample_completions(model, prompts, seeds, 2, 30, ends, batch_size, temperature=0)
            for tokens, completions in zip(alone, drawn, strict=True):
                length = min((tokens.index(end) + 1 for end in ends if end in tokens), default=30)
                assert [c.tokens for c in completions] == [tokens[:length]] * 2
                finish = "eos" if tokens[length - 1] in ends else "length"
                assert [c.finish for c in completions] == [finish] * 2


@pytest.mark.parametrize("name", NOT_PACKABLE)
def test_models_that_are_more_than_attention_by_position_are_refused(name):
    reason = REASONS.get(name, "(it|its|only|probabilities) ")
    model = make(NOT_PACKABLE[name])
    for _ in range(2):  # also at the second attempt
        with pytest.raises(InputError, match=rf"^\w+ForCausalLM cannot be sampled: {reason}"):
            sample(model, list(range(5, 25)), 3, 10, None)


def test_the_cache_stores_a_prompt_once():
    model = make(CONFIGS["llama"])
    batch = Batch(model, [list(range(5, 25))], [0] * 64, 30, None)
    assert {tuple(x.shape) for layer in batch.cache.layers for x in layer[:2]} == {(1, 2, 20, 8)}


def test_completions_that_need_more_room_get_it(monkeypatch):
    model = make(CONFIGS["gemma2"])
    draw = lambda: sample(model, [5, 7, 9], 7, 50, [0], seed=3)  # noqa: E731
    wanted = draw()
    monkeypatch.setattr(kv_cache, "NEW_TOKENS", 3)
    assert [c.tokens for c in draw()] == [c.tokens for c in wanted]
    assert max(len(c.tokens) for c in wanted) == 50


def test_a_copy_of_a_model_that_was_sampled_has_its_own_head():
    model = make(CONFIGS["llama"])
    sample(model, [5, 7], 1, 2, None)
    copied = copy.deepcopy(model)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    assert copied(torch.tensor([[5, 7]])).logits.any()


@pytest.mark.parametrize("num_samples", [1, 3, 177])
def test_steps_are_full_until_the_last_are_started(num_samples):
    model, sizes, batches = make(CONFIGS["llama"]), [], []

    class Spy(Batch):
        def append(self, token, probs):
            batches.append(self)
            sizes.append((self.active, self.started))
            return super().append(token, probs)

    prompts = [[5 + i % 40, 7] * (1 + i % 5) for i in range(177 // num_samples)]
    with patch.dict(sample_completions.__globals__, Batch=Spy):
        seeds = [[i] for i in range(len(prompts))]
        by_prompt = list(sample_completions(model, prompts, seeds, num_samples, 40, list(range(8)), 32))
    lengths = [len(c.tokens) for completions in by_prompt for c in completions]
    assert len(lengths) == 177 and sum(n for n, _ in sizes) == sum(lengths) and len(set(lengths)) > 10
    while_some_wait = [n for n, started in sizes if started < 177]
    assert len(while_some_wait) > 40 and min(while_some_wait) == 31  # two that wait share a pass
    # prompts whose turn is over make room for others; the longest ones still run
    assert len(batches[0].cache.layers[0][0]) <= 32 + 2


@given(st.lists(st.integers(0, 9), min_size=1, max_size=10))
def test_keep_in_place_permutes_and_leaves_every_index_it_can_in_its_place(indices):
    result = keep_in_place(indices)
    assert sorted(result) == sorted(indices)
    for i in range(len(indices)):
        assert (result[i] == i) == (i in indices)


@pytest.fixture(scope="module")
def enumerated():
    """A model of five tokens, a prompt, all completions of up to three tokens, their log-probabilities."""
    sizes = {"vocab_size": 5, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, bos_token_id=0, eos_token_id=1)
    model, prompt, end = make(config), [3, 4], 1
    texts = [t for n in (1, 2, 3) for t in itertools.product(range(5), repeat=n) if end not in t[:-1]]
    texts = [t for t in texts if len(t) == 3 or t[-1] == end]
    with torch.no_grad():
        logp = pair_stats(model, pack([(prompt, list(text)) for text in texts])).logp[:, 0].double()
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5)
    return model, prompt, texts, logp


def frequencies(completions, texts):
    """Relative frequency of each text among completions."""
    index = {text: i for i, text in enumerate(texts)}
    counts = torch.tensor([index[tuple(c.tokens)] for c in completions]).bincount(minlength=len(texts))
    return counts / len(completions)


def test_frequencies_and_log_probabilities_are_the_model_s(enumerated):
    """Every text, by chi-square and by pair_stats."""
    model, prompt, texts, logp = enumerated
    completions = sample(model, prompt, 20_000, 3, 1)
    for completion in completions:
        expected = logp[texts.index(tuple(completion.tokens))].item()
        assert completion.logp == pytest.approx(expected, abs=1e-4)
        assert completion.sampled_logp == pytest.approx(completion.logp, abs=1e-4)
        assert completion.finish == ("eos" if completion.tokens[-1] == 1 else "length")
    count, expected = len(completions), logp.exp() * len(completions)
    statistic = ((frequencies(completions, texts) * count - expected) ** 2 / expected).sum().item()
    assert statistic < chi2.ppf(1 - 1e-4, len(texts) - 1)


def test_log_probabilities_equal_pair_stats_where_windows_slide():
    model, prompts = make(CONFIGS["gemma3"]), [list(range(5, 25)), [7, 8, 9], [9, 8]]
    by_prompt = list(sample_completions(model, prompts, [[0], [1], [2]], 4, 20, list(range(8)), 5))
    assert len({len(c.tokens) for completions in by_prompt for c in completions}) > 3
    for prompt, completions in zip(prompts, by_prompt, strict=True):
        with torch.no_grad():
            logp = pair_stats(model, pack([(prompt, c.tokens) for c in completions])).logp
        assert [c.logp for c in completions] == pytest.approx(logp[:, 0].tolist(), abs=1e-3)


def test_sampled_logp_follows_the_sampling_parameters():
    model, prompt = make(CONFIGS["llama"]), [5, 6, 7]
    params = {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.05}
    for completion in sample(model, prompt, 4, 6, 2, seed=3, **params):
        total, ids = 0.0, prompt
        for token in completion.tokens:
            logits = model(torch.tensor([ids])).logits[:, -1]
            total += math.log(next_token_probs(logits, **params)[0, token].item())
            ids = ids + [token]
        assert completion.sampled_logp == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 4.0])
def test_global_temperature_converges_to_the_exact_distribution(enumerated, tau):
    model, prompt, texts, logp = enumerated
    exact, exact_log_z = (logp / tau).softmax(0), (logp / tau).logsumexp(0).item()
    distance, error = [], []
    for particles in (16, 128, 1024, 8192):
        runs = []
        for seed in range(3):
            batch = Batch(model, [prompt], [0] * particles, 3, 1)
            runs.append(sample_global_batch(batch, particles, tau, np.random.default_rng(seed)))
        distance.append(np.mean([(frequencies(c, texts) - exact).abs().sum() / 2 for c, _, _ in runs]))
        error.append(np.mean([abs(log_z - exact_log_z) for _, _, log_z in runs]))
        assert all(0 < ess <= particles * (1 + 1e-9) for _, ess, _ in runs)
    independent = math.sqrt(len(texts) / (2 * math.pi * 8192))  # bound on the distance of 8192 exact samples
    assert distance == sorted(distance, reverse=True) and distance[-1] < 1.5 * independent
    assert error[-1] < 0.02
    [first, *_], _, log_z = runs[-1]
    expected = logp[texts.index(tuple(first.tokens))].item() / tau - log_z
    assert first.sampled_logp == pytest.approx(expected, abs=1e-4)


def test_global_temperature_comes_after_truncation(enumerated):
    """It samples p(y)^(1/tau) / Z where p is the truncated model."""
    model, prompt, texts, _ = enumerated
    weights = []
    for text in texts:
        p = 1.0
        for i, token in enumerate(text):
            logits = model(torch.tensor([prompt + list(text[:i])])).logits[:, -1]
            p *= next_token_probs(logits, min_p=0.3)[0, token].item()
        weights.append(p**0.5)
    exact = torch.tensor(weights) / sum(weights)
    batch = Batch(model, [prompt], [0] * 8192, 3, 1)
    completions, _, log_z = sample_global_batch(batch, 8192, 2.0, np.random.default_rng(0), min_p=0.3)
    assert (frequencies(completions, texts) - exact).abs().sum() / 2 < 0.04
    assert log_z == pytest.approx(math.log(sum(weights)), abs=0.02)


def test_global_temperature_1_leaves_weights_even():
    model, options = make(CONFIGS["llama"]), {"global_temperature": 1.0, "particles": 32}
    first, second = (sample(model, [5, 6, 7], 4, 20, 2, **options) for _ in range(2))
    assert first == second
    assert [c.sampled_logp for c in first] == pytest.approx([c.logp for c in first], abs=1e-4)


def test_a_low_effective_sample_size_warns_with_advice_that_helps(capsys):
    """Above tau = 1 without truncation, broken texts that descend from one particle outweigh all others."""
    model, tokenizer = load_model(SOCIETY)
    [prompt] = encode_prompts(["Write a story about a doctor.\n"], tokenizer)

    def run(tau, model=model, prompt=prompt, **params):
        batch = Batch(model, [prompt], [0] * 32, 48, tokenizer.eos_token_id)
        ess = sample_global_batch(batch, 4, tau, np.random.default_rng(0), **params)[1]
        return ess, capsys.readouterr().err

    assert run(2.0)[1] == "warning: effective sample size 1.0 of 32: give --min_p 0.01\n"
    ess, warning = run(2.0, min_p=0.01)
    assert ess > 30 and warning == ""
    warning = run(0.25, make(CONFIGS["llama"]), [5, 6, 7])[1]
    assert "of 32: give more --particles, or a --global_temperature nearer 1" in warning


def test_global_temperature_near_0_is_greedy_and_not_an_underflow():
    model, prompt = make(CONFIGS["llama"]), [5, 6, 7]
    [greedy] = sample(model, prompt, 1, 8, 2, temperature=0)
    assert math.exp(greedy.logp / len(greedy.tokens)) ** 1000 == 0  # p^(1/tau) alone would be
    for completion in sample(model, prompt, 4, 8, 2, global_temperature=1e-3, particles=8):
        assert completion.tokens == greedy.tokens


PROMPTS = ["The fig is", "A grey cat likes warm bread? My friend", "Zoë", "Every baker does not want"]


@pytest.fixture(scope="module")
def sharp_model_folder(tiny_model_folder, tmp_path_factory):
    """The tiny model, its weights five times as large, so that what it writes depends on its prompt."""
    folder = shutil.copytree(tiny_model_folder, tmp_path_factory.mktemp("sharp") / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({name: 5 * w for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def run(sharp_model_folder, tmp_path):
    """A function that runs sample.py in this process on PROMPTS and returns the output file's bytes."""
    (tmp_path / "prompts.jsonl").write_bytes(lines(*({"prompt": prompt} for prompt in PROMPTS * 2)))

    def run(*flags, out="out.jsonl"):
        call("sample.py", *command(sharp_model_folder, tmp_path, out), *flags)
        return out and (tmp_path / out).read_bytes()

    return run


def command(model, folder, out):
    flags = {"model": model, "prompts": folder / "prompts.jsonl", "num_samples": 3, "max_new_tokens": 24}
    flags |= {"out_file": folder / out} if out else {}
    return [f"--{name}={value}" for name, value in flags.items()]


def read(data):
    return [json.loads(line) for line in data.splitlines()]


def same(a, b):
    """Whether rows are the same, but for the rounding of log-probabilities."""
    return len(a) == len(b) and all(
        {k: v if "logp" not in k else pytest.approx(v, abs=3e-4) for k, v in x.items()} == y
        for x, y in zip(a, b, strict=True)
    )


def test_the_same_samples_for_any_batch_and_number_of_processes(run, sharp_model_folder, tmp_path):
    rows = {size: read(run("--batch_size", size, "--overwrite")) for size in (1, 7, 64)}
    assert [row["prompt"] for row in rows[1]] == [p for p in PROMPTS * 2 for _ in range(3)]
    assert same(rows[1], rows[7]) and same(rows[1], rows[64])
    assert len({row["completion"] for row in rows[1]}) > 20
    words = command(sharp_model_folder, tmp_path, "two.jsonl")
    codes, *_ = run_script(2, "sample.py", *words, "--batch_size", 7)
    assert codes == [0, 0]
    assert same(read((tmp_path / "two.jsonl").read_bytes()), rows[7])


def test_one_process_failing_ends_all_with_its_message(run, sharp_model_folder, tmp_path):
    model = shutil.copytree(sharp_model_folder, tmp_path / "model")
    weights, tokenizer = load_file(model / "model.safetensors"), AutoTokenizer.from_pretrained(model)
    token = tokenizer(PROMPTS[1]).input_ids[-1]  # in the second process's prompt alone
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    codes, _, stderr = run_script(2, "sample.py", *command(model, tmp_path, "two.jsonl"), "--batch_size", 3)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert any(codes) and errors == ["error: the model's log-probabilities are NaN"]


@pytest.mark.parametrize("flags", [(), ("--global_temperature", 1.2, "--particles", 8)])
def test_resume_ends_with_the_same_file(run, tmp_path, monkeypatch, flags):
    whole = run(*flags, "--batch_size", 6)
    out, asked = tmp_path / "out.jsonl", []  # asked: how many prompts are sampled
    script = importlib.import_module("sample")  # that call() runs
    honest = script.sample_prompts
    monkeypatch.setattr(script, "sample_prompts", lambda *a: asked.append(len(a[3])) or honest(*a))
    for cut in (0, 10, len(whole) // 3, len(whole) - 5):
        out.write_bytes(whole[:cut])
        assert same(read(run(*flags, "--batch_size", 4, "--resume")), read(whole))
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"out.jsonl", "out.jsonl.flags.json", "prompts.jsonl"}
    whole = out.read_bytes()
    assert run(*flags, "--batch_size", 4, "--resume") == whole
    assert asked[:2] == [8, 8] and 8 > asked[2] > asked[3] > asked[4] == 0


def test_truncation_to_one_token_is_greedy_and_the_seed_counts(run):
    texts = lambda *flags: [row["completion"] for row in read(run("--overwrite", *flags))]  # noqa: E731
    greedy = texts("--temperature", 0)
    for flag, value in (("--top_k", 1), ("--top_p", 1e-6), ("--min_p", 1)):
        assert texts(flag, value) == greedy
    assert greedy != texts() != texts("--seed", 1)


def test_resume_refuses_lines_that_it_did_not_write(run, tmp_path):
    out, whole = tmp_path / "out.jsonl", run()
    with pytest.raises(InputError, match="--num_samples 1: the run to --resume had 3"):
        run("--resume", "--num_samples", 1)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(reversed(prompts.read_text().splitlines(keepends=True))))
    with pytest.raises(InputError, match=r"prompts.jsonl: not what the run to --resume had"):
        run("--resume")
    (tmp_path / "out.jsonl.flags.json").unlink()
    with pytest.raises(InputError, match=r"out.jsonl.flags.json: missing or damaged"):
        run("--resume")
    assert out.read_bytes() == whole


def test_resume_refuses_a_model_that_was_trained_again(run, sharp_model_folder, tmp_path):
    model = shutil.copytree(sharp_model_folder, tmp_path / "model")
    run("--model", model)
    weights = load_file(model / "model.safetensors")
    save_file({name: w / 2 for name, w in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"--model .*model: not what the run to --resume had"):
        run("--model", model, "--resume")


def test_chat_samples_end_where_the_template_closes_a_turn(tiny_model_folder):
    model, tokenizer = load_model(tiny_model_folder)
    tokenizer.chat_template = CHATML
    eos, closing = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_tokens(model, tokenizer, ["Hi"]) == [eos]
    assert end_tokens(model, tokenizer, [[{"role": "user", "content": "Hi"}]]) == sorted([eos, closing])


def test_stop_strings_end_a_text_and_are_cut_off(run):
    stop, plain = read(run("--stop", "e", "ca", "--overwrite")), read(run("--overwrite"))
    assert any(row["finish"] == "stop" for row in stop)
    for a, b in zip(stop, plain, strict=True):
        cut = min((b["completion"].find(s) for s in ("e", "ca") if s in b["completion"]), default=None)
        assert a["completion"] == b["completion"][:cut]
        assert (a["finish"] == "stop") == (cut is not None)
        assert a["tokens"] <= b["tokens"]


def test_chat_puts_strings_into_the_template(run, sharp_model_folder, tmp_path):
    model = shutil.copytree(sharp_model_folder, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    plain = read(run("--model", model))
    chat = read(run("--model", model, "--chat", "--overwrite"))
    assert chat[-1]["prompt"] == [{"role": "user", "content": plain[-1]["prompt"]}]
    # a column that has the name of something here is a row's own, and what the template gets is written
    rows = [{"prompt": p, "options": ["a"], "chat_template_kwargs": {"x": 1}} for p in PROMPTS * 2]
    (tmp_path / "prompts.jsonl").write_bytes(lines(*rows))
    assert read(run("--model", model, "--chat", "--overwrite")) == [
        row | {"chat_template_kwargs": {"x": 1}} for row in chat
    ]
    assert chat[-1]["completion"] != plain[-1]["completion"]


def test_prompts_from_a_text_file_or_the_command_line(run, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("The fig is\n\nZoë\n", encoding="utf-8")
    rows = read(run("--prompts", tmp_path / "prompts.txt"))
    assert [row["prompt"] for row in rows] == ["The fig is"] * 3 + ["Zoë"] * 3
    rows = read(run("--prompt", "Zoë", "--overwrite"))
    capsys.readouterr()
    run("--prompt", "Zoë", out=None)
    shown = capsys.readouterr().out
    assert shown.count("--- tokens") == 3 and all(row["completion"] in shown for row in rows)


def test_samples_of_a_run_go_into_its_folder_by_default(run, sharp_model_folder, tmp_path, monkeypatch):
    expected = run()
    model = shutil.copytree(sharp_model_folder, tmp_path / "run")
    (model / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    run("--model", model, out=None)
    run(out=None)
    for out in (model / "samples.jsonl", tmp_path / "samples.jsonl"):
        assert out.read_bytes() == expected
