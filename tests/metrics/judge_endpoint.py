"""A server on this machine with an OpenAI-compatible interface that misbehaves as a script tells it to."""

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint(ThreadingHTTPServer):
    """Answers prompt p with script[p], one action a request, and then with answer(p); logs every request.

    A request with a parameter of `refused`, {parameter: message}, gets HTTP 400 with that message. `bodies`
    are the parameters of all others.

    An action is a text to answer with, seconds to sleep before answer(p), a tuple (status, headers, body),
    "cut" for half a body, or "drop" for no response at all. The prompt of a request for embeddings is
    "embeddings". `active` and `peak` are numbers of requests side by side, `done` is that of full responses.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.script, self.log, self.keys, self.done, self.active, self.peak = {}, [], set(), 0, 0, 0
        self.refused, self.bodies = {}, []
        self.answer = lambda prompt: "Rating: 4\nThey differ."
        self.delay, self.lock = 0, threading.Lock()

    def handle_error(self, *_):
        """A client that gave up waiting is no error."""

    def requests(self):
        """How often each prompt was sent."""
        return Counter(prompt for _, prompt in self.log)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        server, start = self.server, time.time()
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][0]["content"] if "messages" in body else "embeddings"
        refusals = [message for name, message in server.refused.items() if name in body]
        with server.lock:
            server.log.append((start, prompt))
            server.keys.add(self.headers["authorization"])
            server.active += 1
            server.peak = max(server.peak, server.active)
            actions = server.script.get(prompt)
            action = actions.pop(0) if actions else server.delay
            if refusals:
                action = (400, {}, json.dumps({"error": {"message": refusals[0]}}))
            else:
                server.bodies.append({x: body[x] for x in body if x not in ("messages", "input", "stream")})
        if isinstance(action, int | float):
            time.sleep(action)
            action = "ok" if prompt == "embeddings" else server.answer(prompt)
        if prompt == "embeddings" and action == "ok":
            vectors = [[len(text), text.count("e"), 1] for text in body["input"]]
            rows = [{"index": i, "embedding": vector} for i, vector in enumerate(vectors)]
            action = (200, {}, json.dumps({"data": rows[::-1]}))
        elif isinstance(action, str) and action not in ("cut", "drop"):
            message = {"role": "assistant", "content": action}
            action = (200, {}, json.dumps({"choices": [{"index": 0, "message": message}]}))
        with server.lock:  # before the response: the client's next request may come at once
            server.active -= 1
        if action == "drop":
            self.close_connection = True
            return
        cut = action == "cut"
        status, headers, text = (200, {}, '{"choices": [{"message": ') if cut else action
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(text.encode()) * (1 + cut)))
        self.end_headers()
        self.wfile.write(text.encode())
        self.close_connection = cut
        server.done += 1


@contextlib.contextmanager
def serving():
    """An Endpoint that serves in a thread of its own."""
    with Endpoint() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
