"""The stories: which wordings are right, what a partial one can become, and the split."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from fdpp.tiny import stories
from fdpp.tiny.stories import NUMBERS, Story

LENGTH = 48
OPEN, END = "<mask>", "<eos>"
ASKED = Story("market", "yesterday", (3, 2, 6), "")
TOLD = (
    "the king bought 4 pears at the market earlier . then he took 5 more . "
    "at last he got 2 with his friend . in all he had 11 pears ."
)


def written(problem: Story, count: int, seed: int) -> list[str]:
    """Right responses to one prompt."""
    rng = random.Random(seed)
    return [stories._write(rng, problem.place, problem.tense, sum(problem.parts)) for _ in range(count)]


def filled(text: str) -> list[str]:
    words = text.split()
    return words + [END] * (LENGTH - len(words))


def agree(state: Sequence[str], words: Sequence[str]) -> bool:
    return all(said in (OPEN, word) for said, word in zip(state, words, strict=True))


def same_kind(told: str, problem: Story) -> dict[str, set[str]]:
    """By word of a response: the words that may stand in its place if nothing else changes, itself included.

    Written from the lists of words alone.
    """
    they = next(they for they, people in stories.PEOPLE.items() if any(who in told for who in people))
    verbs = {stories.conjugated(verb, problem.tense, they).split()[-1] for verb in stories.PLACES[problem.place][1]}
    groups = [verbs, {*stories.TIMES[problem.tense]}, {*stories.FRIENDS}]
    people = [who.split() for who in stories.PEOPLE[they]]
    groups += [{name for other, name in people if other == first} for first in ("the", "my")]
    things = {*stories.PLACES[problem.place][0]}
    [thing] = things & {*told.split()}
    if told.split().count(thing) == 1:
        groups.append(things)
    return {word: group for group in groups for word in group}


def test_a_response_is_right_for_every_prompt_of_its_place_time_and_sum() -> None:
    def asked(story: Story) -> tuple[str, str, int]:
        return story.place, story.tense, sum(story.parts)

    told, others = stories.generate("train", 60, seed=1), stories.generate("held-out", 200, seed=1)
    for story in told:
        assert all(stories.is_right(story.response, other) == (asked(story) == asked(other)) for other in others)
    assert sum(asked(story) == asked(other) for story in told for other in others) > 30


def test_responses_are_of_every_kind() -> None:
    told = [story.response.split() for story in stories.generate("train", 3000, seed=2)]
    assert {word for words in told for word in words} >= {*stories.WORDS} - {"tell", "of", ",", "+", ":", *NUMBERS}
    assert max(map(len, told)) < LENGTH


@pytest.mark.parametrize("tense", stories.TIMES)
@pytest.mark.parametrize("place", stories.PLACES)
def test_every_layout_fits_the_response(place: str, tense: str) -> None:
    assert max(map(len, stories.layouts(place, tense))) < LENGTH


@pytest.mark.parametrize("seed", range(6))
def test_another_word_is_right_only_if_it_says_as_much(seed: int) -> None:
    """Of all changes of one word, those are right that the lists of words allow, and no others can be completed."""
    rng = random.Random(seed)
    problem = stories.generate("held-out", 1, seed=seed)[0]
    words = filled(problem.response)
    allowed = same_kind(problem.response, problem)
    right = 0
    for at, told in enumerate(problem.response.split()):
        for word in stories.WORDS:
            state = [*words[:at], word, *words[at + 1 :]]
            verdict = stories.is_right(" ".join(state), problem)
            assert verdict == (word == told or word in allowed.get(told, ())), (at, told, word)
            if verdict or rng.random() < 0.1:
                assert stories.completable(state, problem) == verdict, (at, told, word)
            right += verdict and word != told
    assert right >= 8


MUTATIONS = {
    "a pronoun": ("then he", "then she"),
    "a pronoun of several": ("then he", "then they"),
    "whose friend": ("his friend", "her friend"),
    "a word of another time": ("earlier", "tomorrow"),
    "the prompt's word of time, in another tense": ("earlier", "today"),
    "a verb in another tense": ("took", "takes"),
    "a verb to come": ("took", "will take"),
    "to have in another tense": ("had", "has"),
    "a verb of another place": ("bought", "baked"),
    "a part": ("took 5", "took 6"),
    "the sum": ("had 11", "had 12"),
    "a part and the sum": ("took 5 more . at last he got 2 with his friend . in all he had 11",
                           "took 6 more . at last he got 2 with his friend . in all he had 12"),
    "no number": ("took 5 more", "took more"),
    "nothing at first": ("bought 4 pears at the market earlier . then he took 5",
                         "bought 0 pears at the market earlier . then he took 9"),
    "a zero before a number": ("had 11", "had 011"),
    "other things in the end": ("11 pears", "11 plums"),
    "other things at first": ("4 pears", "4 eggs"),
    "a friend who is none": ("his friend", "his king"),
    "another place": ("the market", "the beach"),
    "a person of another pronoun": ("the king", "the queen"),
    "somebody's of nobody": ("the king", "the brother"),
    "no person": ("the king bought", "bought"),
    "a sentence missing": ("then he took 5 more . ", ""),
    "a sentence missing, the sum right": ("bought 4 pears at the market earlier . then he took 5 more",
                                          "bought 9 pears at the market earlier"),
    "sentences in another order": ("then he took 5 more . at last he got 2 with his friend .",
                                   "at last he got 2 with his friend . then he took 5 more ."),
    "a sentence twice": ("then he took 5 more .", "then he took 3 more . then he took 2 more ."),
    "the last sentence missing": (" in all he had 11 pears .", ""),
    "a word too many": ("5 more", "5 more more"),
    "words after it": ("11 pears .", "11 pears . the king"),
    "a word first": ("the king", "so the king"),
    "no full stop": ("11 pears .", "11 pears"),
    "another sign": ("earlier .", "earlier ,"),
    "a capital": ("the king", "The king"),
    "an open word": ("took", "<mask>"),
    "an end in the midst": ("took", "<eos>"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MUTATIONS)
def test_what_does_not_agree_is_wrong(kind: str) -> None:
    before, after = MUTATIONS[kind]
    text = TOLD.replace(before, after, 1)
    assert text != TOLD and TOLD.count(before) == 1
    assert not stories.is_right(text, ASKED)
    if "<" not in after:
        assert not stories.completable(filled(text), ASKED)


@pytest.mark.parametrize(
    "text",
    [
        TOLD,
        f"{TOLD} <eos>",
        f"  {TOLD}<eos> the king",
        TOLD.replace("pears", "eggs"),
        TOLD.replace("king", "boy"),
        TOLD.replace("friend", "neighbour"),
        TOLD.replace("bought 4", "got 1").replace("took 5", "took 8"),
        TOLD.replace("the king", "my aunt").replace("he ", "she ").replace("tshe ", "the ").replace("his", "her"),
        TOLD.replace("then he took 5 more", "he took 5 for his dog too"),
        TOLD.replace("in all he had 11 pears", "his teacher tells him that he had 11"),
    ],
    ids=["plain", "end", "after-end", "things", "person", "friend", "parts", "pronoun", "second-form", "last-form"],
)
def test_other_wordings_are_right(text: str) -> None:
    assert stories.is_right(text, ASKED)
    assert stories.completable(filled(text.split("<eos>")[0]), ASKED)


def test_what_agrees_with_a_right_response_can_be_completed() -> None:
    """3,000 right responses, and states that hold some words of one of them or of two."""
    rng, outcomes = random.Random(4), []
    told = [filled(text) for text in written(ASKED, 3000, seed=4)]
    for _ in range(300):
        one, other = rng.sample(told, 2)
        keep, mixed = rng.choice((0.05, 0.2, 0.5, 1.0)), rng.choice((0.0, 0.1, 0.5))
        state = [
            (b if rng.random() < mixed else a) if rng.random() < keep else OPEN for a, b in zip(one, other, strict=True)
        ]
        outcomes.append(stories.completable(state, ASKED))
        assert outcomes[-1] or not any(agree(state, words) for words in told)
    assert min(outcomes.count(True), outcomes.count(False)) > 50


def response_with(state: Sequence[str], problem: Story) -> str | None:
    """Some right response that has the words of `state`, found by trying numbers from left to right."""
    total = sum(problem.parts)

    def rest(slots: list[list[str]], told: list[str], numbers: list[int]) -> list[str] | None:
        left = 4 - len(numbers)
        if left == 0 and (sum(numbers[:3]) != total or numbers[3] != total):
            return None
        if len(told) == len(slots):
            return told
        words = slots[len(told)]
        if not words[0].isdigit():
            return rest(slots, [*told, words[0]], numbers)
        for word in words:
            found = rest(slots, [*told, word], [*numbers, int(word)])
            if found is not None:
                return found
        return None

    for layout in stories.layouts(problem.place, problem.tense):
        slots = [[word for word in slot if said in (OPEN, word)] for slot, said in zip(layout, state, strict=False)]
        if all(slots) and all(word in (OPEN, END) for word in state[len(layout) :]):
            found = rest(slots, [], [])
            if found is not None:
                return " ".join(found)
    return None


def test_mixed_responses_can_be_completed_where_a_response_is_found() -> None:
    rng, outcomes = random.Random(5), []
    for problem in stories.generate("held-out", 4, seed=9):
        told = [filled(text) for text in written(problem, 200, seed=5)]
        for _ in range(60):
            one, other = rng.sample(told, 2)
            at, keep = rng.randrange(LENGTH), rng.choice((0.3, 0.7, 1.0))
            pairs = zip(one, other, strict=True)
            words = [*one[:at], *other[at:]] if rng.random() < 0.7 else [rng.choice(pair) for pair in pairs]
            state = [word if rng.random() < keep else OPEN for word in words]
            found = response_with(state, problem)
            outcomes.append(found is not None)
            assert stories.completable(state, problem) == outcomes[-1], state
            if found is not None:
                assert stories.is_right(found, problem) and agree(state, filled(found))
    assert min(outcomes.count(True), outcomes.count(False)) > 50


def test_one_open_word_against_every_word() -> None:
    """Where all but one word is there, all words are tried."""
    rng, outcomes = random.Random(6), []
    told = written(ASKED, 60, seed=6)
    for text in told:
        words = filled(text)
        other = filled(rng.choice(told))
        for at in rng.sample(range(len(text.split())), 2):
            state = list(words)
            change = rng.randrange(len(text.split()))
            if rng.random() < 0.5:
                state[change] = other[change]
            state[at] = OPEN
            tried = ([*state[:at], word, *state[at + 1 :]] for word in stories.WORDS)
            outcomes.append(any(stories.is_right(" ".join(each), ASKED) for each in tried))
            assert stories.completable(state, ASKED) == outcomes[-1], state
    assert min(outcomes.count(True), outcomes.count(False)) > 20


@pytest.mark.parametrize("count", [1, 2])
def test_open_numbers_against_every_number(count: int) -> None:
    rng, outcomes = random.Random(count), []
    for text in written(ASKED, 12, seed=count):
        words = filled(text)
        places = [at for at, word in enumerate(words) if word.isdigit()]
        for shown in itertools.combinations(places, count):
            state = list(words)
            for at in places:
                if at in shown:
                    state[at] = OPEN
                elif rng.random() < 0.5:
                    state[at] = rng.choice((*NUMBERS, *["11"] * 4))
            tried = []
            for numbers in itertools.product(NUMBERS, repeat=count):
                each = list(state)
                for at, number in zip(shown, numbers, strict=True):
                    each[at] = number
                tried.append(" ".join(each[: len(text.split())]))
            outcomes.append(any(stories.is_right(each, ASKED) for each in tried))
            assert stories.completable(state, ASKED) == outcomes[-1], state
    assert min(outcomes.count(True), outcomes.count(False)) > 5


def test_a_state_may_be_longer_but_not_shorter_than_a_response() -> None:
    words = TOLD.split()
    assert stories.completable(words, ASKED)
    assert stories.completable([*words, END, OPEN, END], ASKED)
    assert not stories.completable(words[:-1], ASKED)
    assert not stories.completable([*words, END, "the"], ASKED)
    assert not stories.completable([OPEN] * 10, ASKED)


def test_the_split_does_not_change_with_the_order_of_the_numbers() -> None:
    shares = []
    times = [time for group in stories.TIMES.values() for time in group]
    for place, time, parts in itertools.product(
        stories.PLACES, times, itertools.combinations_with_replacement(range(1, 7), 3)
    ):
        splits = {stories.split_of(place, time, order) for order in itertools.permutations(parts)}
        assert len(splits) == 1
        shares += splits
    assert shares.count("held-out") / len(shares) == pytest.approx(1 / 8, abs=0.03)


def test_no_held_out_prompt_is_a_training_prompt_in_any_order() -> None:
    trained = {story.prompt for story in stories.generate("train", 5000, seed=3)}
    for story in stories.generate("held-out", 1000, seed=3):
        orders = {Story(story.place, story.time, order, "").prompt for order in itertools.permutations(story.parts)}
        assert story.prompt in orders and not orders & trained


def test_prompts_state_what_is_asked() -> None:
    assert ASKED.prompt == "tell of the market , yesterday , 3 + 2 + 6 :"
    for story in stories.generate("train", 200, seed=4):
        words = story.prompt.split()
        assert words[3] == story.place and words[5] == story.time and words[5] in stories.TIMES[story.tense]
        assert tuple(map(int, words[7:12:2])) == story.parts
        assert 6 <= sum(story.parts) <= 18 and all(1 <= part <= 6 for part in story.parts)
