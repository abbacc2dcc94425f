"""Short texts with several right wordings, whose words must agree.

The prompt states a place, a word of time and a sum; the response tells of anyone who comes by that many things there:

    tell of the market , yesterday , 3 + 2 + 6 :
    the king bought 4 pears at the market earlier . then he took 5 more . at last he got 2 with his friend .
    in all he had 11 pears .

Who, which things, how many at a time, which verbs and which of the sentences' forms are a free choice of the response,
of which nothing is copied from the prompt but the place. A choice once made binds the rest: pronouns go with who it is,
verbs with who it is and with the time, the things stay the same, the parts add up to the prompt's sum.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from fdpp.tiny.task import END, OPEN, Recipe, Task, check_split, spaced, split_by

PEOPLE = {
    "she": ("the girl", "my aunt", "my sister", "the queen"),
    "he": ("the boy", "my uncle", "my brother", "the king"),
    "they": ("the twins", "my cousins", "my parents", "the children"),
}
FORMS = {"she": ("her", "her"), "he": ("his", "him"), "they": ("their", "them")}
"""By pronoun: "their" and "them"."""
FRIENDS = ("friend", "dog", "teacher", "neighbour")
TIMES = {
    "past": ("yesterday", "earlier", "once"),
    "present": ("today", "now", "currently"),
    "future": ("tomorrow", "soon", "later"),
}
PLACES = {
    "market": (("apples", "pears", "plums", "eggs"), ("buy", "take", "get")),
    "beach": (("shells", "stones", "corks", "feathers"), ("find", "gather", "see")),
    "garden": (("roses", "beans", "tulips", "leeks"), ("pick", "cut", "grow")),
    "bakery": (("cakes", "pies", "rolls", "tarts"), ("bake", "make", "burn")),
    "library": (("books", "maps", "poems", "letters"), ("read", "borrow", "copy")),
    "pond": (("ducks", "frogs", "newts", "swans"), ("feed", "count", "draw")),
}
"""By place: its things, and what one does there."""
VERBS = {
    "buy": ("bought", "buys"), "take": ("took", "takes"), "get": ("got", "gets"),
    "find": ("found", "finds"), "gather": ("gathered", "gathers"), "see": ("saw", "sees"),
    "pick": ("picked", "picks"), "cut": ("cut", "cuts"), "grow": ("grew", "grows"),
    "bake": ("baked", "bakes"), "make": ("made", "makes"), "burn": ("burned", "burns"),
    "read": ("read", "reads"), "borrow": ("borrowed", "borrows"), "copy": ("copied", "copies"),
    "feed": ("fed", "feeds"), "count": ("counted", "counts"), "draw": ("drew", "draws"),
    "have": ("had", "has"),
}  # fmt: skip
"""By verb: its past, and its present with she or he."""
SENTENCES = (
    (
        "{time} {who} {does} {first} {things} at the {place} .",
        "{who} {does} {first} {things} at the {place} {time} .",
    ),
    (
        "then {they} {does} {second} more .",
        "after that {they} {does} {second} more .",
        "{they} {does} {second} for {their} {friend} too .",
    ),
    (
        "at last {they} {does} {third} with {their} {friend} .",
        "in the end {they} {does} {third} more {things} .",
    ),
    (
        "so {they} {has} {total} {things} in all .",
        "in all {they} {has} {total} {things} .",
        "{their} {friend} tells {them} that {they} {has} {total} .",
    ),
)
"""The sentences of a story, of one of these forms each."""
COUNTS = ("{first}", "{second}", "{third}", "{total}")
PART = range(1, 7)
MIN_TOTAL, MAX_TOTAL = 6, 18
NUMBERS = tuple(str(number) for number in range(1, MAX_TOTAL + 1))
VERB_FORMS = tuple(dict.fromkeys(form for verb, forms in VERBS.items() for form in (verb, *forms)))


def _words() -> tuple[str, ...]:
    templates = re.sub(r"{\w+}", "", " ".join(form for forms in SENTENCES for form in forms)).split()
    people = " ".join(who for group in PEOPLE.values() for who in group).split()
    things = [thing for names, _ in PLACES.values() for thing in names]
    times = [time for group in TIMES.values() for time in group]
    pronouns = [word for forms in FORMS.values() for word in forms]
    other = [*PEOPLE, *pronouns, *FRIENDS, "tell", "of", "the", ",", "+", ":", "will"]
    return tuple(dict.fromkeys([*templates, *people, *things, *times, *PLACES, *other, *VERB_FORMS, *NUMBERS]))


WORDS = _words()
"""Every word that a story or its prompt can hold."""

PROMPT = re.compile(
    rf"tell of the (?:{'|'.join(PLACES)}) , (?:{'|'.join(time for group in TIMES.values() for time in group)}) , "
    r"(\d+) \+ (\d+) \+ (\d+) :"
)


@dataclass(frozen=True)
class Story:
    """One problem: what its prompt asks for, and a `response` that is right."""

    place: str
    time: str
    parts: tuple[int, int, int]
    response: str

    @property
    def prompt(self) -> str:
        return f"tell of the {self.place} , {self.time} , {' + '.join(map(str, self.parts))} :"

    @property
    def tense(self) -> str:
        return next(tense for tense, times in TIMES.items() if self.time in times)

    @property
    def split(self) -> str:
        return split_of(self.place, self.time, self.parts)


def split_of(place: str, time: str, parts: tuple[int, ...]) -> str:
    """The split of a prompt, the same in whatever order its numbers stand: one in eight is held out."""
    return split_by(" ".join([place, time, *map(str, sorted(parts))]))


def generate(split: str, count: int, seed: int = 0) -> list[Story]:
    """`count` stories of a split ("train" or "held-out"), the same for the same seed."""
    check_split(split)
    rng = random.Random(seed)
    return [_draw(rng, split) for _ in range(count)]


def is_right(text: str, problem: Story) -> bool:
    """Whether a response is a story of the grammar whose words agree, and of the prompt's place, time and sum."""
    text = text.split(END)[0].strip()
    for they, people in PEOPLE.items():
        for who in people:
            for things in PLACES[problem.place][0]:
                told = pattern(problem.place, problem.tense, they, who, things).fullmatch(text)
                if told is not None:
                    *parts, total = (int(number) for number in told.groups() if number is not None)
                    return sum(parts) == total == sum(problem.parts)
    return False


def is_problem(text: str) -> bool:
    """Whether the model was trained on prompts like `text`: its form, place, word of time and size of numbers."""
    asked = PROMPT.fullmatch(spaced(text))
    if asked is None:
        return False
    parts = [int(number) for number in asked.groups()]
    return all(part in PART for part in parts) and sum(parts) >= MIN_TOTAL


def completable(words: Sequence[str], problem: Story) -> bool:
    """Whether some right response, filled up with `<eos>`, has all of these words; `<mask>` is open."""
    total, told = sum(problem.parts), [(at, word) for at, word in enumerate(words) if word != OPEN]
    for slots in layouts(problem.place, problem.tense):
        if len(slots) > len(words) or not all(
            word in slots[at] if at < len(slots) else word == END for at, word in told
        ):
            continue
        *parts, stated = [words[at] for at, slot in enumerate(slots) if slot == NUMBERS]
        known = sum(int(part) for part in parts if part != OPEN)
        left = parts.count(OPEN)
        if stated in (OPEN, str(total)) and (known + left <= total if left else known == total):
            return True
    return False


@cache
def layouts(place: str, tense: str) -> list[list[tuple[str, ...]]]:
    """The words that may stand at every position, for every choice of person, things and forms of sentences."""
    made = []
    for they, people in PEOPLE.items():
        for who, things in product(people, PLACES[place][0]):
            fields = {f"{{{name}}}": words for name, words in choices(place, tense, they, who, things).items()}
            for forms in product(*SENTENCES):
                slots: list[tuple[str, ...]] = []
                for word in " ".join(forms).split():
                    phrases = NUMBERS if word in COUNTS else fields.get(word, (word,))
                    slots += [tuple(dict.fromkeys(at)) for at in zip(*map(str.split, phrases), strict=True)]
                made.append(slots)
    return made


def conjugated(verb: str, tense: str, they: str) -> str:
    past, with_s = VERBS[verb]
    return {"past": past, "future": f"will {verb}", "present": verb if they == "they" else with_s}[tense]


def choices(place: str, tense: str, they: str, who: str, things: str) -> dict[str, tuple[str, ...]]:
    """The words that may stand for a field of `SENTENCES`, the numbers left out."""
    their, them = FORMS[they]
    does = tuple(conjugated(verb, tense, they) for verb in PLACES[place][1])
    has = conjugated("have", tense, they)
    fixed = {"who": who, "they": they, "their": their, "them": them, "things": things, "place": place, "has": has}
    return {field: (word,) for field, word in fixed.items()} | {"does": does, "time": TIMES[tense], "friend": FRIENDS}


@cache
def pattern(place: str, tense: str, they: str, who: str, things: str) -> re.Pattern[str]:
    """All stories of these choices; its four groups are their numbers."""
    fields = choices(place, tense, they, who, things)
    said = {name: f"(?:{'|'.join(words)})" for name, words in fields.items()}
    said |= dict.fromkeys(("first", "second", "third", "total"), "([1-9][0-9]*)")
    # A form's full stop is the only sign that means something else in a pattern.
    forms = [[form.replace(".", r"\.").format_map(said) for form in sentence] for sentence in SENTENCES]
    return re.compile(" ".join(f"(?:{'|'.join(sentence)})" for sentence in forms))


def _draw(rng: random.Random, split: str) -> Story:
    while True:
        place, tense = rng.choice(list(PLACES)), rng.choice(list(TIMES))
        time, parts = rng.choice(TIMES[tense]), (rng.choice(PART), rng.choice(PART), rng.choice(PART))
        if sum(parts) >= MIN_TOTAL and split_of(place, time, parts) == split:
            return Story(place, time, parts, _write(rng, place, tense, sum(parts)))


def _write(rng: random.Random, place: str, tense: str, total: int) -> str:
    they = rng.choice(list(PEOPLE))
    free = choices(place, tense, they, rng.choice(PEOPLE[they]), rng.choice(PLACES[place][0]))
    cuts = sorted(rng.sample(range(1, total), 2))
    numbers = {"first": cuts[0], "second": cuts[1] - cuts[0], "third": total - cuts[1], "total": total}
    sentences = []
    for forms in SENTENCES:
        said = {name: rng.choice(words) for name, words in free.items()}
        sentences.append(rng.choice(forms).format(**said, **numbers))
    return " ".join(sentences)


TASK = Task(
    name="stories",
    words=WORDS,
    generate=generate,
    is_right=is_right,
    is_problem=is_problem,
    completable=completable,
    max_new_tokens=48,
    block_length=24,
    recipe=Recipe(steps=2500, cached_steps=1000, tokens=4096, late=VERB_FORMS, recent=True),
)

BLOCK_TASK = replace(
    TASK,
    name="stories-block",
    family="sdar",
    block_length=16,
    recipe=Recipe(steps=3500, cached_steps=0, tokens=4096, late=VERB_FORMS),
)
"""The same for a block-diffusion model. A prompt of 13 tokens opens its first block of 16."""
