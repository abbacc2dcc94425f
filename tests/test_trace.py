"""A recorded decode is the decode, the page holds it, and a browser shows it."""

import json
import sys
from html.parser import HTMLParser

import golden
import numpy as np
import pytest
import torch
from browser import Browser, find
from doubting import Doubting
from small import EOS, MASK, SMALL, exact_model, prompts, small_model

import fdpp
from fdpp import Wino, cli, tiny
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.trace import criteria
from fdpp.trace.page import data_of, render
from fdpp.trace.record import record

SETTINGS = (
    {},
    {"cache": "none", "stop_at_eos": False},
    {"cache": "prefix", "rule": fdpp.Quota(), "steps": 7},
    {"rule": fdpp.Quota(), "drafts": 4},
    {"rule": fdpp.Quota(), "drafts": "auto", "cache": "prefix", "branches": "tree"},
    {"rule": fdpp.Threshold(0.3), "drafts": 3, "cache": "none"},
    {"rule": fdpp.Factor(1.4), "temperature": 0.8, "seed": 3},
    {"rule": fdpp.Factor(1.4), "temperature": 0.8, "seed": 3, "drafts": 3},
    {"rule": fdpp.EntropyBound(1.5)},
    {"rule": fdpp.LocalLeap(0.3, 0.1, 2)},
    {"rule": fdpp.Klass(0.1, 0.5, 1), "drafts": 2},
    {"rule": fdpp.Dawn()},
    {"cfg_scale": 1.5, "logits_eos_inf": True},
    {"confidence_eos_eot_inf": True, "eot_token_id": 60},
    {"rule": fdpp.Quota(3), "remasking": "random", "seed": 1},
)


def config_of(**settings):
    return DiffusionGenerationConfig(
        **{"max_new_tokens": 44, "block_length": 16, "rule": fdpp.Frechet(0.1), **settings}
    )


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_recorded_decode_is_the_decode(settings, family):
    model, prompt, config = SMALL[family](), prompts(1, 9), config_of(**settings)
    trace, out = record(model, prompt, config), model.generate(prompt, generation_config=config)
    assert trace.response == out.sequences[0, 9:].tolist()
    assert trace.commit_step == out.commit_step[0].tolist()
    assert len(trace.steps) == 1 + max(trace.commit_step)
    assert trace.output.nfe.tolist() == out.nfe.tolist()
    assert sorted({step.forward for step in trace.steps}) == list(range(int(out.nfe)))
    if config.rule == fdpp.Quota() and config.drafts != 1:
        assert int(out.nfe) < len(trace.steps), "a forward with drafts takes several steps"

    tokens, over = [MASK] * 44, trace.response.index(EOS) if EOS in trace.response and config.stop_at_eos else 44
    for number, step in enumerate(trace.steps):
        start, stop = next(block for block in config.blocks() if block[0] <= step.positions[0] < block[1])
        assert sorted(step.positions) == [p for p in range(start, stop) if tokens[p] == MASK]
        assert step.missing == sorted(step.missing) and 0.0 <= step.missing[0] <= step.missing[-1] <= 1.0
        for position, proposal, committed in zip(step.positions, step.proposals, step.committed, strict=True):
            assert committed == (trace.commit_step[position] == number)
            if committed:
                tokens[position] = proposal
    assert tokens[: over + 1] == trace.response[: over + 1]


RECORDED = golden.DATA / "further"
RUNS = [
    run
    for run in json.loads((RECORDED / "wino.json").read_text())["runs"]
    if run["stable"] and run["params"]["gen_length"] <= 64
][::7]


def events(steps, start):
    """What the steps did, as the recorded runs say it: call, whether it is a commit, column and token, sorted."""
    found = []
    for call, step in enumerate(steps):
        filled = zip(step.positions, step.proposals, step.committed, strict=True)
        found += [(call, 1, start + position, token) for position, token, committed in filled if committed]
        found += [(call, 0, start + position, token) for position, token in step.taken]
    return sorted(found)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["run"])
def test_what_was_committed_and_taken_back_is_that_of_the_recorded_run(run):
    with np.load(RECORDED / "wino.npz") as stored:
        prompt = torch.from_numpy(stored[f"prompt_{run['prompt']}"]).long()
        recorded, out = (stored[f"{run['run']}_{name}"].tolist() for name in ("events", "out"))
    params, P = run["params"], prompt.shape[1]
    config = DiffusionGenerationConfig(
        max_new_tokens=params["gen_length"],
        block_length=params["block_length"],
        rule=Wino(params["threshold"], params["threshold_back"]),
        cache="none",
        stop_at_eos=False,
    )
    trace = record(golden.model("model_tiny"), prompt, config)
    assert events(trace.steps, P) == sorted(map(tuple, recorded))
    assert sum(len(step.taken) for step in trace.steps) == run["revoked"]
    tokens, mask, decided_at = [params["mask_id"]] * params["gen_length"], params["mask_id"], {}
    for number, step in enumerate(trace.steps):
        start, stop = next(block for block in config.blocks() if block[0] <= step.positions[0] < block[1])
        assert sorted(step.positions) == [p for p in range(start, stop) if tokens[p] == mask]
        assert step.decided == [p for p in range(start, stop) if tokens[p] != mask] and not step.edited
        assert all(len(values) == len(step.decided) for values in step.verdicts.values())
        for position, token in step.taken:
            assert tokens[position] == token and decided_at.pop(position) < number
            tokens[position] = mask
        for position, token, committed in zip(step.positions, step.proposals, step.committed, strict=True):
            if committed:
                tokens[position], decided_at[position] = token, number
    assert tokens == trace.response == out[0][P:]
    assert trace.commit_step == [decided_at[position] for position in range(len(tokens))]


def test_verdicts_say_what_is_taken_back():
    trace = record(golden.model("model_tiny"), torch.tensor([[7, 3, 9]]), wino())
    assert any(step.taken for step in trace.steps)
    for step in trace.steps:
        verdict = dict(zip(step.decided, step.verdicts.get("verdict", []), strict=True))
        assert all(verdict[position] < 0.9 for position, _ in step.taken)
        assert all(np.isnan(step.shown["verdict"])), "a mask has no verdict"


def wino(**settings):
    return DiffusionGenerationConfig(
        **{"max_new_tokens": 32, "block_length": 16, "rule": Wino(0.6, 0.9), "cache": "none", **settings}
    )


@pytest.mark.parametrize("family", SMALL)
def test_confidences_are_those_of_the_model(family):
    model, prompt = SMALL[family](), prompts(1, 9)
    trace = record(model, prompt, config_of(cache="none", stop_at_eos=False, rule=fdpp.EntropyBound(1.5)))
    sequence = torch.cat((prompt, torch.full((1, 44), MASK)), dim=1)
    for step in trace.steps:
        columns = torch.tensor(step.positions) + 9
        p = model.aligned(model(sequence).logits)[0, columns].double().softmax(-1)
        chosen = p.gather(1, torch.tensor(step.proposals)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(step.missing, dtype=torch.float64), 1.0 - chosen, rtol=0, atol=1e-6)
        entropies = torch.tensor(step.entropies, dtype=torch.float64)
        torch.testing.assert_close(entropies, -(p * p.log()).sum(1), rtol=0, atol=1e-5)
        taken = torch.tensor(step.committed)
        sequence[0, columns[taken]] = torch.tensor(step.proposals)[taken]


@pytest.mark.parametrize("rule", [fdpp.Threshold(0.3), fdpp.Factor(1.4), fdpp.Frechet(0.1), fdpp.Frechet(0.0, 0.05)])
def test_a_rule_would_commit_what_it_committed(rule):
    trace = record(exact_model(seed=1), prompts(1, 9, seed=1), config_of(rule=rule))
    counts = [criteria.would_commit(rule, step.missing) for step in trace.steps]
    assert counts == [sum(step.committed) for step in trace.steps] and max(counts) > 1
    for step, count in zip(trace.steps, counts, strict=True):
        assert step.committed == [rank < count for rank in range(len(step.committed))]


@pytest.mark.parametrize("rule", [*criteria.COMPARED, fdpp.Frechet(0.1, 0.02), fdpp.Threshold(0.5)])
def test_what_a_rule_would_commit_is_what_select_commits(rule):
    generator = torch.Generator().manual_seed(0)
    for T in (1, 2, 8, 30):
        missing = (torch.rand(T, generator=generator, dtype=torch.float64) ** 6).sort().values
        logits = torch.stack((-missing.log() + (1 - missing).log(), torch.zeros(T), torch.full((T,), -80.0)), dim=1)
        # The smaller of two probabilities is no proposal.
        missing, logits = missing.clamp(max=0.5), logits.clamp(min=0.0)
        logits[:, 2] = -80.0
        out = fdpp.select(logits[None].float(), torch.full((1, T), 2), rule=rule, mask_id=2)
        assert criteria.would_commit(rule, missing.tolist()) == int(out.committed.sum())
        for curve in criteria.curves(rule, missing.tolist()):
            same = rule if isinstance(rule, (fdpp.Frechet, fdpp.Factor)) else fdpp.Frechet(0.25)
            above = sum(score > curve.limit for score in curve.scores)
            if curve.name == "factor score" or not isinstance(rule, fdpp.Factor):
                assert max(above, 1) == criteria.would_commit(same, missing.tolist())
    assert criteria.would_commit(rule, [1.0, 1.0]) == 1


def test_record_takes_what_generate_takes():
    model = small_model()
    with pytest.raises(ValueError, match="expected one sequence to trace, got 2"):
        record(model, prompts(2, 9), config_of())
    with pytest.raises(ValueError, match="exceed the model's window of 256"):
        record(model, prompts(1, 213), config_of())
    assert record(model, prompts(1, 212), config_of()).steps
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        record(model, prompts(1, 9), config_of())


class Page(HTMLParser):
    """The text of every script and style element, every attribute, and the words of the document."""

    def __init__(self, text):
        super().__init__()
        self.inside, self.scripts, self.styles, self.attributes, self.text = "", [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.attributes += [(tag, *attribute) for attribute in attributes]

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, text):
        if self.inside == "script":
            self.scripts.append(text)
        elif self.inside == "style":
            self.styles.append(text)
        else:
            self.text += text


@pytest.fixture(scope="module")
def embedded():
    return tiny.load()


def trace_of(embedded, **settings):
    model, tokenizer = embedded
    ids = torch.tensor([tokenizer(tiny.generate("held-out", 1)[0].prompt)["input_ids"]])
    config = DiffusionGenerationConfig(**{"max_new_tokens": 128, **settings})
    return record(model, ids, config), tokenizer


REVISING = {"doubting": Doubting(), "editing": fdpp.Editing(tau=1.0, edit=0.99, post=3)}


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("rule", REVISING.values(), ids=REVISING)
def test_a_forward_of_several_steps_takes_back_and_edits_what_single_steps_do(rule, cache, embedded):
    settings = {"rule": rule, "cache": cache, "max_new_tokens": 64, "stop_at_eos": False}
    one, many = (trace_of(embedded, drafts=drafts, **settings)[0] for drafts in (1, 4))
    assert events(one.steps, 0) == events(many.steps, 0)
    assert [step.edited for step in one.steps] == [step.edited for step in many.steps]
    assert int(many.output.nfe) < int(one.output.nfe) == len(one.steps) == len(many.steps)
    assert any(step.taken or step.edited for step in one.steps)
    mask = one.config.mask_token_id
    tokens = [mask] * 64
    for step in many.steps:
        before = list(tokens)
        for position, token, committed in zip(step.positions, step.proposals, step.committed, strict=True):
            tokens[position] = token if committed else tokens[position]
        for position, lost in step.taken:
            assert before[position] == lost != mask and position not in step.positions
            tokens[position] = mask
        for position, old, new in step.edited:
            assert before[position] == old != mask and tokens[position] == new != old
        assert step.decided == [] and step.verdicts == {}, "a rule that shows nothing"
    assert tokens == many.response


def test_the_page_holds_the_decode(embedded):
    trace, tokenizer = trace_of(embedded)
    data = data_of(trace, tokenizer, "tiny")
    text = render(data)
    page = Page(text)
    assert json.loads(page.scripts[0]) == json.loads(json.dumps(data))
    ids = [data["pieces"][piece][0] for piece in data["response"]]
    assert ids == trace.response and data["commit"] == trace.commit_step
    assert data["prompt"] == tiny.generate("held-out", 1)[0].prompt
    response = "".join(data["pieces"][piece][1] for piece in data["response"][: data["end"]])
    assert response.strip() == tokenizer.decode(trace.response, skip_special_tokens=True).strip()
    assert response in page.text, "for a browser without JavaScript"
    for step, kept in zip(trace.steps, data["steps"], strict=True):
        assert kept["positions"] == step.positions and kept["committed"] == step.committed
        assert kept["missing"] == pytest.approx(step.missing, rel=1e-3)
        assert kept["would"] == [criteria.would_commit(rule, step.missing) for rule in criteria.COMPARED[:2]]
    assert data["others"] == ["threshold 0.9", "factor 0.75"] and data["rule"] == "Fréchet 0.25"
    assert data["tokens"] == len(ids[: data["end"]]) and data["nfe"] == int(trace.output.nfe)


TAKEN_BACK = {"rule": Wino(0.3, 0.999), "cache": "none", "block_length": 64}
EDITED = {"rule": fdpp.Editing(tau=0.3, edit=0.3, post=3)}


def test_the_page_holds_what_was_taken_back_and_edited(embedded):
    for settings in (TAKEN_BACK, EDITED):
        trace, tokenizer = trace_of(embedded, **settings)
        data = json.loads(Page(render(data_of(trace, tokenizer, "tiny"))).scripts[0])
        ids = [piece[0] for piece in data["pieces"]]
        for step, kept in zip(trace.steps, data["steps"], strict=True):
            taken = [(position, ids[piece]) for position, piece in kept.get("taken", [])]
            edited = [(position, ids[old], ids[new]) for position, old, new in kept.get("edited", [])]
            assert taken == step.taken and edited == step.edited
            assert kept.get("decided", []) == step.decided and "shown" not in kept
            for name, values in kept.get("verdicts", {}).items():
                assert values == pytest.approx(step.verdicts[name], rel=1e-3)
        assert any(step.taken for step in trace.steps) == (settings is TAKEN_BACK)
        assert any(step.edited for step in trace.steps) == (settings is EDITED)
    for settings in SETTINGS:
        trace, tokenizer = trace_of(embedded, **settings)
        for step in data_of(trace, tokenizer, "tiny")["steps"]:
            assert not step.keys() & {"taken", "edited", "decided", "verdicts"}, "nothing new in other decodes"


def test_what_a_rule_cannot_say_of_a_position_is_left_out():
    from fdpp.trace.page import tellable

    nan = float("nan")
    assert tellable({"a": [nan, 0.5], "b": [nan, nan], "c": [], "d": [3]}) == {"a": [None, 0.5], "d": [3]}


PAGES = (*SETTINGS, TAKEN_BACK, EDITED)


@pytest.mark.parametrize("settings", PAGES, ids=str)
def test_a_page_of_every_rule_is_small_and_needs_nothing_else(settings, embedded):
    trace, tokenizer = trace_of(embedded, **settings)
    text = render(data_of(trace, tokenizer, "tiny"))
    assert len(text.encode()) < 200_000
    page = Page(text)
    outside = [a for a in page.attributes if a[1] in ("src", "href") and not a[2].startswith("data:")]
    assert outside == [] and "url(http" not in text and "@import" not in text
    assert ("meta", "http-equiv", "Content-Security-Policy") in page.attributes
    assert text.count("http") == text.count("http://www.w3.org/2000/svg") + text.count("http-equiv")


NASTY = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "\u2028\u2029",
    "😀",
    "ب",
    "&amp;",
    '"\\',
    "\x00\x1b",
    "\n",
    "/*data*/<!--response-->",
]


def nasty_data(embedded):
    """Data of a real decode whose tokens have become hostile texts."""
    trace, tokenizer = trace_of(embedded)
    data = data_of(trace, tokenizer, "</title>")
    for row, text in zip(data["pieces"], NASTY * 20, strict=False):
        row[1] = text
    data["prompt"] = "".join(NASTY) + "\ud800"
    return data


def test_no_text_can_leave_its_place(embedded):
    data = nasty_data(embedded)
    page = Page(render(data))
    assert len(page.scripts) == 2 and json.loads(page.scripts[0]) == json.loads(json.dumps(data))
    assert "alert" not in page.scripts[1]


def test_spaces_are_where_the_tokenizer_puts_them():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from fdpp.trace.page import Pieces

    words = {"Ġun": 0, "believ": 1, "able": 2, "Ċ": 3, "ĠĠ": 4, "ðŁĺ": 5}
    bpe = Tokenizer(models.BPE(words, [], fuse_unk=False))
    bpe.decoder = decoders.ByteLevel()
    pieces = Pieces(PreTrainedTokenizerFast(tokenizer_object=bpe))
    assert [pieces.rows[pieces(token)][1] for token in (0, 1, 2, 3, 4, 0)] == [
        " un",
        "believ",
        "able",
        "\n",
        "  ",
        " un",
    ]
    assert "\ufffd" in pieces.rows[pieces(5)][1], "a part of a character"
    assert len(pieces.rows) == 6


def test_what_is_special_need_not_be_listed_as_such(tmp_path):
    """The end of a turn of Dream's tokenizer is not."""
    import dream_files
    from transformers import AutoTokenizer

    from fdpp.trace.page import Pieces

    dream_files.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "Dream"}')
    pieces = Pieces(AutoTokenizer.from_pretrained(tmp_path))
    tokens = (dream_files.TURN, dream_files.EOS, dream_files.WORDS.index("hello"))
    assert [pieces.rows[pieces(token)][1:] for token in tokens] == [
        ["<|im_end|>", True],
        ["<|endoftext|>", True],
        ["hello", False],
    ]


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["trace", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    data = json.loads(Page((tmp_path / "trace.html").read_text("utf-8")).scripts[0])
    assert out == "" and err == f"{len(data['steps'])} steps in {data['nfe']} forwards, written to trace.html\n"
    assert data["prompt"] == tiny.generate("held-out", 1)[0].prompt
    options = "--rule quota --drafts 4 --cache prefix --gen-length 32 --block-length 8"
    problem = tiny.generate("held-out", 2)[1].prompt
    assert cli.main(["trace", "-o", "b.html", "--prompt", problem, *options.split()]) == 0
    data = json.loads(Page((tmp_path / "b.html").read_text("utf-8")).scripts[0])
    assert data["prompt"] == problem and data["rule"] == "one per step" and len(data["steps"]) == 32 > data["nfe"]
    assert data["settings"]["cache"] == "prefix" and len(data["blocks"]) == 4


def test_command_with_another_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["trace", "--model", "tiny:sudoku", "--device", "cpu"]) == 0
    data = json.loads(Page((tmp_path / "trace.html").read_text("utf-8")).scripts[0])
    model, tokenizer = tiny.load("sudoku")
    prompt = tiny.TASKS["sudoku"].generate("held-out", 1)[0].prompt
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(ids)
    assert data["prompt"] == prompt and data["settings"]["model"] == "tiny:sudoku" and len(data["blocks"]) == 3
    assert [data["pieces"][piece][0] for piece in data["response"]] == out.sequences[0, ids.shape[1] :].tolist()
    assert data["commit"] == out.commit_step[0].tolist() and data["nfe"] == int(out.nfe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model some/model", "--model some/model needs a --prompt"),
        ("-o no/such/t.html", "no/such/t.html: no such folder as no/such"),
        ("--step 500 --gen-length 8", "--step 500: the decode took"),
        ("--gen-length 1000", "exceed the model's window of"),
        ("-o .", "-o .: a folder, expected a file"),
        ("--png .", "--png .: a folder, expected a file"),
        ("--step 0", "--step: expected a whole number of at least 1"),
    ],
)
def test_user_errors(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["trace", "--device", "cpu", *arguments.split()]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("fdpp: error: ") and message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", ["-o .", "--png /proc/t.png", "-o no/such/t.html", "-o /proc/t.html"])
def test_where_the_page_cannot_be_written_nothing_is_decoded(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fdpp.cli.trace.load_model", None)
    monkeypatch.setattr("fdpp.cli.trace.find_spec", lambda name: name)
    assert cli.main(["trace", *arguments.split()]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_png_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["trace", "--png", "t.png"]) == 2
    assert "--png needs matplotlib: pip install matplotlib, or fdpp with its extra png" in capsys.readouterr().err


@pytest.mark.parametrize("rule", ["frechet", "factor", "entropy", "klass"])
def test_png(rule, tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("matplotlib.image", reason="the still picture needs matplotlib")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["trace", "--png", "t.png", "--rule", rule, "--step", "2", "--device", "cpu"]) == 0
    assert "written to t.png" in capsys.readouterr().err and not (tmp_path / "trace.html").exists()
    pixels = image.imread("t.png")
    assert pixels.shape[0] > 600 and pixels.shape[1] == 1500
    assert len({tuple(pixel) for pixel in (pixels[::7, ::7, :3] * 255).astype(int).reshape(-1, 3).tolist()}) > 8


@pytest.mark.parametrize("settings", [TAKEN_BACK, EDITED], ids=["taken back", "edited"])
def test_png_with_tokens_taken_back_and_edited(settings, embedded, tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="the still picture needs matplotlib")
    from matplotlib.colors import to_rgb

    from fdpp.trace import still

    trace, tokenizer = trace_of(embedded, **settings)
    data = data_of(trace, tokenizer, "tiny")
    taken, edited = (sum(len(getattr(step, kind)) for step in trace.steps) for kind in ("taken", "edited"))
    assert still.title(data).endswith(f", {taken} taken back" if taken else f", {edited} edited")
    still.draw(data, tmp_path / "t.png", next(i for i, s in enumerate(trace.steps) if s.taken or s.edited))
    pixels = image.imread(tmp_path / "t.png")[..., :3]
    assert bool((abs(pixels - np.array(to_rgb(still.LOST))).max(-1) < 0.01).any()) == bool(taken)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find() is None:
        pytest.skip("needs Chromium or Chrome")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def write(path, data):
    path.write_text(render(data), encoding="utf-8")
    return path.as_uri()


COUNT = "document.querySelectorAll('#response .{}').length"
SHOWN = "[...document.querySelectorAll('#response .tok')].map((chip) => chip.textContent)"


def test_the_browser_replays_every_step(browser, embedded, tmp_path):
    trace, tokenizer = trace_of(embedded)
    data = data_of(trace, tokenizer, "tiny")
    browser.open(write(tmp_path / "t.html", data), 1280, 900)
    for number, step in enumerate(trace.steps):
        assert browser.evaluate("counter.textContent") == f"{number + 1} / {len(trace.steps)}"
        assert browser.evaluate(COUNT.format("new")) == sum(step.committed)
        assert browser.evaluate(COUNT.format("open")) == len(step.positions) - sum(step.committed)
        assert browser.evaluate(COUNT.format("done")) == sum(0 <= s <= number for s in trace.commit_step)
        sentence = browser.evaluate("sentence.textContent")
        would = [criteria.would_commit(rule, step.missing) for rule in criteria.COMPARED[:2]]
        assert f"commits {sum(step.committed)} of {len(step.positions)} position" in sentence
        assert f"threshold 0.9 would commit {would[0]}, factor 0.75 would commit {would[1]}." in sentence
        assert browser.evaluate("document.querySelectorAll('#profile .bar').length") == len(step.positions)
        assert browser.evaluate("document.querySelectorAll('#profile .taken').length") == sum(step.committed)
        browser.press("ArrowRight")
    words = browser.evaluate(SHOWN)[: data["end"]]
    assert words == tokenizer.convert_ids_to_tokens(trace.response[: data["end"]])
    assert browser.messages == [] and len(browser.requests) == 1


def test_keys_slider_and_play(browser, embedded, tmp_path):
    trace, tokenizer = trace_of(embedded)
    last = len(trace.steps)
    browser.open(write(tmp_path / "t.html", data_of(trace, tokenizer, "tiny")), 1280, 900)

    def at():
        return int(browser.evaluate("counter.textContent").split(" / ")[0])

    for focus in ("document.activeElement.blur()", "slider.focus()"):
        browser.evaluate(focus)
        seen = []
        for key in ("End", "ArrowLeft", "ArrowRight", "ArrowRight", "Home", "ArrowLeft", "ArrowRight"):
            browser.press(key)
            seen.append(at())
        assert seen == [last, last - 1, last, last, 1, 1, 2], focus
        browser.press("Home")
    browser.evaluate("slider.value = 3; slider.dispatchEvent(new Event('input'))")
    assert at() == 3
    browser.evaluate("document.activeElement.blur()")
    browser.press("ArrowDown")
    browser.press("ArrowDown")
    assert browser.evaluate("document.activeElement.dataset.position") == "1"
    assert browser.evaluate("document.querySelector('#position').textContent").startswith("Position 2, block 1: ")
    assert browser.evaluate("document.querySelectorAll('#response [tabindex=\"0\"]').length") == 1
    browser.press(" ")
    assert browser.evaluate("$('play').getAttribute('aria-label')") == "Pause"
    look = "const look = () => $('play').textContent === '▶' ? done(step + 1) : setTimeout(look, 50);"
    assert browser.evaluate(f"new Promise((done) => {{ {look} look(); }})") == last
    assert browser.messages == []


def test_the_browser_shows_what_is_taken_back(browser, embedded, tmp_path):
    trace, tokenizer = trace_of(embedded, **TAKEN_BACK)
    browser.open(write(tmp_path / "t.html", data_of(trace, tokenizer, "tiny")), 1280, 900)
    tokens, frames = ["·"] * 128, []
    for step in trace.steps:
        shown = browser.evaluate(SHOWN)
        frames.append(shown)
        for position, proposal, committed in zip(step.positions, step.proposals, step.committed, strict=True):
            tokens[position] = tokenizer.convert_ids_to_tokens(proposal) if committed else "·"
            assert committed == (browser.evaluate(f"chips[{position}].classList.contains('done')"))
        for position, token in step.taken:
            word = tokenizer.convert_ids_to_tokens(token)
            assert shown[position] == f"·↶{word}" and tokens[position] == word
            label = browser.evaluate(f"chips[{position}].getAttribute('aria-label')")
            verdict = step.verdicts["verdict"][step.decided.index(position)]
            assert label.startswith(f"Position {position + 1}: masked again, “{word}” taken back at step ")
            assert float(label.rpartition(", verdict ")[2]) == pytest.approx(verdict, rel=1e-3)
            tokens[position] = "·"
        undecided = set(step.positions) | {position for position, _ in step.taken}
        assert [s for p, s in enumerate(shown) if p not in undecided] == [
            t for p, t in enumerate(tokens[: len(shown)]) if p not in undecided
        ]
        assert browser.evaluate(COUNT.format("lost")) == len(step.taken)
        sentence = browser.evaluate("sentence.textContent")
        assert f"commits {sum(step.committed)} of {len(step.positions)} position" in sentence
        assert (f" Taken back: {len(step.taken)}." in sentence) == bool(step.taken)
        assert browser.evaluate("document.querySelectorAll('#profile .bar').length") == len(step.positions)
        browser.press("ArrowRight")
    for shown in frames[-2::-1]:
        browser.press("ArrowLeft")
        assert browser.evaluate(SHOWN) == shown, "a step back is the step as it was"

    lost = sum(len(step.taken) for step in trace.steps)
    assert browser.evaluate("$('summary').textContent").endswith(f"; in all committed {128 + lost}, taken back {lost}")
    assert browser.evaluate("document.querySelectorAll('#all .lost').length") == sum(bool(s.taken) for s in trace.steps)
    assert "taken back, below zero" in browser.evaluate("legend.textContent")
    number, step = next((number, step) for number, step in enumerate(trace.steps) if step.taken)
    browser.evaluate(f"choose({step.taken[0][0]})")
    rows = browser.evaluate("[...document.querySelectorAll('#position tbody tr')].map((row) => row.innerText)")
    assert rows[number].endswith("taken back") and any(row.endswith("kept") for row in rows)
    assert f"Taken back at step {number + 1}" in browser.evaluate("document.querySelector('#position').textContent")
    assert browser.messages == []


def test_the_browser_shows_edits(browser, embedded, tmp_path):
    trace, tokenizer = trace_of(embedded, **EDITED)
    browser.open(write(tmp_path / "t.html", data_of(trace, tokenizer, "tiny")), 1280, 900)
    for number, step in enumerate(trace.steps):
        shown, sentence = browser.evaluate(SHOWN), browser.evaluate("sentence.textContent")
        for position, *tokens in step.edited:
            old, new = tokenizer.convert_ids_to_tokens(tokens)
            assert shown[position] == f"{old} → {new}"
            label = browser.evaluate(f"chips[{position}].getAttribute('aria-label')")
            assert label.startswith(f"Position {position + 1}: “{new}”") and f"step {number + 1} from “{old}”" in label
        assert sum(" → " in text for text in shown) == len(step.edited)
        assert (f" Edited: {len(step.edited)}." in sentence) == bool(step.edited)
        filled = len(step.positions) - len(step.edited)
        assert (
            step.settled or not filled or f"commits {sum(step.committed) - len(step.edited)} of {filled} " in sentence
        )
        browser.press("ArrowRight")
    edited = sum(len(step.edited) for step in trace.steps)
    assert f", edited {edited}" in browser.evaluate("$('summary').textContent")
    assert browser.evaluate("document.querySelectorAll('#all .edit').length") == sum(
        bool(s.edited) for s in trace.steps
    )
    assert browser.messages == []


def test_other_pages_say_nothing_of_it(browser, embedded, tmp_path):
    trace, tokenizer = trace_of(embedded)
    browser.open(write(tmp_path / "t.html", data_of(trace, tokenizer, "tiny")), 1280, 900)
    browser.evaluate("choose(0)")
    said = browser.evaluate("document.querySelector('main').innerText")
    assert not any(word in said for word in ("taken back", "Taken back", "edited", "in all", "what came of it"))


@pytest.mark.parametrize("settings", PAGES, ids=str)
def test_on_a_phone(browser, embedded, settings, tmp_path):
    trace, tokenizer = trace_of(embedded, **settings)
    browser.open(write(tmp_path / "t.html", data_of(trace, tokenizer, "tiny")), 390, 844, dark=True, touch=True)
    assert browser.evaluate("document.documentElement.scrollWidth") == 390, "no sideways scrolling"
    outside = (
        "[...document.querySelectorAll('main *, nav *')].filter((e) => { const b = e.getBoundingClientRect();"
        "return b.width && !e.closest('clipPath, g, .scroll, .tok') && (b.left < 0 || b.right > 390); })"
        ".map((e) => e.outerHTML)"
    )
    chip = "document.querySelector('#response .done').getBoundingClientRect()"
    browser.tap(*browser.evaluate(f"[{chip}.x + {chip}.width / 2, {chip}.y + {chip}.height / 2]"))
    assert browser.evaluate("document.querySelectorAll('#position tbody tr').length") >= 1
    for step in range(0, len(trace.steps), 5):
        browser.evaluate(f"go({step})")
        assert browser.evaluate(outside) == []
    assert (
        browser.evaluate("Math.min(...[...document.querySelectorAll('nav button')].map((b) => b.offsetHeight))") >= 44
    )
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert browser.messages == [] and len(browser.requests) == 1


def test_hostile_texts_are_shown_and_not_run(browser, embedded, tmp_path):
    data = nasty_data(embedded)
    browser.open(write(tmp_path / "t.html", data), 390, 844)
    browser.press("End")
    texts = browser.evaluate(SHOWN)
    assert "</script><script>alert(1)</script>" in texts and "😀" in texts and "↵" in texts and "&amp;" in texts
    assert browser.messages == [] and browser.evaluate("document.scripts.length") == 2
    assert browser.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize("settings", [{"rule": fdpp.Quota(), "drafts": 4}, TAKEN_BACK, EDITED], ids=str)
def test_text_has_contrast_in_both_schemes(browser, embedded, settings, tmp_path):
    """At least 4.5 to 1 (WCAG 2 AA), on every shade."""
    trace, tokenizer = trace_of(embedded, **settings)
    url = write(tmp_path / "t.html", data_of(trace, tokenizer, "tiny"))
    ratio = """(() => {
      const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
      const light = (color) => {
        canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
          .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const below = (e) => { for (; e; e = e.parentElement) {
        const color = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(color)) return color; } };
      return Math.min(...[...document.querySelectorAll("h1, h2, p, dt, dd, .tok, svg text, output, kbd, li")]
        .filter((e) => e.getBoundingClientRect().width)
        .map((e) => { const style = getComputedStyle(e);
          const pair = [light(e.matches("text") ? style.fill : style.color), light(below(e))].sort((a, b) => b - a);
          return (pair[0] + 0.05) / (pair[1] + 0.05); }));
    })()"""
    for dark in (False, True):
        browser.open(url, 1280, 900, dark=dark)
        changes = [number for number, step in enumerate(trace.steps) if step.taken or step.edited]
        for number in (0, *changes[:2], min(20, len(trace.steps) - 1), len(trace.steps) - 1):
            browser.evaluate(f"go({number})")
            assert browser.evaluate(ratio) >= 4.5
