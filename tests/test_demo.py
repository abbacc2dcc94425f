"""The demo and the live view: plain lines without a terminal, a redrawn block in one."""

import io
import os
import re
import sys

import pytest
import torch
from doubting import Doubting

from fdpp import cli, tiny
from fdpp.cli import held_out, live, terminal
from fdpp.rules import Frechet, Quota

RULES = ("one per step", "threshold 0.9", "factor 0.75", "Fréchet 0.5", "Fréchet 0.25", "entropy 0.1", "budget 0.05")
SUMS, SUDOKU = tiny.TASKS["sums"], tiny.TASKS["sudoku"]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class AsciiTerminal(Terminal):
    encoding = "ascii"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(held_out, "PAUSE", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.load()[1]


def screen(text):
    """The lines that a terminal shows after `text`, attributes left out."""
    lines, row, written = [""], 0, ""
    for part in re.split(r"(\n|\x1b\[[?\d;]*[A-Za-z])", text):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
            written = ""
        elif re.fullmatch(r"\x1b\[\d+F", part):
            row -= int(part[2:-1])
            written = ""
            assert row >= 0, "the view never moves above its own first line"
        elif part == "\x1b[J":
            lines[row:] = [""]
        elif part == "\x1b[K":
            lines[row] = written
        elif part and not part.startswith("\x1b"):
            written += part
            lines[row] = written + lines[row][len(written) :]
    return lines


def play(tokenizer, out, drafts, **settings):
    """Feed a view the texts of successive drafts of one block; returns what it wrote for each."""
    view, frames = live.LiveView(tokenizer, tokenizer.mask_token_id, out, **settings), []
    with view:
        view.put(torch.tensor([tokenizer("Mia has 12 apples .")["input_ids"]]))
        for draft in drafts:
            start = out.tell()
            view.put_draft(torch.tensor([tokenizer(draft)["input_ids"]]))
            frames.append(out.getvalue()[start:])
    return view, frames


@pytest.mark.parametrize("name", tiny.MODELS)
def test_plain_lines_without_a_terminal(name, capsys):
    assert cli.main(["demo", "--task", name, "--problems", "2"]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "problem/s" not in err
    lines, task = out.splitlines(), tiny.MODELS[name]
    family = "SDAR" if name == "stories-block" else "LLaDA"
    assert lines[0] == f"{family}, 1.2 M parameters, on held-out problems of {name}: budget 0.05, cache dual"
    for problem in task.generate("held-out", 2):
        response, verdict = lines[lines.index(problem.prompt) + 1 :][:2]
        wrong = f"wrong, the answer is {problem.answer}" if name == "sums" else "wrong"
        said = "correct" if task.is_right(response, problem) else wrong
        assert re.match(rf"{said}: \d+ tokens, \d+ forwards, ", verdict)
    rows = [line for line in lines if line.startswith(RULES)]
    assert [row[:13].strip() for row in rows] == list(RULES)
    for row in rows:
        assert re.fullmatch(r"\d/2 +\d+% +\d+\.\d +\d+\.\d\d +\d+", row[13:].strip())


def test_the_demo_is_of_sudokus_unless_another_task_is_named(monkeypatch):
    asked = []
    monkeypatch.setattr(held_out, "run", lambda *given: asked.append(given) or 0)
    assert cli.main(["demo"]) == 0 == cli.main(["demo", "--task", "sums", "--problems", "7", "--cache", "none"])
    assert asked == [("sudoku", held_out.PROBLEMS, "dual"), ("sums", 7, "none")]


@pytest.mark.parametrize("task", [SUMS, SUDOKU], ids=lambda task: task.name)
def test_figures_count_forwards_and_response_tokens(task):
    model, tokenizer = tiny.load(task.name)
    problems = task.generate("held-out", 3)

    def decode(some):
        return held_out.decode(model, tokenizer, task, some, Frechet(0.25), "dual")

    decoded = decode(problems)
    assert decoded.tokens == sum(len(tokenizer(text)["input_ids"]) for text in decoded.texts)
    assert decode(problems).texts == decoded.texts
    one_by_one = [decode([problem]) for problem in problems]
    assert decoded.nfe == sum(single.nfe for single in one_by_one)
    assert decoded.texts == [single.texts[0] for single in one_by_one]


@pytest.mark.parametrize("name", tiny.TASKS)
def test_a_correct_answer_is_called_correct(name, monkeypatch, capsys):
    task = tiny.TASKS[name]
    [problem] = task.generate("held-out", 1)
    wrong = f"wrong, the answer is {problem.answer}" if name == "sums" else "wrong"
    for text, verdict in ((problem.response, "correct: 9"), ("Answer : 99", f"{wrong}: 9")):
        monkeypatch.setattr(held_out, "decode", lambda *args, text=text: held_out.Decoded([text], 9, 3, 1.0))
        held_out.show(None, None, task, problem, "dual")
        assert capsys.readouterr().out.splitlines()[1:3] == [
            text,
            f"{verdict} tokens, 3 forwards, 3.00 tokens per forward",
        ]


def test_a_sudoku_in_a_terminal_is_a_grid(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(held_out, "RULES", (Quota(),))
    monkeypatch.setattr(held_out, "SHOWN", Quota())
    assert cli.main(["demo", "--problems", "1"]) == 0
    [problem] = SUDOKU.generate("held-out", 1)
    model, tokenizer = tiny.load("sudoku")
    [answer] = held_out.decode(model, tokenizer, SUDOKU, [problem], Quota(), "dual").texts
    text = out.getvalue()
    lines = screen(text)[2:]
    assert lines[:7] == [*problem.prompt.split(" / ")[:6], "="]
    assert " / ".join(lines[7 : lines.index("", 7) - 1]) == answer
    assert lines[lines.index("", 7) - 1].startswith("correct: " if SUDOKU.is_right(answer, problem) else "wrong: ")
    view = text[text.index("\x1b[?7l") : text.index("\x1b[?25h")]
    frames = [screen(frame.rpartition("F")[2]) for frame in view.split("\x1b[J")[:42]]
    grids = [frame[: frame.index("")] for frame in frames]
    assert [len(grid) for grid in grids] == [2] * 14 + [4] * 14 + [6] * 14, "two rows a block, all their cells at once"
    assert all(len(row.split()) == 6 and "/" not in row for grid in grids for row in grid)
    assert "·" in grids[0][0] and "·" not in "".join(grids[-1])


def test_demo_in_a_terminal_shows_the_masks_fill_in(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["demo", "--task", "sums", "--problems", "1"]) == 0
    text = out.getvalue()
    [problem] = tiny.generate("held-out", 1)
    forwards = int(re.search(r"(\d+) forwards", text)[1])
    assert [int(n) for n in re.findall(r"forward (\d+),", text)] == list(range(1, forwards + 1))
    assert "\x1b[2m ·" in text and "\x1b[1;32m" in text
    assert text.index("\x1b[?25l") < text.index("\x1b[?25h"), "the cursor comes back"
    shown = screen(text)
    assert not any("·" in line or line.startswith("forward ") for line in shown), "the view erases itself"
    assert " ".join(shown[2:]).startswith(problem.prompt)
    assert all(len(line) < 60 for line in shown[2 : shown.index("", 2) - 1]), "prompt and answer are wrapped"


def test_frames_of_the_live_view(tokenizer):
    out = Terminal()
    view, frames = play(
        tokenizer,
        out,
        ["<mask> : <mask> <mask> apples . <mask>", "May : <mask> 5 apples . <mask>", "May : 12 5 apples . <eos>"],
    )
    assert [screen(frame.rpartition("F")[2])[0] for frame in frames] == [
        "· : · · apples . ·", "May : · 5 apples . ·", "May : 12 5 apples ."
    ]  # fmt: skip
    assert "\x1b[1;32mMay\x1b[0m :\x1b[2m ·\x1b[0m\x1b[1;32m 5\x1b[0m apples" in frames[1]
    assert "forward 3, 6 tokens, 2.00 tokens per forward" in frames[2]
    assert screen(out.getvalue())[:3] == ["May : 12 5 apples .", "", "forward 3, 6 tokens, 2.00 tokens per forward"]
    view.put(torch.tensor([tokenizer("May : 12 5 apples . <eos>")["input_ids"]]))
    view.put_draft(torch.tensor([tokenizer("<mask> 7")["input_ids"]]))
    assert screen(out.getvalue())[0] == "May : 12 5 apples . · 7"
    view.end()
    assert screen(out.getvalue()) == [""]


def test_what_is_taken_back_is_a_mask_again(tokenizer):
    """Also where a row becomes shorter, a special token is taken back, or a token changes."""
    out = Terminal()
    drafts = ["May : 12 <mask> apples . <eos>", "<mask> : 12 5 <mask> . <mask>", "June : 12 7 <mask> . <eos>"]
    _, frames = play(tokenizer, out, drafts)
    lost, new = "\x1b[1;35m ·\x1b[0m", "\x1b[1;32m"
    assert [screen(frame.rpartition("F")[2])[0] for frame in frames] == [
        "May : 12 · apples .", "· : 12 5 · . ·", "June : 12 7 · ."
    ]  # fmt: skip
    assert [frame.count("\x1b[1;35m") for frame in frames] == [0, 3, 0] and lost + " ." + lost in frames[1]
    assert f"{new} 7" in frames[2] and "\x1b[2m ·\x1b[0m" in frames[2], "an edit is new, an old loss a mask like others"
    assert frames[0].count("taken back") == 0 and ", 3 taken back" in frames[1] and ", 3 taken back" in frames[2]
    assert screen(out.getvalue())[0] == "June : 12 7 · .", "nothing of longer lines is left"


@pytest.mark.parametrize("row", [None, 7], ids=["lines", "grid"])
def test_a_decode_that_takes_tokens_back_is_redrawn_after_every_forward(row):
    model, tokenizer = tiny.load()
    out, states = Terminal(), []

    class Watched(live.LiveView):
        def put_draft(self, value):
            start = out.tell()
            super().put_draft(value)
            states.append(([*self.done, *self.block], out.getvalue()[start:]))

    problem = tiny.generate("held-out", 1)[0].prompt
    settings = {"rule": Doubting(), "cache": "none", "max_new_tokens": 42, "block_length": 21, "stop_at_eos": False}
    with Watched(tokenizer, tokenizer.mask_token_id, out, row=row) as view:
        decoded = model.generate(torch.tensor([tokenizer(problem)["input_ids"]]), streamer=view, **settings)
    assert view.taken > 0 and len(states) == int(decoded.nfe)
    for tokens, frame in states:
        words = ["·" if t == tokenizer.mask_token_id else tokenizer.decode([t]).strip() for t in tokens]
        visible = [w for w, t in zip(words, tokens, strict=True) if w == "·" or t not in view.hidden]
        visible = [w for i, w in enumerate(visible) if row is None or i % row != row - 1]
        lines = screen(re.sub(r"^\x1b\[\d+F", "", frame))
        assert " ".join(lines[: lines.index("")]).split() == visible
    assert screen(out.getvalue()) == [""] and view.done == decoded.sequences[0, -42:].tolist()


def test_frames_of_a_grid():
    """Rows are of equal length from the first frame on, whether the sign that ends them is committed or not."""
    tokenizer, out = tiny.load("sudoku")[1], Terminal()
    drafts = ["<mask> <mask> 3 <mask> 5 <mask> <mask> 6 <mask> <mask> 2", "1 <mask> 3 <mask> 5 4 / 6 <mask> 4 <mask>"]
    view, frames = play(tokenizer, out, drafts, row=7)
    shown = [screen(frame.rpartition("F")[2])[:2] for frame in frames]
    assert shown == [["· · 3 · 5 ·", "6 · · 2"], ["1 · 3 · 5 4", "6 · 4 ·"]]
    view.put(torch.tensor([tokenizer("1 2 3 6 5 4 / 6 5 4 1 2 3 /")["input_ids"]]))
    view.put_draft(torch.tensor([tokenizer("<mask> 1 <mask>")["input_ids"]]))
    assert screen(out.getvalue())[:3] == ["1 2 3 6 5 4", "6 5 4 1 2 3", "· 1 ·"]


def test_a_response_of_nothing_but_eos(tokenizer):
    out = Terminal()
    play(tokenizer, out, ["<eos> <eos>"])
    assert screen(out.getvalue())[:3] == ["", "", "forward 1, 0 tokens, 0.00 tokens per forward"]


def test_no_color_and_ascii(tokenizer, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = AsciiTerminal()
    play(tokenizer, out, ["<mask> : 5"])
    text = out.getvalue()
    assert text.isascii() and "\x1b[1m : \x1b" not in text and ";32m" not in text and "_" in text


def test_a_long_response_fits_the_terminal(tokenizer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setenv("LINES", "8")
    out = Terminal()
    _, [frame] = play(tokenizer, out, ["Mia has 12 apples . " * 12 + "<mask>"])
    lines = screen(frame)
    assert len(lines) <= 8 and all(len(line) < 30 for line in lines) and any("·" in line for line in lines)


def test_wrap_keeps_newlines_and_drops_control_characters():
    assert live.wrap([("one", ""), (" two", ""), ("\n  three\x1b[2J", "")], 6) == ["one", "two", "  three [2J"]


LONG = "one two three four five six seven eight nine ten\n\n    indented line that goes on\n- a-hyphen-stays-whole x"


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_text_is_wrapped_between_words_however_it_comes(size):
    """Parts end anywhere between words, as a streamer's do."""
    words = re.findall(r"\S+\s*", LONG)
    parts = ["".join(words[i : i + size]) for i in range(0, len(words), size)]
    wrap = terminal.WordWrap(20)
    wrapped = "".join(map(wrap, parts))
    assert [line.rstrip() for line in wrapped.split("\n")] == [
        "one two three four", "five six seven eight", "nine ten", "", "    indented line", "that goes on", "-",
        "a-hyphen-stays-whole", "x",
    ]  # fmt: skip
    assert wrapped.split() == LONG.split()


def test_wrapping_leaves_long_words_and_fenced_code_alone():
    code = "```python\nx = first + second + third + fourth\n```"
    text = f"see https://example.org/a/long/address\n{code}\nand then more words"
    assert terminal.WordWrap(20)(text).split("\n") == [
        "see", "https://example.org/a/long/address", "```python", "x = first + second + third + fourth", "```",
        "and then more words",
    ]  # fmt: skip


def test_nothing_is_wrapped_in_a_pipe():
    assert terminal.word_wrap(io.StringIO())(LONG) == LONG
    assert max(map(len, terminal.word_wrap(Terminal())(LONG * 3).split("\n"))) <= 59, "one less than COLUMNS"


@pytest.mark.parametrize("options", [[], ["--stream"]])
@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_generate_wraps_its_answer_in_a_terminal(options, term, monkeypatch, capsys):
    prompt = tiny.generate("held-out", 1)[0].prompt
    assert cli.main(["generate", "--prompt", prompt, "--device", "cpu"]) == 0
    plain = capsys.readouterr().out
    assert len(plain.splitlines()) == 1, "in a pipe it is one line"
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", term)
    assert cli.main(["generate", "--prompt", prompt, "--device", "cpu", *options]) == 0
    lines = screen(out.getvalue())
    assert " ".join(" ".join(lines).split()) == plain.strip() and 40 < max(map(len, lines)) <= 59


def test_dumb_terminals_are_not_drawn_on(monkeypatch):
    assert terminal.is_live(Terminal()) and not terminal.is_live(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.is_live(Terminal())
    monkeypatch.delenv("TERM")
    assert not terminal.is_live(Terminal())


def test_generate_streams_to_a_terminal(monkeypatch, capsys):
    prompt = tiny.generate("held-out", 1)[0].prompt
    assert cli.main(["generate", "--prompt", prompt, "--gen-length", "32", "--device", "cpu"]) == 0
    plain = capsys.readouterr().out
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["generate", "--prompt", prompt, "--gen-length", "32", "--device", "cpu", "--stream"]) == 0
    assert "forward 1, " in out.getvalue() and " ".join(screen(out.getvalue())).strip() == plain.strip()


def test_the_table_without_an_accent_where_the_output_has_none(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(held_out, "RULES", (Frechet(0.25),))
    monkeypatch.setattr(held_out, "SHOWN", Frechet(0.25))
    assert cli.main(["demo", "--problems", "1"]) == 0
    text = out.buffer.getvalue().decode("ascii")
    assert text.count("Frechet 0.25") == 2 and "?" not in text and os.linesep in text


@pytest.mark.parametrize("name", tiny.TASKS)
def test_a_package_without_checkpoint(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("fdpp.tiny.task.CHECKPOINTS", tmp_path)
    assert cli.main(["demo", "--task", name]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "fdpp: error: expected one of sums, sudoku, stories, stories-block, or a folder with a checkpoint"
    )
    assert err.endswith(f"got {tmp_path / name}\n")
