"""Every example runs as it is printed, and the server answers as `generate` does."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fdpp
from fdpp import tiny

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("decode", "own_rule", "patch_fast_dllm")
README = EXAMPLES / "README.md"
LONGEST = tiny.generate("held-out", 1, steps=8)[0].prompt


def start(name: str, *arguments: str) -> subprocess.Popen[str]:
    """As a reader starts it, from elsewhere; without a GPU's results, of which the last bits may differ."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=EXAMPLES.parents[1])


@pytest.fixture(scope="module")
def outputs() -> dict[str, str]:
    """What the scripts print; all at once, for most of their time goes into imports."""
    running = {name: start(name) for name in SCRIPTS}
    found = {}
    for name, process in running.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, f"{name}: {err}"
        found[name] = out
    return found


def test_every_example_is_named_in_the_readme_and_run() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*SCRIPTS, "serve"}
    text = README.read_text(encoding="utf-8")
    assert scripts == set(re.findall(r"^## \[(\w+)\.py\]\(\1\.py\)", text, re.MULTILINE))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_readme_shows_what_is_printed(name: str, outputs: dict[str, str]) -> None:
    text = README.read_text(encoding="utf-8")
    section = text.split(f"## [{name}.py]")[1].split("\n## ")[0]
    assert re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL) == [outputs[name]]


def test_the_patched_script_gives_the_same_tokens(outputs: dict[str, str]) -> None:
    assert "the same tokens: True" in outputs["patch_fast_dllm"]


# The server


@contextlib.contextmanager
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server in a process of its own, and its address."""
    process = start("serve", "--port", "0")
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), line + process.stderr.read()
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


def stop(process: subprocess.Popen[str], by: signal.Signals) -> None:
    process.send_signal(by)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "stopped\n") and "Traceback" not in err, err


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with server() as (process, address):
        yield address
        # Decodes that run when it is stopped end, and with them their threads, and those that are just accepted.
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(flood, address) for _ in range(2)]
            time.sleep(0.02)
            stop(process, signal.SIGINT)
        for connection in itertools.chain.from_iterable(asked.result() for asked in waiting):
            connection.close()


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def begin(address: str, body: Any) -> socket.socket:
    """Send a request; the caller reads no answer."""
    data = json.dumps(body).encode()
    connection = connect(address)
    connection.sendall(b"POST /generate HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data))
    return connection


def flood(address: str) -> list[socket.socket]:
    """Begin requests until nobody takes them, but not more than the server may have threads for."""
    begun: list[socket.socket] = []
    with contextlib.suppress(ConnectionError):
        while len(begun) < 100:
            begun.append(begin(address, {"prompt": LONGEST}))
    return begun


def hang_up(address: str, amid: bool) -> None:
    """Close after a request, or reset the connection amid its first line."""
    if amid:
        connection = connect(address)
        connection.sendall(b"POST /gen")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    else:
        connection = begin(address, {"prompt": LONGEST})
    connection.close()


def post(address: str, body: Any, path: str = "/generate", **headers: str) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_service_manager_stops_it_as_the_keyboard_does() -> None:
    with server() as (process, address), begin(address, {"prompt": LONGEST}):
        stop(process, signal.SIGTERM)


def test_requests_at_the_same_time_get_the_answers_of_calls_alone(address: str) -> None:
    model, tokenizer = tiny.load()
    problems = tiny.generate("held-out", 6, seed=5)
    wanted = []
    for problem in problems:
        ids = tokenizer(problem.prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=128, rule=fdpp.Frechet(0.25), cache="dual")
        text = tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        wanted.append((200, {"text": text.strip(), "nfe": int(out.nfe)}))
    assert len({answer["text"] for _, answer in wanted}) == len(problems)
    with ThreadPoolExecutor(8) as pool:
        asked = [{"prompt": problem.prompt} for problem in problems] * 4
        assert list(pool.map(lambda body: post(address, body), asked)) == wanted * 4


def test_the_length_is_the_requests(address: str) -> None:
    prompt = tiny.generate("held-out", 1)[0].prompt
    status, answer = post(address, {"prompt": prompt, "max_new_tokens": 5})
    assert status == 200 and len(answer["text"].split()) == 5


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"\xff", "expected JSON"),
        (b"[" * 200_000, "expected JSON.*recursion"),
        (b'{"prompt": "Mia", "max_new_tokens": ' + b"9" * 5000 + b"}", "expected JSON.*digits"),
        (b'{"prompt": "Mia \\ud800 has"}', '"prompt": expected a text, got half a character'),
        (b'{"prompt": "Mia", "max_new_tokens": NaN}', "max_new_tokens: expected an int of at least 0, got nan"),
        ({"prompt": "Mia", "max_new_tokens": None}, "max_new_tokens: expected an int of at least 0, got None"),
        ({"prompt": "Mia", "max_new_tokens": True}, "max_new_tokens: expected an int of at least 0, got True"),
        (b"x" * (1 << 20) + b"x", "expected a Content-Length of at most 1048576, got 1048577"),
        ([], "expected an object"),
        ({}, "expected an object"),
        ({"prompt": 3}, "expected an object"),
        ({"prompt": "  "}, "expected an object"),
        ({"prompt": "Mia", "tokens": 3}, r"expected no fields but .*, got \['tokens'\]"),
        (
            {"prompt": "Mia", "max_new_tokens": 0},
            "max_new_tokens=0 fills the masks of a prompt, got one without: expected at least 1",
        ),
        ({"prompt": "Mia", "max_new_tokens": "many"}, "max_new_tokens: expected an int of at least 0, got 'many'"),
        ({"prompt": "Mia " * 129}, "prompt of 129 tokens and 128 new ones exceed the model's window of 256"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(address: str, body: Any, message: str) -> None:
    status, answer = post(address, body)
    assert status == 400 and re.match(message, answer["error"]), answer


def test_other_ways_and_headers_are_refused(address: str) -> None:
    assert post(address, {"prompt": "Mia"}, path="/")[0] == 404
    for length in (str(1 << 40), "-5", "many", "0x10"):
        status, answer = post(address, {"prompt": "Mia"}, **{"Content-Length": length})
        assert status == 400 and answer["error"].endswith(f"expected a Content-Length of at most 1048576, got {length}")
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(address, timeout=60)


def test_bad_requests_and_clients_that_hang_up_between_good_ones(address: str) -> None:
    """Every good one gets the answer that it gets alone."""
    problems = tiny.generate("held-out", 4, seed=6)
    alone = [post(address, {"prompt": problem.prompt}) for problem in problems]

    def ask(number: int) -> Any:
        if number % 3 == 1:
            return post(address, [b"{", {"prompt": "pens " * 300}, {"prompt": ""}][number // 3 % 3])[0]
        if number % 3 == 2:
            return hang_up(address, amid=number % 2 == 1)
        return post(address, {"prompt": problems[number // 3 % 4].prompt})

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(36)))
    assert found[0::3] == alone * 3 and found[1::3] == [400] * 12


class OneOfAKind:
    """A model that decodes as the embedded one, but for prompts of one, two or three words."""

    def __init__(self) -> None:
        self.model, self.device = tiny.load()[0], torch.device("cpu")
        self.forwards, self.let_go = 0, threading.Event()

    def generate(self, ids: torch.Tensor, streamer: Any, **settings: Any) -> Any:
        if ids.shape[1] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if ids.shape[1] == 2:
            raise FloatingPointError("the model's logits held NaN")
        if ids.shape[1] == 3:  # as slow as the test likes, and for ever
            for self.forwards in itertools.count(1):
                streamer.put_draft(ids)
                if self.forwards == 3:
                    assert self.let_go.wait(60)
        return self.model.generate(ids, streamer=streamer, **settings)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[OneOfAKind, str]]:
    """The server in this process, with a model that fails."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    serve, model = importlib.import_module("serve"), OneOfAKind()
    settings = {"max_new_tokens": 128, "rule": fdpp.Frechet(0.25), "cache": "dual"}
    with serve.Server(("127.0.0.1", 0), model, tiny.load()[1], settings) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield model, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
    for name in ("serve", "decode"):
        sys.modules.pop(name, None)


def test_an_error_that_no_client_can_help_is_its_requests_alone(served: tuple[OneOfAKind, str]) -> None:
    _, address = served
    good = {"prompt": LONGEST}
    [(status, alone)] = [post(address, good)]
    with ThreadPoolExecutor(6) as pool:
        asked = [good, {"prompt": "Mia"}, good, {"prompt": "Mia has"}, good, {"prompt": "Mia"}]
        found = list(pool.map(lambda body: post(address, body), asked))
    assert status == 200 and found[0::2] == [(200, alone)] * 3
    assert found[1] == found[5] == (500, {"error": "OutOfMemoryError: CUDA out of memory."})
    assert found[3] == (500, {"error": "FloatingPointError: the model's logits held NaN"})


def test_a_decode_whose_client_has_gone_ends_with_its_forward(served: tuple[OneOfAKind, str]) -> None:
    """It would go on for ever; the server's end waits for its thread."""
    model, address = served
    connection = begin(address, {"prompt": "Mia has apples"})
    while model.forwards < 3:
        time.sleep(0.001)
    connection.close()
    model.let_go.set()
    assert post(address, {"prompt": LONGEST})[0] == 200
    assert model.forwards <= 4


def test_it_answers_after_all_that(address: str) -> None:
    assert post(address, {"prompt": tiny.generate("held-out", 1)[0].prompt})[0] == 200
