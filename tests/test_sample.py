"""Sampling against transformers' logits processors, generate, and exact enumeration."""

import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import CHATML, torchrun
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import chi2
from test_model import BIASED, CONFIGS, TWICE, make
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LogitsProcessorList,
    MambaConfig,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import decode
import sample as sample_file
from decode import Batch, settle
from files import InputError
from model import load_model, pair_stats
from preferences import pack
from sample import draw_global, draw_rows, next_token_probs, sample, sample_global


def streams(seed, count):
    return [np.random.default_rng([seed, number]) for number in range(count)]


@given(
    st.integers(0, 10**6),
    st.floats(0.2, 3.0),
    st.integers(0, 40),
    st.floats(0.05, 1.0),
    st.floats(0.0, 0.9),
    st.sampled_from([4, 1024]),
)
@settings(deadline=None)
def test_next_token_probs_equals_transformers(seed, temperature, top_k, top_p, min_p, nucleus):
    logits = 3 * torch.randn(4, 31, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    steps = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [MinPLogitsWarper(min_p)] if min_p else []
    wanted = LogitsProcessorList(steps)(None, logits).softmax(-1)
    with patch.object(sample_file, "NUCLEUS", nucleus):
        found = next_token_probs(logits, temperature, top_k, top_p, min_p)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)


GREEDY = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2", "gpt_neox", "gpt2"]


@pytest.mark.parametrize("config", [CONFIGS[name] for name in GREEDY], ids=GREEDY)
def test_greedy_equals_generate(config):
    """One prompt, then prompts of unlike lengths in one batch whose texts end at unlike times."""
    model, long = make(config), list(range(5, 25))
    prompts = [long, long[:7], long[3:], long[:1]]
    alone = [
        model.generate(torch.tensor([p]), max_new_tokens=30, do_sample=False, eos_token_id=None)
        for p in prompts
    ]
    alone = [ids[0, len(p) :].tolist() for p, ids in zip(prompts, alone, strict=True)]
    for found in sample(model, long, 3, 30, None, temperature=0):
        assert found.tokens == alone[0]
    ends = [alone[1][4], alone[3][11]]
    owner = [0, 1, 1, 2, 3, 0]
    with patch.object(decode, "PREFILL", 50):  # two prompts a forward pass
        batch = Batch(model, prompts, owner, 30, ends)
    for prompt, found in zip(owner, draw_rows(batch, streams(0, 6), {"temperature": 0}), strict=True):
        text = alone[prompt]
        cut = min((text.index(end) + 1 for end in ends if end in text), default=30)
        assert found.tokens == text[:cut]
        assert found.finish == ("eos" if text[cut - 1] in ends else "length")


@pytest.mark.parametrize("config", (BIASED | TWICE).values(), ids=BIASED | TWICE)
def test_models_whose_layers_are_not_plain_attention(config):
    """Biases by index, sinks, and two attentions a layer go to transformers' cache; no cache is an error."""
    model, prompt = make(config), list(range(5, 25))
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None)
    for found in sample(model, prompt, 3, 10, None, temperature=0):
        assert found.tokens == wanted[0, len(prompt) :].tolist()
    with pytest.raises(InputError, match="one prompt at a time"):
        Batch(model, [prompt, prompt], [0, 1], 10, None)
    with pytest.raises(InputError, match="cannot be sampled"):
        sample(make(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)), prompt, 1, 5, None)


def test_a_prompt_is_kept_once():
    model = make(CONFIGS["llama"])
    batch = Batch(model, [list(range(5, 25))], [0] * 64, 30, None)
    assert {tuple(x.shape) for layer in batch.shared.layers.values() for x in layer[:2]} == {(1, 2, 20, 8)}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=10))
def test_settling_moves_only_what_must_move(parents):
    found = settle(parents)
    assert sorted(found) == sorted(parents)
    for row in range(len(parents)):
        assert (found[row] == row) == (row in parents)


@pytest.fixture(scope="module")
def world():
    """A model of five tokens, a prompt, all texts of up to three tokens, their log-probabilities."""
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
    texts = [t for t in whole if len(t) == 3 or t[-1] == end]
    with torch.no_grad():
        logp = pair_stats(model, pack([(prompt, list(text)) for text in texts])).logp[:, 0].double()
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5)
    return model, prompt, texts, logp


def law_of(drawn, texts):
    """Share of each text among completions."""
    index = {text: i for i, text in enumerate(texts)}
    return torch.tensor([index[tuple(c.tokens)] for c in drawn]).bincount(minlength=len(texts)) / len(drawn)


def test_frequencies_and_log_probabilities_are_the_model_s(world):
    """Every text, by chi-square and by pair_stats."""
    model, prompt, texts, logp = world
    drawn = sample(model, prompt, 20_000, 3, 1, generator=torch.Generator().manual_seed(0))
    known = dict(zip(texts, logp.tolist(), strict=True))
    for completion in drawn:
        assert completion.logp == pytest.approx(known[tuple(completion.tokens)], abs=1e-4)
        assert completion.sampled_logp == pytest.approx(completion.logp, abs=1e-4)
        assert completion.finish == ("eos" if completion.tokens[-1] == 1 else "length")
    expected = logp.exp() * len(drawn)
    statistic = ((law_of(drawn, texts) * len(drawn) - expected) ** 2 / expected).sum().item()
    assert statistic < chi2.ppf(1 - 1e-4, len(texts) - 1)


def test_log_probabilities_equal_pair_stats_where_windows_slide():
    model = make(CONFIGS["gemma3"])
    prompts = [list(range(5, 25)), [7, 8, 9]]
    owner = [0, 1] * 4
    drawn = draw_rows(Batch(model, prompts, owner, 20, 2), streams(0, 8), {})
    with torch.no_grad():
        logp = pair_stats(
            model, pack([(prompts[o], c.tokens) for o, c in zip(owner, drawn, strict=True)])
        ).logp
    assert [c.logp for c in drawn] == pytest.approx(logp[:, 0].tolist(), abs=1e-3)


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


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 4.0])
def test_global_temperature_converges_to_the_exact_law(world, tau):
    model, prompt, texts, logp = world
    exact, log_z = (logp / tau).softmax(0), (logp / tau).logsumexp(0).item()
    distance, error = [], []
    for particles in (16, 128, 1024, 8192):
        runs = []
        for seed in range(3):
            batch = Batch(model, [prompt], [0] * particles, 3, 1)
            runs.append(draw_global(batch, particles, tau, np.random.default_rng(seed), {}))
        distance.append(np.mean([(law_of(drawn, texts) - exact).abs().sum() / 2 for drawn, _, _ in runs]))
        error.append(np.mean([abs(found - log_z) for _, _, found in runs]))
        assert all(0 < ess <= particles * (1 + 1e-9) for _, ess, _ in runs)
    independent = math.sqrt(len(texts) / (2 * math.pi * 8192))  # at most what as many exact draws would give
    assert distance == sorted(distance, reverse=True) and distance[-1] < 1.5 * independent
    assert error[-1] < 0.02
    drawn, _, found = runs[-1]
    known = dict(zip(texts, logp.tolist(), strict=True))
    assert drawn[0].sampled_logp == pytest.approx(known[tuple(drawn[0].tokens)] / tau - found, abs=1e-4)


def test_global_temperature_keeps_to_the_cuts(world):
    """The law is that of the model under the cuts, tempered as a whole."""
    model, prompt, texts, _ = world
    cuts, weight = {"min_p": 0.3}, []
    for text in texts:
        p = 1.0
        for i, token in enumerate(text):
            logits = model(torch.tensor([prompt + list(text[:i])])).logits[:, -1]
            p *= next_token_probs(logits, **cuts)[0, token].item()
        weight.append(p**0.5)
    exact = torch.tensor(weight) / sum(weight)
    batch = Batch(model, [prompt], [0] * 8192, 3, 1)
    drawn, _, log_z = draw_global(batch, 8192, 2.0, np.random.default_rng(0), cuts)
    assert (law_of(drawn, texts) - exact).abs().sum() / 2 < 0.04
    assert log_z == pytest.approx(math.log(sum(weight)), abs=0.02)


def test_global_temperature_1_weighs_nothing_and_few_particles_warn(capsys):
    model = make(CONFIGS["llama"])

    def draw(tau):
        generator = torch.Generator().manual_seed(0)
        return sample_global(
            model, [5, 6, 7], 4, 20, 2, global_temperature=tau, particles=32, generator=generator
        )

    assert draw(1.0) == draw(1.0)
    assert all(c.sampled_logp == pytest.approx(c.logp, abs=1e-4) for c in draw(1.0))
    assert capsys.readouterr().err == ""
    assert np.mean([c.logp for c in draw(0.25)]) > np.mean([c.logp for c in draw(1.0)])
    assert "warning: effective sample size" in capsys.readouterr().err


def test_global_temperature_near_0_is_greedy_and_not_an_underflow():
    model, prompt = make(CONFIGS["llama"]), [5, 6, 7]
    [greedy] = sample(model, prompt, 1, 8, 2, temperature=0)
    assert math.exp(greedy.logp / len(greedy.tokens)) ** 1000 == 0  # p^(1/tau) alone would be
    for completion in sample_global(model, prompt, 4, 8, 2, global_temperature=1e-3, particles=8):
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
def run(sharp_model_folder, tmp_path, monkeypatch):
    """A function that runs sample.py in this process on PROMPTS; gives the output file's bytes."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS * 2))

    def run(*flags, out="out.jsonl"):
        monkeypatch.setattr(
            sys, "argv", ["sample.py", *command(sharp_model_folder, tmp_path, out), *map(str, flags)]
        )
        sample_file.main()
        return (tmp_path / out).read_bytes()

    return run


def command(model, folder, out):
    flags = {"model": model, "prompts": folder / "prompts.jsonl", "out_file": folder / out, "num_samples": 3}
    return [f"--{name}={value}" for name, value in (flags | {"max_new_tokens": 24}).items()]


def read(data):
    return [json.loads(line) for line in data.splitlines()]


def test_the_same_samples_for_any_batch_and_number_of_processes(run, sharp_model_folder, tmp_path):
    rows = {size: read(run("--batch_size", size, "--overwrite")) for size in (1, 7, 64)}
    assert [row["prompt"] for row in rows[1]] == [p for p in PROMPTS * 2 for _ in range(3)]
    for key in ("completion", "tokens", "finish"):
        assert [r[key] for r in rows[1]] == [r[key] for r in rows[7]] == [r[key] for r in rows[64]]
    assert len({row["completion"] for row in rows[1]}) > 20
    done = torchrun("sample.py", *command(sharp_model_folder, tmp_path, "two.jsonl"), "--batch_size", 7)
    assert done.returncode == 0
    assert (tmp_path / "two.jsonl").read_bytes() == run("--batch_size", 7, "--overwrite")


def test_one_process_failing_ends_all_with_its_message(run, sharp_model_folder, tmp_path):
    model = shutil.copytree(sharp_model_folder, tmp_path / "model")
    weights, tokenizer = load_file(model / "model.safetensors"), AutoTokenizer.from_pretrained(model)
    token = tokenizer(PROMPTS[1]).input_ids[-1]  # in the second process's prompt alone
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    done = torchrun("sample.py", *command(model, tmp_path, "two.jsonl"), "--batch_size", 3)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and errors == ["error: the model's log-probabilities are NaN"]


@pytest.mark.parametrize(
    "flags", [(), ("--global_temperature", 1.2, "--particles", 8)], ids=["rows", "particles"]
)
def test_resume_ends_with_the_same_file(run, tmp_path, flags):
    whole = run(*flags, "--batch_size", 6)
    out = tmp_path / "out.jsonl"
    for cut in (0, 10, len(whole) // 3, len(whole) - 5):
        out.write_bytes(whole[:cut])
        assert run(*flags, "--batch_size", 6, "--resume") == whole
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "out.jsonl",
            "out.jsonl.flags.json",
            "prompts.jsonl",
        ]
    assert run(*flags, "--batch_size", 6, "--resume") == whole


def test_resume_refuses_lines_that_it_did_not_write(run, tmp_path):
    out, whole = tmp_path / "out.jsonl", run()
    with pytest.raises(InputError, match="--num_samples 1: the run to --resume had 3"):
        run("--resume", "--num_samples", 1)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(reversed(prompts.read_text().splitlines(keepends=True))))
    with pytest.raises(InputError, match=r"prompts.jsonl: not what the run to --resume was reading"):
        run("--resume")
    (tmp_path / "out.jsonl.flags.json").unlink()
    with pytest.raises(InputError, match=r"no whole out.jsonl.flags.json beside it"):
        run("--resume")
    assert out.read_bytes() == whole


def test_chat_samples_end_where_the_template_closes_a_turn(tiny_model_folder):
    model, tokenizer = load_model(tiny_model_folder)
    tokenizer.chat_template = CHATML
    messages = [{"role": "user", "content": "Hi"}]
    closing = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert sample_file.end_tokens(model, tokenizer, ["Hi"]) == [tokenizer.eos_token_id]
    assert sample_file.end_tokens(model, tokenizer, [messages]) == sorted([tokenizer.eos_token_id, closing])


def test_a_killed_run_resumes(run, sharp_model_folder, tmp_path):
    flags = ["--batch_size", "1", "--max_new_tokens", "60"]
    whole = run(*flags, out="whole.jsonl")
    out = tmp_path / "out.jsonl"
    words = [
        sys.executable,
        sample_file.__file__,
        *command(sharp_model_folder, tmp_path, "out.jsonl"),
        *flags,
    ]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        while not (out.exists() and out.read_bytes().count(b"\n") >= 4):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert 0 < out.stat().st_size < len(whole)
    with pytest.raises(InputError, match=r"--temperature 0.5: the run to --resume had 1.0"):
        run(*flags, "--resume", "--temperature", 0.5)
    assert run(*flags, "--resume") == whole


def test_stop_strings_end_a_text_and_are_cut_off(run):
    stop, plain = read(run("--stop", "e", "ca", "--overwrite")), read(run("--overwrite"))
    assert any(row["finish"] == "stop" for row in stop)
    for a, b in zip(stop, plain, strict=True):
        cut = min((b["completion"].find(s) for s in ("e", "ca") if s in b["completion"]), default=None)
        assert a["completion"] == b["completion"][:cut]
        assert (a["finish"] == "stop") == (cut is not None)
        assert a["tokens"] <= b["tokens"]


def test_formats(run, sharp_model_folder, tmp_path):
    model = shutil.copytree(sharp_model_folder, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(model)
    rows = [{"prompt": [{"role": "user", "content": "Hi"}], "uid": "a1"}, {"prompt": "The fig", "uid": "b2"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {}
    for name in sample_file.FORMATS:
        data = run("--model", model, "--format", name, "--overwrite")
        made[name] = json.loads(data) if name == "alpaca_eval" else read(data)
    texts = [row["completion"] for row in made["jsonl"]]
    assert [row["output"] for row in made["alpaca_eval"]] == texts
    assert [row["instruction"] for row in made["alpaca_eval"]] == ["Hi"] * 3 + ["The fig"] * 3
    assert [row["messages"][-1]["content"] for row in made["messages"]] == texts
    assert [row["messages"][-1]["content"]["answer"] for row in made["arena_hard"]] == texts
    assert [row["uid"] for row in made["arena_hard"]] == ["a1"] * 3 + ["b2"] * 3
    for rows in made.values():
        assert all({"logp", "sampled_logp", "finish"} <= row.keys() for row in rows)
    assert all(row["metadata"].keys() == {"token_len"} for row in made["arena_hard"])
    chat = read(run("--model", model, "--chat", "--overwrite"))
    assert chat[-1]["prompt"] == [{"role": "user", "content": "The fig"}]
    assert chat[-1]["completion"] != texts[-1]


def test_prompts_from_a_text_file_or_the_command_line(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("The fig is\n\nZoë\n", encoding="utf-8")
    rows = read(run("--prompts", tmp_path / "prompts.txt"))
    assert [row["prompt"] for row in rows] == ["The fig is"] * 3 + ["Zoë"] * 3
    capsys.readouterr()
    monkeypatch.setattr(
        sys, "argv", [word for word in sys.argv if "out_file" not in word] + ["--prompt", "Zoë"]
    )
    sample_file.main()
    shown = capsys.readouterr().out
    assert shown.count("--- tokens") == 3
    for row in read(run("--prompt", "Zoë", "--overwrite")):
        assert row["completion"] in shown
