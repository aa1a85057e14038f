"""Questions to a judge, over any endpoint that speaks OpenAI's protocol: vLLM, llama.cpp, OpenAI.

Answers are written to --cache as they arrive and never asked for again. When a request goes wrong:

    time-out, cut connection, malformed body, HTTP 408, 409, 429 or 5xx:  it is sent again, --retries times
    all retries failed, another HTTP 4xx, no rating or verdict in it:     the answer is missing
    HTTP 401, 403, 404, or never a connection, or MAX_FAILURES in a row:  the run stops with an InputError
    HTTP 4xx that names max_tokens or temperature, as OpenAI's newer models refuse them:  it is sent without

Missing answers are counted, never guessed or cached. The next run asks for them again. The same run does
not, because at temperature 0 the same request most likely gets the same answer.
"""

import json
import os
import queue
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, hf_raise_for_status
from tqdm import tqdm

from common.files import InputError, digest_json, parse_json, read_template
from common.flags import Flags, flag, require

Texts = Sequence[str]
BACKOFF = 1.0  # seconds before the first retry, doubled for each further one
MAX_WAIT = 60.0  # seconds, longest wait before a retry, whatever Retry-After asks for
MAX_FAILURES = 10
NO_KEY = "none"  # without a key, huggingface_hub would send a saved Hugging Face token
MIN_SECRET = 8  # characters; a shorter key, such as "EMPTY" for a local server, is no secret
URL = re.compile(r"https?://(\[[\da-fA-F:]+\]|[^\s/:@\[\]?#]+)(:\d{1,5})?(/\S*)?")


@dataclass
class EndpointConfig(Flags):
    """Flags of scripts that ask a judge."""

    endpoint: str = flag("http://localhost:8000/v1", "URL of an OpenAI-compatible endpoint.")
    judge_model: str = flag("gpt-4o-mini-2024-07-18", "Name by which the endpoint knows the judge.")
    api_key_env: str = flag("OPENAI_API_KEY", "Environment variable with the endpoint's key, if any.")
    judge_prompts: str = flag("data/judge", "Folder with the text files of the questions.")
    cache: str = flag("out/judge_cache.jsonl", "File of readable answers: what it has is not asked again.")
    dry_run: bool = flag(False, "Print how many requests would be sent, and send none.")
    timeout: float = flag(60.0, "Seconds to wait before a request is sent again.", "(0, inf)")
    workers: int = flag(8, "Requests side by side.", "[1, 100]")
    retries: int = flag(5, "How often a failed request is sent again.", "[0, 20]")
    max_new_tokens: int = flag(512, "Longest answer of the judge, with its reasoning, in tokens.", "[1, inf)")

    def __post_init__(self) -> None:
        super().__post_init__()
        _read_key(self.api_key_env)
        _check_url("--endpoint", self.endpoint)
        require(self, "judge_model", bool(self.judge_model.strip()), "the name of a model")


def _check_url(name: str, url: str) -> None:
    """Raise InputError, without the password that it may hold, for what is no URL of an endpoint."""
    if not URL.fullmatch(url):
        shown = re.sub(".*@", "...@", url)
        raise InputError(f"{name} {shown}: must be a URL such as http://localhost:8000/v1")


def _read_key(api_key_env: str) -> str:
    """The endpoint's key, or NO_KEY. Raises InputError, without its value, if it cannot be a key."""
    if not re.fullmatch("[A-Z_][A-Z0-9_]*", api_key_env):  # perhaps the key itself: not printed
        raise InputError("--api_key_env: must name an environment variable, in capitals; not the key itself")
    key = os.environ.get(api_key_env, "").strip() or NO_KEY
    if not re.fullmatch(r"[!-~]+", key):
        raise InputError(f"environment variable {api_key_env}: a key has only ASCII characters, no spaces")
    return key


def _scrub(text: str, key: str) -> str:
    """`text` without the key, which a server may echo."""
    return text.replace(key, "[key]") if len(key) >= MIN_SECRET else text


def read_judge_prompt(config: EndpointConfig, name: str, *placeholders: str) -> str:
    """Text of <name>.txt in --judge_prompts. Raises InputError if the file or a placeholder is missing."""
    return read_template(Path(config.judge_prompts) / f"{name}.txt", *placeholders)


# ---- requests


class RequestError(Exception):
    """A request failed for good."""


class RefusedError(RequestError):
    """The endpoint refused this request (HTTP 4xx); another one may succeed."""


def _response_of(error: BaseException | None) -> Any:
    """The HTTP response that an exception, or the one that caused it, carries; None if there is none."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__context__  # hf_raise_for_status itself fails on an error body such as "[]"
    return error.response if error is not None else None


def _delay(response: Any, attempt: int) -> float:
    """Seconds before the next attempt: Retry-After (seconds or a date), else exponential; with jitter."""
    value = response.headers.get("retry-after", "") if response is not None else ""
    try:
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            wait = float(value)
        else:
            wait = parsedate_to_datetime(value).timestamp() - time.time()
        return min(max(wait, 0), MAX_WAIT) + random.uniform(0, BACKOFF)
    except (ValueError, TypeError, OverflowError):  # no Retry-After, or not a date
        return min(BACKOFF * 2**attempt, MAX_WAIT) * random.uniform(0.5, 1)


def _request(send: Callable[[], Any], url: str, api_key_env: str, retries: int, stop: Event) -> Any:
    """Call send(), again after an error that may pass, and return its value. Setting `stop` ends the retries.

    Raises RequestError if the request failed for good, and InputError if every other one would fail too.
    """
    for attempt in range(retries + 1):
        try:
            return send()
        except OfflineModeIsEnabled:
            raise InputError(f"{url}: HF_HUB_OFFLINE forbids all requests; unset it") from None
        # all but HTTPError mean that the body is not JSON or lacks a field
        except (HTTPError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as caught:
            error = caught
        response = _response_of(error)
        status = response.status_code if response is not None else 0
        if status:
            reason = f"HTTP {status} {getattr(error, 'server_message', None) or ''}"
        else:
            reason = str(error) or type(error).__name__ if isinstance(error, HTTPError) else "malformed body"
        reason = " ".join(_scrub(reason, _read_key(api_key_env)).split())[:200]
        if status in (401, 403, 404):
            raise InputError(
                f"{url}: {reason}; check the URL, the model's name and the key in ${api_key_env}"
            )
        if 400 <= status < 500 and status not in (408, 409, 429):
            raise RefusedError(reason)
        if attempt < retries and stop.wait(_delay(response, attempt)):
            break
    if type(error).__name__ == "ConnectError":  # by name: httpx or httpx2, as huggingface_hub's version uses
        raise InputError(f"{url}: cannot connect ({reason}); is the server running?")
    raise RequestError(reason)


def _side_by_side(function: Callable[[str], Any], items: Texts, workers: int) -> Iterator[tuple[str, Any]]:
    """Yield (item, function(item)) as results arrive; an exception that it raised takes the result's place.

    A thread gets its next item only when the caller is done with its last result, so at most `workers`
    results are lost if the process is killed. The threads are daemons: Python waits at exit for those of a
    ThreadPoolExecutor, so Ctrl-C would wait for the requests in flight.
    """
    tasks, results, waiting = queue.SimpleQueue(), queue.SimpleQueue(), iter(items)
    threads = min(workers, len(items))

    def work() -> None:
        while (item := tasks.get()) is not None:
            try:
                results.put((item, function(item)))
            except Exception as error:
                results.put((item, error))

    try:
        for _ in range(threads):
            tasks.put(next(waiting))
            Thread(target=work, daemon=True).start()
        for _ in items:
            yield results.get()
            tasks.put(next(waiting, None))
    finally:
        for _ in range(threads):
            tasks.put(None)


def _look_up(prompts: Texts, config: EndpointConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Return {prompt: answer} for the prompts in the cache and {prompt: digest} for the others, each once.

    Lines that are not JSON are ignored: a killed run may leave half a line. Raises InputError for a file of
    other rows, so that nothing is appended to it.
    """
    path, cached = Path(config.cache), {}
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else (), 1):
        try:
            row = parse_json(line)
        except ValueError:
            continue
        is_answer = isinstance(row, dict) and row.keys() == {"key", "answer"}
        if not (is_answer and all(isinstance(value, str) for value in row.values())):
            raise InputError(f"--cache {path}:{number}: not an answer of a judge; give another file")
        cached[row["key"]] = row["answer"]
    settings = {"model": config.judge_model, "temperature": 0, "max_tokens": config.max_new_tokens}
    digests = {prompt: digest_json({"prompt": prompt} | settings) for prompt in prompts}
    texts = {prompt: cached[digest] for prompt, digest in digests.items() if digest in cached}
    return texts, {prompt: digest for prompt, digest in digests.items() if digest not in cached}


def count_calls(prompts: Texts, config: EndpointConfig) -> int:
    """How many requests ask() would send, without retries: distinct prompts that are not in the cache."""
    return len(_look_up(prompts, config)[1])


def ask(prompts: Texts, parse: Callable[[str], Any], config: EndpointConfig, label: str) -> list[Any]:
    """Send each prompt to the judge; returns parse(answer) for each, None where the answer is missing.

    parse() returns None for an answer that it cannot read. `label` names the progress bar and the warning
    about missing answers. Identical prompts are sent once. Raises InputError as the module's docstring says.
    """
    texts, waiting = _look_up(prompts, config)
    key, stop, first = _read_key(config.api_key_env), Event(), 0  # first: of the forms that the judge takes
    cold, new = {"temperature": 0}, {"max_completion_tokens": config.max_new_tokens}
    forms = [cold | {"max_tokens": config.max_new_tokens}, cold | new, new]
    where = config.endpoint, config.api_key_env, config.retries, stop
    client = InferenceClient(base_url=config.endpoint, api_key=key, timeout=config.timeout)

    def send(prompt: str, form: dict[str, int]) -> str:
        message = [{"role": "user", "content": prompt}]
        output = client.chat_completion(message, model=config.judge_model, extra_body=form)
        text = (output.choices[0].message.content or "").encode(errors="replace")  # half a surrogate pair
        return _scrub(text.decode(), key)

    def request(prompt: str) -> str:
        nonlocal first
        for n in range(first, len(forms)):
            try:
                answer = _request(lambda form=forms[n]: send(prompt, form), *where)
                first = max(first, n)  # not earlier: a refusal may have had another reason
                return answer
            except RefusedError as error:
                if forms[n] is forms[-1] or not re.search("max_tokens|temperature", str(error)):
                    raise

    path, reasons, in_a_row = Path(config.cache), Counter(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(texts) + len(waiting), initial=len(texts), desc=label, unit="answer", disable=None)
    with bar, path.open("ab") as cache:
        if waiting and cache.tell():
            cache.write(b"\n")  # ends the half line that a killed run may have left
        try:
            for prompt, result in _side_by_side(request, list(waiting), config.workers):
                if isinstance(result, RequestError):
                    reasons[str(result)] += 1
                    # once there is an answer, a refusal (HTTP 4xx) says nothing about the other requests
                    in_a_row += not (texts and isinstance(result, RefusedError))
                    if in_a_row == MAX_FAILURES:
                        raise InputError(f"{config.endpoint}: {in_a_row} requests in a row failed: {result}")
                elif isinstance(result, Exception):
                    raise result
                elif parse(result) is None:
                    reasons["unreadable answer"] += 1
                    in_a_row = 0
                else:
                    texts[prompt], in_a_row = result, 0
                    row = {"key": waiting[prompt], "answer": result}
                    cache.write(json.dumps(row).encode() + b"\n")
                    cache.flush()
                    os.fsync(cache.fileno())
                bar.update()
        finally:
            stop.set()
    if forms[first] is new:
        print(f"warning: {label}: the judge refuses temperature 0, so its answers vary", file=sys.stderr)
    if reasons:
        causes = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        missing = f"{reasons.total()} of {bar.total} answers missing"
        print(f"warning: {label}: {missing}: {causes}", file=sys.stderr)
    return [parse(texts[prompt]) if prompt in texts else None for prompt in prompts]


def fetch_embeddings(
    texts: Texts, url: str, model: str, *, api_key_env: str, timeout: float, retries: int
) -> np.ndarray:
    """Embeddings of texts from POST {url}/embeddings, in batches of 32; float32, (len(texts), d).

    Requests are sent again as in ask(). Raises InputError if one fails for good: no embedding may be missing.
    """
    _check_url("--embeddings_url", url)
    headers, arrays = {"authorization": f"Bearer {_read_key(api_key_env)}"}, []

    def send() -> np.ndarray:
        body, address = {"model": model, "input": batch}, f"{url.rstrip('/')}/embeddings"
        response = get_session().post(address, json=body, headers=headers, timeout=timeout)
        hf_raise_for_status(response)
        rows = {row["index"]: row["embedding"] for row in response.json()["data"]}
        array = np.array([rows[i] for i in range(len(batch))], dtype=np.float32)
        if array.ndim != 2 or not np.isfinite(array).all():
            raise ValueError("not a list of vectors")
        return array

    for first in tqdm(range(0, len(texts), 32), desc="embeddings", unit="batch", disable=None):
        batch = list(texts[first : first + 32])  # text-embeddings-inference takes no more, by default
        try:
            arrays.append(_request(send, url, api_key_env, retries, Event()))
        except RequestError as error:
            raise InputError(f"{url}: no embeddings of texts {first} and following: {error}") from None
    return np.concatenate(arrays)
