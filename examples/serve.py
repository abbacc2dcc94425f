"""A small web server, with nothing but the standard library around `generate`.

python examples/serve.py --port 8000
curl localhost:8000/generate -d '{"prompt": "Mia has 12 apples . ... How many apples now ?"}'

Every request is decoded in a thread of its own, all on one model: each answer is that of a call alone. On a GPU their
steps take turns. A decode ends with its current forward when its client hangs up or the server is stopped. There is no
batching and no limit on the requests at a time, so put nothing of the kind before strangers.
"""

from __future__ import annotations

import argparse
import json
import select
import signal
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from decode import encode, load
from torch import Tensor

import fdpp
from fdpp import tiny
from fdpp.models.language_model import DiffusionLM

MOST_BYTES = 1 << 20
SECONDS = 10
"""How long a client may take to send what it said it would."""
FIELDS = {"prompt", "max_new_tokens"}


class BadRequestError(ValueError):
    """Something that the client can put right."""


class UnwantedError(Exception):
    """Nobody waits for this answer any more."""


def read(body: bytes) -> dict[str, Any]:
    """The request's fields, checked as far as `generate` does not."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"expected JSON, got {body[:40]!r}: {error}") from error
    if not isinstance(request, dict) or not isinstance(request.get("prompt"), str) or not request["prompt"].strip():
        raise BadRequestError('expected an object with a "prompt" that is a text and not empty')
    if not request["prompt"].isascii():
        try:
            request["prompt"].encode()
        except UnicodeEncodeError as error:
            raise BadRequestError(f'"prompt": expected a text, got half a character: {error}') from error
    unknown = request.keys() - FIELDS
    if unknown:
        raise BadRequestError(f"expected no fields but {sorted(FIELDS)}, got {sorted(unknown)}")
    return request


class Wanted:
    """A streamer that looks after every forward whether anybody still waits, and ends the decode if not."""

    def __init__(self, server: Server, connection: socket.socket) -> None:
        self.server, self.connection, self.readable = server, connection, select.poll()
        self.readable.register(connection, select.POLLIN)

    def put(self, tokens: Tensor) -> None:
        self.check()

    def put_draft(self, tokens: Tensor) -> None:
        self.check()

    def end(self) -> None: ...

    def check(self) -> None:
        if self.server.stopping or (self.readable.poll(0) and not self.connection.recv(1, socket.MSG_PEEK)):
            raise UnwantedError


class Handler(BaseHTTPRequestHandler):
    """Answers POST /generate with `text` and `nfe`, and what cannot be answered with `error`."""

    server: Server
    timeout = SECONDS

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, UnwantedError):
            self.log_message("%s", "not answered: stopped, or the client has gone")

    def do_POST(self) -> None:
        status, content = self.answered()
        self.reply(status, content)

    def answered(self) -> tuple[int, dict[str, Any]]:
        if self.path != "/generate":
            return 404, {"error": f"expected /generate, got {self.path}"}
        try:
            return 200, self.server.answer(self.connection, **read(self.body()))
        except ValueError as error:
            # `generate` refuses by ValueError, too: a length that is none, a prompt that is longer than the window.
            return 400, {"error": str(error)}
        except (ConnectionError, UnwantedError):
            raise
        except Exception as error:  # of this request alone: the others are decoded on
            self.log_error("%s: %s", type(error).__name__, error)
            return 500, {"error": f"{type(error).__name__}: {error}"}

    def body(self) -> bytes:
        length = self.headers.get("Content-Length", "none")[:40]
        size = int(length) if length.isascii() and length.isdigit() else -1
        try:
            # What is too long is read all the same, up to a point: a client reads no answer before it has sent all.
            body = self.rfile.read(size) if 0 <= size <= 8 * MOST_BYTES else b""
        except TimeoutError as error:
            raise BadRequestError(f"expected {length} bytes within {SECONDS} seconds") from error
        if not 0 <= size <= MOST_BYTES:
            raise BadRequestError(f"expected a Content-Length of at most {MOST_BYTES}, got {length}")
        return body

    def reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """Holds the model that all threads decode with."""

    # A thread that is in an operator of PyTorch when the interpreter ends aborts the process: closing waits for all.
    daemon_threads = False
    request_queue_size = 128
    timeout = 0.5
    """How many seconds it waits for a request before it looks whether it is stopped."""

    def __init__(self, address: tuple[str, int], model: DiffusionLM, tokenizer: Any, settings: Any) -> None:
        super().__init__(address, Handler)
        self.model, self.tokenizer, self.settings, self.stopping = model, tokenizer, settings, False

    def stop(self, *_: Any) -> None:
        """Handles a signal: an exception instead might cut off a request between its connection and its thread."""
        self.stopping = True

    def answer(self, connection: socket.socket, prompt: str, **settings: Any) -> dict[str, Any]:
        ids = encode(self.tokenizer, prompt).to(self.model.device)
        out = self.model.generate(ids, streamer=Wanted(self, connection), **{**self.settings, **settings})
        text = self.tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        return {"text": text.strip(), "nfe": int(out.nfe)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a LLaDA or Dream (default: the embedded model)")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    options = parser.parse_args()
    model, tokenizer = load(options.model) if options.model else tiny.load()
    settings = {"max_new_tokens": 128, "rule": fdpp.Frechet(0.25), "cache": "dual"}
    with Server((options.host, options.port), model, tokenizer, settings) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.stop)
        print(f"listening on http://{options.host}:{server.server_port}", flush=True)
        while not server.stopping:
            server.handle_request()
        print("stopped")


if __name__ == "__main__":
    main()
