"""Every example runs as it is printed, and the server answers as `generate` does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fdpp
from fdpp import tiny

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = ("decode", "own_rule", "patch_fast_dllm")
README = EXAMPLES / "README.md"


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


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    process = start("serve", "--port", "0")
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), line + process.stderr.read()
        yield line.split()[-1]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (0, "stopped\n") and "Traceback" not in err, err
    finally:
        process.kill()
        process.communicate()


def post(address: str, body: Any, path: str = "/generate", **headers: str) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


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
        ([], "expected an object"),
        ({}, "expected an object"),
        ({"prompt": 3}, "expected an object"),
        ({"prompt": "  "}, "expected an object"),
        ({"prompt": "Mia", "tokens": 3}, r"expected no fields but .*, got \['tokens'\]"),
        ({"prompt": "Mia", "max_new_tokens": 0}, "max_new_tokens: expected an int of at least 1, got 0"),
        ({"prompt": "Mia", "max_new_tokens": "many"}, "max_new_tokens: expected an int of at least 1, got 'many'"),
        ({"prompt": "Mia " * 129}, "prompt of 129 tokens and 128 new ones exceed the model's window of 256"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_refused_with_the_reason(address: str, body: Any, message: str) -> None:
    status, answer = post(address, body)
    assert status == 400 and re.match(message, answer["error"]), answer


def test_other_ways_and_headers_are_refused(address: str) -> None:
    assert post(address, {"prompt": "Mia"}, path="/")[0] == 404
    status, answer = post(address, {"prompt": "Mia"}, **{"Content-Length": str(1 << 40)})
    assert status == 400 and "Content-Length" in answer["error"]
    with pytest.raises(urllib.error.HTTPError, match="501"):
        urllib.request.urlopen(address, timeout=60)


def test_it_answers_after_all_that(address: str) -> None:
    assert post(address, {"prompt": tiny.generate("held-out", 1)[0].prompt})[0] == 200
