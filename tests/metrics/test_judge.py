"""The judge: an endpoint that misbehaves, the cache across kills, the key, and what is asked and read."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from judge_endpoint import serving

from common.files import ROOT, InputError, digest_json
from metrics import endpoint as judge
from metrics.endpoint import EndpointConfig, ask, count_calls, fetch_embeddings
from metrics.judge import rate_pools, rating
from metrics.winrate import compare, pair_prompts, verdict

KEY = "sk-secret-0123456789"
ECHO = json.dumps({"error": {"message": f"wrong key {KEY}", "header": f"Bearer {KEY}"}})


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(judge, "BACKOFF", 0.02)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving() as server:
        yield server


@pytest.fixture
def config(endpoint, tmp_path):
    flags = {"endpoint": endpoint.url, "judge_model": "judge", "api_key_env": "JUDGE_KEY", "timeout": 0.4}
    return EndpointConfig(**flags, workers=4, retries=2, cache=str(tmp_path / "cache" / "answers.jsonl"))


def cached_answers(path):
    return [json.loads(line)["answer"] for line in open(path) if line.strip()]


def assert_no_key(folder, captured):
    assert KEY not in captured.out + captured.err
    assert not any(KEY in path.read_text() for path in folder.rglob("*") if path.is_file())


# ---- an endpoint that misbehaves

RECOVERS = {  # one failure, then an answer
    "429": [(429, {"Retry-After": "0"}, "slow down")],
    "500": [(500, {}, ECHO)],
    "503 with a body that huggingface_hub cannot describe": [(503, {}, "[]")],
    "408, 409": [(408, {}, ""), (409, {}, "")],
    "time-out": [1.0],
    "cut": ["cut"],
    "dropped": ["drop"],
    "no JSON": [(200, {}, "<html>busy</html>")],
    "no choices": [(200, {}, '{"error": "overloaded"}')],
    "a number": [(200, {}, '{"choices": [{"message": {"content": 5}}]}')],
    "empty choices, list": [(200, {}, '{"choices": []}'), (200, {}, "[]")],
}
STAYS_MISSING = {  # the requests that it gets
    "prose": (["They differ, I think."], 1),
    "out of range": (["Rating: 7"], 1),
    "empty": ([""], 1),
    "null": ([(200, {}, '{"choices": [{"message": {"content": null}}]}')], 1),
    "400": ([(400, {}, ECHO)], 1),
    "422": ([(422, {}, ECHO)], 1),
    "500 for ever": ([(500, {}, ECHO)] * 3, 3),
}


def test_every_request_of_a_misbehaving_endpoint_is_accounted_for(endpoint, config, tmp_path, capfd):
    missing = {prompt: list(actions) for prompt, (actions, _) in STAYS_MISSING.items()}
    half = {"good": ["Rating: 4 \ud83d"]}  # half a surrogate pair
    endpoint.script = {prompt: list(actions) for prompt, actions in RECOVERS.items()} | missing | half
    prompts = ["good", *RECOVERS, *STAYS_MISSING, "good"]
    expected = [None if prompt in STAYS_MISSING else 4 for prompt in prompts]
    assert ask(prompts, rating, config, "diversity") == expected
    requests = {prompt: len(actions) + 1 for prompt, actions in RECOVERS.items()}
    requests |= {"good": 1} | {prompt: count for prompt, (_, count) in STAYS_MISSING.items()}
    assert endpoint.requests() == requests
    assert len(cached_answers(config.cache)) == len(RECOVERS) + 1
    captured = capfd.readouterr()
    assert "warning: diversity: 7 of 19 answers missing: 4 x unreadable answer" in captured.err
    assert_no_key(tmp_path, captured)
    assert endpoint.keys == {f"Bearer {KEY}"}

    endpoint.log.clear()  # the scripts have been used up: a second run gets what was missing, and only that
    assert count_calls(prompts, config) == len(STAYS_MISSING)
    assert ask(prompts, rating, config, "diversity") == [4] * len(prompts)
    assert endpoint.requests() == dict.fromkeys(STAYS_MISSING, 1)
    assert count_calls(prompts, config) == 0


def test_retry_after_is_honoured(endpoint, config):
    endpoint.script = {"busy": [(429, {"Retry-After": "1"}, "")]}
    assert ask(["busy"], rating, config, "") == [4]
    (first, _), (second, _) = endpoint.log
    assert 1 <= second - first < 1.9


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("7", 7, 7.02),
        ("0.5", 0.5, 0.52),
        ("3600", 60, 60.02),
        (20, 1, 20.02),  # a date that many seconds from now
        (-20, 0, 0.02),
        ("soon", 0.08, 0.16),
        ("nan", 0.08, 0.16),
        ("", 0.08, 0.16),
    ],
)
def test_delay_is_retry_after_or_exponential_and_bounded(monkeypatch, value, low, high):
    monkeypatch.setattr(judge, "BACKOFF", 0.02)
    if isinstance(value, int):
        value = formatdate(time.time() + value, usegmt=True)
    assert low <= judge._delay(SimpleNamespace(headers={"retry-after": value}), attempt=3) <= high


def test_workers_bound_the_requests_side_by_side(endpoint, config):
    endpoint.delay = 0.05
    assert ask([f"p{i}" for i in range(20)], rating, config, "") == [4] * 20
    assert endpoint.peak == config.workers


@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize("body", [ECHO, "[]", f"no {KEY} here"])
def test_a_status_that_every_request_would_get_stops_the_run(endpoint, config, tmp_path, capfd, status, body):
    endpoint.script = {f"p{i}": [(status, {}, body)] for i in range(30)}
    with pytest.raises(InputError, match=f"{endpoint.url}: HTTP {status}.*JUDGE_KEY") as error:
        ask(list(endpoint.script), rating, config, "")
    assert 1 <= len(endpoint.log) <= config.workers
    assert KEY not in str(error.value)
    assert_no_key(tmp_path, capfd.readouterr())


def test_an_endpoint_that_is_not_there_stops_the_run(endpoint, config):
    endpoint.shutdown()
    endpoint.server_close()
    with pytest.raises(InputError, match=f"{endpoint.url}: cannot connect .*is the server running"):
        ask([f"p{i}" for i in range(30)], rating, config, "")


@pytest.mark.parametrize("status", [400, 500])
def test_an_endpoint_that_only_fails_stops_the_run(endpoint, config, status):
    endpoint.script = {f"p{i}": [(status, {}, "no luck")] * 3 for i in range(30)}
    with pytest.raises(InputError, match=f"10 requests in a row failed: HTTP {status} no luck"):
        ask(list(endpoint.script), rating, config, "")
    assert len(endpoint.requests()) <= 10 + config.workers


@pytest.mark.parametrize(("status", "in_a_row"), [(400, 19), (500, 9)])
def test_failures_among_answers_do_not_stop_the_run(endpoint, config, status, in_a_row):
    config.workers = 1  # in order
    failing = [f"p{i}" for i in range(2 * in_a_row + 1) if i != in_a_row]
    endpoint.script = {prompt: [(status, {}, "")] * 3 for prompt in failing}
    prompts = ["good", *failing[:in_a_row], "fine", *failing[in_a_row:]]
    assert ask(prompts, rating, config, "") == [4, *[None] * in_a_row] * 2


def test_no_request_is_sent_again_after_the_run_stopped(endpoint, config):
    busy = [(503, {"Retry-After": "0.3"}, "")] * 3
    endpoint.script = {"p1": list(busy), "p2": list(busy), "p3": [(401, {}, "")]}
    with pytest.raises(InputError, match="HTTP 401"):
        ask(list(endpoint.script), rating, config, "")
    time.sleep(0.5)
    assert endpoint.requests() == dict.fromkeys(endpoint.script, 1)


NO_MAX_TOKENS = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
NO_COLD = "Unsupported value: 'temperature' does not support 0. Only the default (1) value is supported."


@pytest.mark.parametrize(
    ("refused", "left"),
    [
        ({}, {"temperature": 0, "max_tokens": 512}),
        ({"max_tokens": NO_MAX_TOKENS}, {"temperature": 0, "max_completion_tokens": 512}),
        ({"max_tokens": NO_MAX_TOKENS, "temperature": NO_COLD}, {"max_completion_tokens": 512}),
        ({"temperature": NO_COLD}, {"max_completion_tokens": 512}),
    ],
)
def test_a_judge_that_refuses_a_parameter_is_asked_without(endpoint, config, capfd, refused, left):
    prompts, config.workers, config.retries = [f"p{i}" for i in range(30)], 2, 0
    endpoint.refused = refused
    assert ask(prompts, rating, config, "") == [4] * 30
    assert endpoint.bodies == [{"model": "judge"} | left] * 30
    assert len(endpoint.log) <= 30 + 2 * 2  # each worker learns it once at most
    assert ("refuses temperature 0" in capfd.readouterr().err) == ("temperature" in refused)
    assert count_calls(prompts, config) == 0


def test_a_refusal_for_another_reason_changes_no_other_request(endpoint, config):
    config.workers = 1
    endpoint.script = {"long": [(400, {}, "max_tokens is too large: the prompt has 9,000 tokens")] * 3}
    assert ask(["long", "p"], rating, config, "") == [None, 4]
    assert endpoint.bodies[-1] == {"model": "judge", "temperature": 0, "max_tokens": 512}
    assert endpoint.requests() == {"long": 3, "p": 1}


def test_an_old_cache_is_read(config, endpoint):
    """The key of an answer is the digest of these fields, whatever the judge is sent."""
    digest = digest_json({"prompt": "p", "model": "judge", "temperature": 0, "max_tokens": 512})
    Path(config.cache).parent.mkdir()
    Path(config.cache).write_text(json.dumps({"key": digest, "answer": "Rating: 2"}) + "\n")
    assert ask(["p"], rating, config, "") == [2] and not endpoint.log


def test_offline_mode_is_explained(endpoint, config, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        ask(["p"], rating, config, "")


# ---- the key


@pytest.mark.parametrize("value", [None, "", "  "])
def test_without_a_key_no_saved_token_is_sent(endpoint, config, monkeypatch, value):
    monkeypatch.setenv("HF_TOKEN", "hf_saved")
    monkeypatch.delenv("JUDGE_KEY") if value is None else monkeypatch.setenv("JUDGE_KEY", value)
    assert ask(["p"], rating, config, "") == [4]
    fetch_embeddings(["p"], endpoint.url, "m", api_key_env="JUDGE_KEY", timeout=1, retries=0)
    assert endpoint.keys == {"Bearer none"}


def test_a_key_in_an_answer_is_not_cached(endpoint, config, tmp_path, capfd):
    endpoint.answer = lambda prompt: f"Rating: 2 {KEY}"
    assert ask(["p"], rating, config, "") == [2]
    assert cached_answers(config.cache) == ["Rating: 2 [key]"]
    assert_no_key(tmp_path, capfd.readouterr())


def test_a_key_of_no_secret_does_not_change_answers(endpoint, config, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "A")
    endpoint.answer = lambda prompt: "[[A]]"
    assert ask(["p"], verdict, config, "") == ["A"]


def test_a_key_in_place_of_its_variable_is_not_printed(monkeypatch):
    for key in (KEY, "hf_AbCdEf0123456789"):
        with pytest.raises(InputError) as error:
            EndpointConfig(api_key_env=key)
        assert key not in str(error.value)
    monkeypatch.setenv("JUDGE_KEY", KEY + " é")
    with pytest.raises(InputError, match="JUDGE_KEY") as error:
        EndpointConfig(api_key_env="JUDGE_KEY")
    assert KEY not in str(error.value)


# ---- the cache

SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
from metrics.endpoint import EndpointConfig, ask
from metrics.judge import rating
prompts = [f"p{i}" for i in range(30)]
ask(prompts, rating, EndpointConfig(sys.argv[1], "judge", cache=sys.argv[2], workers=4, timeout=30), "")
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_sends_no_cached_prompt_again(endpoint, config, kill):
    prompts = [f"p{i}" for i in range(30)]
    endpoint.delay = 0.05
    if kill == signal.SIGINT:
        endpoint.script = {f"p{i}": [20.0] for i in range(12, 30)}  # Ctrl-C must not wait for these
    command = [sys.executable, "-c", SCRIPT, endpoint.url, config.cache]
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    while endpoint.done < 12:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    time.sleep(0.2 if kill == signal.SIGINT else 0)
    process.send_signal(kill)
    process.communicate(timeout=15)
    time.sleep(0.2)
    first, in_cache = endpoint.requests(), count_calls(prompts, config)
    assert set(first.values()) == {1} and 12 <= len(first) < 30
    lost = len(first) - (30 - in_cache)  # sent, but in flight when the run was killed
    assert 0 <= lost <= config.workers
    if kill == signal.SIGINT:
        assert 30 - in_cache == 12
    endpoint.log.clear()
    endpoint.script, endpoint.delay = {}, 0
    assert ask(prompts, rating, config, "") == [4] * 30
    second = endpoint.requests()
    assert set(second.values()) == {1} and len(second) == in_cache
    assert len(first.keys() & second.keys()) == lost
    assert len(cached_answers(config.cache)) == 30


def test_half_a_line_is_ignored_and_spoils_no_other(endpoint, config):
    ask(["p0", "p1"], rating, config, "")
    with open(config.cache, "rb+") as file:
        file.truncate(os.path.getsize(config.cache) - 9)
    endpoint.log.clear()
    assert ask(["p0", "p1", "p2"], rating, config, "") == [4] * 3
    assert len(endpoint.log) == 2
    assert count_calls(["p0", "p1", "p2"], config) == 0


def test_a_file_of_other_rows_is_no_cache(endpoint, config, data):
    before, config.cache = data.read_bytes(), str(data)
    with pytest.raises(InputError, match=f"--cache {data}:1: not an answer"):
        ask(["p"], rating, config, "")
    assert data.read_bytes() == before and not endpoint.log


@pytest.mark.parametrize(("flag", "value"), [("judge_model", "other"), ("max_new_tokens", 7)])
def test_another_model_or_setting_is_asked_anew(endpoint, config, flag, value):
    ask(["p"], rating, config, "")
    setattr(config, flag, value)
    assert count_calls(["p"], config) == 1
    config.endpoint = "http://another.example/v1"  # is no setting of the judge
    assert count_calls(["p"], config) == 1


# ---- what is asked and read


def test_pools_are_consecutive_and_a_remainder_is_dropped(endpoint, config):
    def answer(question):
        responses = "".join(re.findall(r"<response \d>\n(\w)\n</response", question))
        agreement = {"ab": "Rating: 5", "cd": "Rating: 1", "ef": "?", "xy": "Rating: 3", "zz": "Rating: 4"}
        return agreement[responses] if len(responses) == 2 else f"Rating: {1 + 'a|e|x'.index(responses[0])}"

    endpoint.answer = answer
    ratings, counts = rate_pools(["Q1 {responses}", "Q2"], [list("abcdefg"), list("xyzz")], config)
    assert ratings["logical"] == [[0, 4], [2, 1]]
    for metric in ("content", "surface_form", "perspective"):
        assert ratings[metric] == [[1], [5]]
        assert counts[metric] == {"asked": 2, "missing": 0}
    assert counts["logical"] == {"asked": 5, "missing": 1}
    assert all("Q1 {responses}" in prompt or "\nQ2\n" in prompt for prompt in endpoint.requests())


def test_comparisons_are_asked_in_both_orders(endpoint, config):
    def answer(question):  # by the answer shown as A
        a = re.search(r"<answer A>\n(\w+)", question)[1]
        return {"good": "[[B]] no, [[A]]", "bad": "[[B]]", "same": "[[C]]"}.get(a, "[[A]]")

    endpoint.answer = answer
    first, second = ["good", "bad", "same", "biased"], ["bad", "good", "same", "position"]
    assert compare(["Q"] * 4, first, second, config) == (["A", "B", "tie", "A"], ["A", "B", "tie", "B"])
    assert len(endpoint.log) == 5  # each distinct question once


def test_prompt_files_are_the_users_to_replace(config, tmp_path):
    config.judge_prompts = str(tmp_path)
    (tmp_path / "pairwise.txt").write_text("{prompt}|{answer_a}|{answer_b}|{x}")
    questions = pair_prompts(["{answer_a}"], ["{prompt}{"], ["\\1"], config)
    assert questions == ["{answer_a}|{prompt}{|\\1|{x}", "{answer_a}|\\1|{prompt}{|{x}"]
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'logical.txt'}: no such file")):
        rate_pools(["Q"], [["a", "b"]], config)
    (tmp_path / "logical.txt").write_text("{prompt} {response}")
    with pytest.raises(InputError, match=r"logical\.txt: the placeholder \{responses\} is missing"):
        rate_pools(["Q"], [["a", "b"]], config)


# ---- embeddings


def test_embeddings_come_in_order_after_retries(endpoint):
    endpoint.script = {"embeddings": [(500, {}, ""), "ok", (200, {}, '{"data": []}'), "cut"]}
    texts = ["x" * i + "e" * (i % 7) for i in range(130)]
    arguments = {"api_key_env": "JUDGE_KEY", "timeout": 1, "retries": 2}
    array = fetch_embeddings(texts, endpoint.url + "/", "model", **arguments)
    assert array.dtype == np.float32
    assert array.tolist() == [[i + i % 7, i % 7, 1] for i in range(130)]
    assert len(endpoint.log) == 8 and endpoint.keys == {f"Bearer {KEY}"}  # five batches, three retries
    for script, message in (
        ([(500, {}, ECHO)] * 3, "no embeddings of texts 0 and following: HTTP 500"),
        ([(400, {}, ECHO)], "no embeddings of texts 0 and following: HTTP 400"),
        ([(401, {}, ECHO)], "HTTP 401"),
    ):
        endpoint.script = {"embeddings": script}
        with pytest.raises(InputError, match=message) as error:
            fetch_embeddings(texts, endpoint.url, "model", **arguments)
        assert not script and KEY not in str(error.value)
