"""A small web server, with nothing but the standard library around `generate`.

python examples/serve.py --port 8000
curl localhost:8000/generate -d '{"prompt": "Mia has 12 apples . ... How many apples now ?"}'

Every request is decoded in a thread of its own, all on one model: each answer is that of a call alone. On a GPU their
steps take turns. There is no batching and no limit on the requests at a time, so put nothing of the kind before
strangers.
"""

from __future__ import annotations

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from decode import encode, load

import fdpp
from fdpp import tiny

MOST_BYTES = 1 << 20
FIELDS = {"prompt", "max_new_tokens"}


class BadRequestError(ValueError):
    """Something that the client can put right."""


def read(body: bytes) -> dict[str, Any]:
    """The request's fields, checked as far as `generate` does not."""
    try:
        request = json.loads(body)
    except ValueError as error:
        raise BadRequestError(f"expected JSON, got {body[:40]!r}: {error}") from error
    if not isinstance(request, dict) or not isinstance(request.get("prompt"), str) or not request["prompt"].strip():
        raise BadRequestError('expected an object with a "prompt" that is a text and not empty')
    unknown = request.keys() - FIELDS
    if unknown:
        raise BadRequestError(f"expected no fields but {sorted(FIELDS)}, got {sorted(unknown)}")
    return request


class Handler(BaseHTTPRequestHandler):
    """Answers POST /generate with `text` and `nfe`, and what cannot be answered with `error`."""

    server: Server

    def do_POST(self) -> None:
        try:
            if self.path != "/generate":
                self.reply(404, {"error": f"expected /generate, got {self.path}"})
                return
            length = int(self.headers.get("Content-Length", -1))
            if not 0 <= length <= MOST_BYTES:
                raise BadRequestError(f"expected a Content-Length of at most {MOST_BYTES}, got {length}")
            self.reply(200, self.server.answer(**read(self.rfile.read(length))))
        except ValueError as error:
            # `generate` refuses by ValueError, too: a length that is none, a prompt that is longer than the window.
            self.close_connection = True
            self.reply(400, {"error": str(error)})
        except FloatingPointError as error:
            self.reply(500, {"error": str(error)})

    def reply(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """Holds the model that all threads decode with."""

    def __init__(self, address: tuple[str, int], model: fdpp.LLaDAModelLM, tokenizer: Any, settings: Any) -> None:
        super().__init__(address, Handler)
        self.model, self.tokenizer, self.settings = model, tokenizer, settings

    def answer(self, prompt: str, **settings: Any) -> dict[str, Any]:
        ids = encode(self.tokenizer, prompt).to(self.model.device)
        out = self.model.generate(ids, **{**self.settings, **settings})
        text = self.tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        return {"text": text.strip(), "nfe": int(out.nfe)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a LLaDA checkpoint (default: the embedded model)")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    options = parser.parse_args()
    model, tokenizer = load(options.model) if options.model else tiny.load()
    settings = {"max_new_tokens": 128, "rule": fdpp.Frechet(0.25), "cache": "dual"}
    with Server((options.host, options.port), model, tokenizer, settings) as server:
        print(f"listening on http://{options.host}:{server.server_port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
