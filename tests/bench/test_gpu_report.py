"""bench/gpu.py: a wrong result fails its case, and a case that fails, hangs or crashes stops no other."""

import importlib
import os
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

from common.files import ROOT
from common.flags import parse
from core import attention
from scripts import call
from train_dpl import DPLConfig
from train_reward import RewardConfig


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("gpu")


def run(gpu, folder, **flags):
    """Run the script; returns its exit code and its report."""
    with pytest.raises(SystemExit) as exit:
        call(gpu, out_file=folder / "gpu.md", **flags)
    return exit.value.code, (folder / "gpu.md").read_text()


def test_every_other_case_is_reported(gpu, monkeypatch, tmp_path):
    """The first case of each part fails in its own way; the real case after it passes."""
    code = "import sys; print('warning: slow', file=sys.stderr); sys.exit('out of luck')"
    failing = {
        "attention": partial(int, "no number"),
        "architectures": partial(subprocess.run, [sys.executable, "-c", code], check=True),
        "7B training": os.abort,
    }
    passing = {}
    for part, failure in failing.items():
        passing[part] = list(gpu.PARTS[part])[1]
        cases = {"first": failure, passing[part]: gpu.PARTS[part][passing[part]]}
        monkeypatch.setitem(gpu.PARTS, part, cases)
    code, report = run(gpu, tmp_path, parts=[*failing])
    title, *parts = report.split("\n## ")
    assert code == 1 and f"torch {torch.__version__}" in title
    for part, text in zip(failing, parts, strict=True):
        assert text.startswith(f"{part}\n\n- first: FAILED: ")
        [line] = [line for line in text.splitlines() if line.startswith(f"- {passing[part]}: ")]
        assert "FAILED" not in line and line.endswith(" s)")
    assert "ValueError: invalid literal for int() with base 10: 'no number' (" in parts[0]
    assert "CalledProcessError: " in parts[1] and "\n\n      warning: slow\n      out of luck\n" in parts[1]
    assert "  - warning: slow\n" in parts[1]
    assert "its process died with exit code -6 (" in parts[2] and " in _serve\n" in parts[2]
    assert report.endswith("\nfailed: attention: first; architectures: first; 7B training: first\n")
    written = (tmp_path / "gpu.stderr").read_text()
    assert "Traceback" in written and "Fatal Python error: Aborted" in written


@pytest.mark.parametrize("name", ["ADAPTER", "REWARD", "ALL"])
def test_a_case_trains_with_the_flags_that_it_names(gpu, name, monkeypatch, tmp_path):
    """They come last: of a flag that is given twice, also in an @file, the last counts."""
    commands = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda words, **_: commands.append(words))
    with pytest.raises(FileNotFoundError):  # no metrics.jsonl
        gpu.train(tmp_path / "run", (*getattr(gpu, name), *gpu.BFLOAT16), False, 1)
    [(_, script, *words)] = commands
    config = {"train_dpl.py": DPLConfig, "train_reward.py": RewardConfig}[script]
    flags = parse(config, None, words)
    assert (flags.lora_rank == 0) == (name == "ALL") and flags.dtype == "bfloat16"


def test_a_report_is_never_replaced(gpu, monkeypatch, tmp_path):
    for part in ("one", "two"):
        monkeypatch.setattr(gpu, "PARTS", {part: {}})
        code, report = run(gpu, tmp_path)
        assert code == 0 and report.endswith(f"\n## {part}\n\n\nfailed: nothing\n")
    assert report.count(": no GPU") == 2 and "## one\n" in report


def test_a_case_that_hangs(gpu, tmp_path):
    began = time.monotonic()
    call = gpu.guard(tmp_path / "stderr", 0.1)
    succeeded, result, _ = call(partial(time.sleep, 600))
    assert not succeeded and result == "no answer in 0 s" and time.monotonic() - began < 60


def test_unknown_parts_are_refused(gpu, refused):
    refused(gpu, ["--parts", "attention", "atention"], "--parts atention", "attention, training")


def test_wrong_results_fail(gpu, monkeypatch):
    """Attention to nothing, no window, and losses that differ by 1%."""
    assert "1 graphs; rows of 18 tokens" in gpu.attention((18,), 16, 2)
    monkeypatch.setattr(gpu, "flex", lambda query, *_: query)
    with pytest.raises(AssertionError, match=r"1 of 1 lengths: 18 tokens: AssertionError: forward differs"):
        gpu.attention((18,), 16, 2)

    assert "texts differ by" in gpu.architecture("mistral", torch.float32)
    rule = attention.attention_rule
    monkeypatch.setattr(attention, "attention_rule", lambda packed, _: rule(packed, None))
    with pytest.raises(AssertionError, match="texts differ by"):
        gpu.architecture("mistral", torch.float32)

    losses = np.array([0.6, 0.5])
    monkeypatch.setattr(gpu, "cpu_losses", lambda *_: losses)
    monkeypatch.setattr(gpu, "train", lambda *_: losses * 1.01)
    with pytest.raises(AssertionError, match=r"largest difference of a loss from the CPU's: 6.0e-03"):
        gpu.training((), ())
    assert gpu.training((), ("--dtype", "bfloat16")).endswith("6.0e-03")


def test_rows_have_the_length_that_is_asked_for(gpu):
    for tokens in (18, 64, 599, 1201, 2047):
        pairs = gpu.make_pairs(tokens, np.random.default_rng(0), 512)
        assert len(gpu.pack(pairs).ids) == tokens
