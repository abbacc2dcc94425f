"""The chat: what it remembers, what it prints into a pipe and how it behaves in a real terminal."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path
from struct import pack

import dream_files
import pytest
import torch
from transformers import AutoTokenizer

import fdpp
from fdpp import cli, tiny
from fdpp.cli.chat import greet
from fdpp.cli.conversation import Chat
from fdpp.cli.live import LiveView
from fdpp.decoding.settings import DiffusionGenerationConfig

ROOT = Path(__file__).parents[1]
PROBLEMS = [problem.prompt for problem in tiny.generate("held-out", 3, steps=4)]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}Answer"
SETTINGS = {"max_new_tokens": 32, "block_length": 16}
OPTIONS = ("--gen-length", "32", "--block-length", "16", "--device", "cpu")


@pytest.fixture(scope="module")
def model():
    return tiny.load()[0]


@pytest.fixture
def tokenizer():
    return tiny.load()[1]


def decode(model, tokenizer, text, **settings):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    out = model.generate(ids, generation_config=DiffusionGenerationConfig(**{**SETTINGS, **settings}))
    return tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True).strip()


def ask(chat, question):
    out = io.StringIO()
    answer = chat.answer(chat.prepare(question), out)
    assert out.getvalue().split() == answer.text.split(), "what is streamed is the answer"
    return answer


def test_turns_are_remembered_where_the_tokenizer_has_a_template(model, tokenizer):
    tokenizer.chat_template = TEMPLATE
    chat = Chat(model, tokenizer, DiffusionGenerationConfig(**SETTINGS))
    first = ask(chat, PROBLEMS[0]).text
    assert first == decode(model, tokenizer, f"{PROBLEMS[0]} Answer")
    second = ask(chat, "How many pens now ?").text
    assert second == decode(model, tokenizer, f"{PROBLEMS[0]} {first} How many pens now ? Answer")
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2
    chat.forget()
    assert ask(chat, PROBLEMS[1]).text == decode(model, tokenizer, f"{PROBLEMS[1]} Answer")


def test_an_answer_ends_with_its_turn(model, tokenizer):
    """At the special token that the template writes behind an answer, without the tokens after it."""
    whole = decode(model, tokenizer, f"{PROBLEMS[0]} Answer")
    tokenizer.add_special_tokens({"additional_special_tokens": [","]})
    turn = "{{ message['content'] }}{{ ' ,' if message['role'] == 'assistant' else '' }} "
    tokenizer.chat_template = "{% for message in messages %}" + turn + "{% endfor %}Answer"
    chat = Chat(model, tokenizer, DiffusionGenerationConfig(**SETTINGS))
    answer = ask(chat, PROBLEMS[0])
    assert answer.text == whole.split(" ,")[0] and "," in whole
    assert answer.tokens == len(answer.text.split()) == 4


def test_special_tokens_are_not_shown_while_they_come(tmp_path):
    """Those that the tokenizer does not list neither."""
    dream_files.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "Dream"}')
    out, hello = io.StringIO(), dream_files.WORDS.index("hello")
    view = LiveView(AutoTokenizer.from_pretrained(tmp_path), dream_files.MASK, out)
    view.put(torch.tensor([[hello]]))
    view.put_draft(torch.tensor([[hello, dream_files.TURN, dream_files.EOS, dream_files.MASK]]))
    assert "hello" in out.getvalue() and "|" not in out.getvalue() and "1 tokens" in out.getvalue()


def test_every_question_by_itself_without_a_template(model, tokenizer):
    chat = Chat(model, tokenizer, DiffusionGenerationConfig(**SETTINGS))
    for problem in PROBLEMS:
        assert ask(chat, problem).text == decode(model, tokenizer, problem)
    assert chat.turns == [] and not chat.remembers


def test_oldest_turns_make_room(model, tokenizer):
    tokenizer.chat_template = TEMPLATE
    window = model.config.max_sequence_length
    chat = Chat(model, tokenizer, DiffusionGenerationConfig(max_new_tokens=window - 100))
    for number in range(3):
        turn = [f"Mia has {number} pens .", " ".join(["books"] * 30)]
        chat.turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
    # 3 turns of 35 words, the question of 5 and the template's own word: 111 where 100 have room.
    prompt = chat.prepare("How many pens now ?")
    assert prompt.dropped == 1 and prompt.ids.shape == (1, 76)
    assert [turn["content"] for turn in chat.turns][::2] == ["Mia has 1 pens .", "Mia has 2 pens ."]
    assert chat.prepare("How many pens now ?").dropped == 0, "a note once, not at every turn"
    long = chat.prepare(" ".join(["pens"] * 100))
    assert long.dropped == 0 and len(chat.turns) == 4, "a question that fits nowhere costs no turn"
    with pytest.raises(ValueError, match="exceed the model's window"):
        chat.answer(long, io.StringIO())


def test_an_unfinished_answer_leaves_no_turn(model, tokenizer, monkeypatch):
    tokenizer.chat_template = TEMPLATE
    chat = Chat(model, tokenizer, DiffusionGenerationConfig(**SETTINGS))
    ask(chat, PROBLEMS[0])
    before = list(chat.turns)

    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(fdpp.LLaDAModelLM, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(chat, PROBLEMS[1])
    assert chat.turns == before


def test_samples_differ_from_turn_to_turn_and_not_from_run_to_run(model, tokenizer):
    def said():
        chat = Chat(model, tokenizer, DiffusionGenerationConfig(**SETTINGS, temperature=3.0, seed=5))
        return [ask(chat, PROBLEMS[0]).text for _ in range(2)]

    first, again = said(), said()
    assert first == again and first[0] != first[1]


def test_piped_lines_are_answered_in_turn(model, tokenizer, monkeypatch, capsys):
    lines = [PROBLEMS[0], "", "/new", "/frob", PROBLEMS[1] + " wow", "/quit", PROBLEMS[2]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert cli.main(["chat", *OPTIONS]) == 0
    out, err = capsys.readouterr()
    expected = [decode(model, tokenizer, text) for text in (PROBLEMS[0], PROBLEMS[1] + " wow")]
    assert [line.split() for line in out.splitlines()] == [text.split() for text in expected]
    assert "\x1b" not in out + err and ">" not in out and "Ctrl" not in err
    notes = err.splitlines()
    figures = r"\(\d+ tokens, \d+ forwards \(NFE\), \d+\.\d\d tokens per forward, \d+ tok/s\)"
    assert re.fullmatch(figures, notes[0]) and re.fullmatch(figures, notes[-1]) and len(notes) == 6
    assert notes[1:3] == ["(a new conversation)", "(/frob is no command; there are /new and /quit)"]
    assert notes[3].startswith("(the small model sums answers nothing but problems like this one: ")
    assert re.fullmatch(r"\(1 of \d+ words are unknown to the model\)", notes[4])


def test_the_embedded_model_says_once_what_it_can_answer(model, tokenizer, monkeypatch, capsys):
    """And answers all the same."""
    lines = ["What is the capital of France?", "And of Italy?", PROBLEMS[0], "Mia ?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert cli.main(["chat", *OPTIONS]) == 0
    out, err = capsys.readouterr()
    hints = [number for number, note in enumerate(err.splitlines()) if "answers nothing but problems" in note]
    assert hints == [0] and PROBLEMS[0] not in err and tiny.generate("held-out", 1)[0].prompt in err
    assert [line.split() for line in out.splitlines()] == [decode(model, tokenizer, text).split() for text in lines]


def test_another_embedded_model(monkeypatch, capsys):
    """Its own lengths, hint and answers."""
    model, tokenizer = tiny.load("sudoku")
    puzzles = [puzzle.prompt for puzzle in tiny.TASKS["sudoku"].generate("held-out", 2)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(["1 + 1 = ?", *puzzles])))
    assert cli.main(["chat", "--model", "tiny:sudoku", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    lengths = {"max_new_tokens": 42, "block_length": 14}
    answers = [decode(model, tokenizer, puzzle, **lengths) for puzzle in puzzles]
    assert [line.split() for line in out.splitlines()[1:]] == [text.split() for text in answers]
    assert err.startswith(f"(the small model sudoku answers nothing but problems like this one: {puzzles[0]} ")
    assert err.count("answers nothing but") == 1


def test_a_question_that_fails_does_not_end_the_chat(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("pens " * 600 + f"\n{PROBLEMS[0]}\n"))
    assert cli.main(["chat", *OPTIONS]) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert "fdpp: error: prompt of 600 tokens and 32 new ones exceed" in err and "Traceback" not in err


class Terminal:
    """`fdpp chat` in a pseudo-terminal of its own, as its controlling one."""

    def __init__(self, *options, **environment):
        self.screen, end = pty.openpty()
        ioctl(end, termios.TIOCSWINSZ, pack("HHHH", 24, 80, 0, 0))
        known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fdpp", "chat", "--device", "cpu", *options],
            stdin=end,
            stdout=end,
            stderr=end,
            cwd=ROOT,
            env={**known, "TERM": "xterm", "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
            preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(end)
        self.text = ""

    def read(self, seconds):
        """Whether anything came; False at the end."""
        ready, _, _ = select.select([self.screen], [], [], max(seconds, 0.0))
        try:
            new = os.read(self.screen, 1 << 16) if ready else b""
        except OSError:
            new = b""
        self.text += new.decode(errors="replace")
        return bool(new)

    def until(self, pattern, seconds=120):
        """What was shown up to and with the first match of `pattern`."""
        stop = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text, re.DOTALL)):
            assert self.read(stop - time.monotonic()), f"waited for {pattern!r}, got {self.text!r}"
        seen, self.text = self.text[: found.end()], self.text[found.end() :]
        return seen

    def type(self, keys):
        os.write(self.screen, keys.encode())

    def end(self, key):
        """Exit code after `key` at the prompt; what was still written is in `text`."""
        # Python's line editor misses a signal in the moment between the prompt and its wait for keys.
        time.sleep(1.0)
        self.type(key)
        while self.read(60):
            pass
        return self.process.wait(timeout=60)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()
        os.close(self.screen)


PROMPT = r"(?:\n|\x1b\[\?2004h)> "


def test_the_greeting_shows_a_problem_of_the_models_task(capsys):
    greet(None, "tiny:stories")
    err = capsys.readouterr().err
    assert "The small model stories solves" in err and tiny.TASKS["stories"].generate("held-out", 1)[0].prompt in err


def test_a_session_in_a_terminal(model, tokenizer):
    with Terminal("--rule", "quota", "--no-stop-at-eos", "--gen-length", "128") as terminal:
        greeting = terminal.until(PROMPT)
        assert "Ctrl-D ends" in greeting and tiny.generate("held-out", 1)[0].prompt in greeting.replace("\r\n", "\n")
        terminal.type(PROBLEMS[0] + "\n")
        shown = terminal.until(r"tok/s\)")
        assert "\x1b[?25l" in shown and " ·" in shown and "forward 128," in shown, "the masks are seen filling in"
        final = shown.rsplit("\x1b[?7h", 1)[1]
        expected = decode(
            model, tokenizer, PROBLEMS[0], max_new_tokens=128, block_length=32, rule=fdpp.Quota(), stop_at_eos=False
        )
        answer = final.split("\r\n(")[0].split("\r\n")
        answer[-1] = re.sub(r"\x1b.*", "", answer[-1])
        assert " ".join(answer).strip() == expected and 60 < max(map(len, answer)) < 80, "it is wrapped by words"

        terminal.until(PROMPT)
        terminal.type("\x1b[A\n")
        terminal.until(r"forward 2,")
        terminal.type("\x03")
        stopped = terminal.until(PROMPT)
        assert stopped.count("\x1b[?25h") == 1 and stopped.count("\x1b[?7h") == 1, "the cursor is back"
        assert "(stopped; this turn is forgotten)" in stopped and "Traceback" not in stopped
        assert "forward 128," not in stopped

        terminal.type("/new\n")
        assert "(a new conversation)" in terminal.until(PROMPT)
        assert terminal.end("\x04") == 0
        assert "Traceback" not in terminal.text


def test_ctrl_c_at_the_prompt_ends_the_chat():
    with Terminal() as terminal:
        terminal.until(PROMPT)
        assert terminal.end("\x03") == 0
        assert "Traceback" not in terminal.text and "KeyboardInterrupt" not in terminal.text


def test_a_terminal_that_can_do_nothing(model, tokenizer):
    with Terminal(*OPTIONS, TERM="dumb", NO_COLOR="1") as terminal:
        seen = terminal.until(PROMPT)
        terminal.type(PROBLEMS[0] + "\n")
        seen += terminal.until(r"tok/s\)")
        assert "\x1b" not in seen
        expected = decode(model, tokenizer, PROBLEMS[0])
        assert f"{expected} (32 tokens" in " ".join(seen.split())
        answer = seen[seen.index(expected[:20]) :].splitlines()[:-1]
        assert len(answer) > 1 and max(map(len, answer)) < 80, "it is wrapped by words"
        terminal.until(PROMPT)
        assert terminal.end("\x04") == 0


def test_ctrl_c_while_lines_come_from_a_pipe_ends_with_130():
    process = subprocess.Popen(
        [sys.executable, "-m", "fdpp", "chat", "--device", "cpu", "--rule", "quota"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    process.stdin.write(PROBLEMS[0] + "\n")
    process.stdin.flush()
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in out + err
