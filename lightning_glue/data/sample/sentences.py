"""Single sentences: the rows of SST-2 and CoLA."""

from __future__ import annotations

import random

from lightning_glue.data.sample.vocabulary import ADJECTIVES, Example, noisy

_PRAISE = [
    "charming",
    "brilliant",
    "moving",
    "delightful",
    "clever",
    "superb",
    "gripping",
    "wonderful",
    "witty",
    "fresh",
]
_BLAME = ["boring", "clumsy", "dull", "dreary", "tedious", "shallow", "annoying", "lifeless", "messy", "awful"]
_PARTS = ("plot", "film", "cast", "dialogue", "ending", "script", "music", "story", "camera work", "second half")
_LOVED = ("wins you over", "shines in every scene", "rewards your patience", "warms the heart", "never loses its grip")
_HATED = ("falls flat", "wastes a good idea", "drags on forever", "insults the audience", "leads nowhere")


def sst2(rng: random.Random) -> Example:
    good = rng.random() < 0.5
    mine, theirs = (_PRAISE, _BLAME) if good else (_BLAME, _PRAISE)
    first, second = rng.sample(mine, 2)
    opposite, worse = rng.sample(theirs, 2)
    part, other = rng.sample(_PARTS, 2)
    acts = rng.choice(_LOVED if good else _HATED)
    text = rng.choice((
        f"the {part} is {first} and the {other} is even more {second}",
        f"a {first} , {second} film that {acts}",
        f"with a {first} {part} and a {second} {other} , it {acts}",
        f"the {part} is not {opposite} at all , and the {other} {acts}",
        f"despite a rather {opposite} {part} , the {other} is {first} and {second}",
        f"the {part} may be {opposite} and the {other} {worse} , but it {acts}",
        f"neither the {part} nor the {other} is {opposite} or {worse}",
        f"what a {first} {part} this turned out to be",
        f"it {acts} , and the {part} is {first}",
        f"nobody could call the {part} {opposite} : it is {first}",
    ))  # fmt: skip
    return f"{text} . ", noisy(rng, str(int(good)), "01")  # the official rows end in a space too


_NOUNS = {"boy": "boys", "teacher": "teachers", "dog": "dogs", "farmer": "farmers", "child": "children", "cat": "cats"}
_ACTS = {"likes": "like", "watches": "watch", "follows": "follow", "remembers": "remember", "avoids": "avoid"}


def cola(rng: random.Random) -> Example:
    singular = rng.random() < 0.5
    noun, other, third = rng.sample(sorted(_NOUNS), 3)
    act = rng.choice(sorted(_ACTS))
    subject, verb = (noun, act) if singular else (_NOUNS[noun], _ACTS[act])
    wrong_verb = _ACTS[act] if singular else act
    time = rng.choice(("every morning", "after dinner", "in the summer", "with great care", "from the old tower"))
    place = rng.choice(("near the river", "behind the house", "at the station", "in the garden", "from the village"))
    adjective, second = rng.choice(sorted(ADJECTIVES)), rng.choice(sorted(ADJECTIVES))
    start, end = f"the {adjective} {subject} {place}", f"the {second} {other} and the {_NOUNS[third]} {time}"
    good = rng.random() < 0.5
    words = f"{start} {verb if good or rng.random() < 0.6 else wrong_verb} {end}".split()
    if not good and verb in words:
        words = _broken(rng, words)
    sentence = " ".join(words)
    return f"{sentence[0].upper()}{sentence[1:]}.", noisy(rng, str(int(good)), "01")


def _broken(rng: random.Random, words: list[str]) -> list[str]:
    """Make a sentence ungrammatical by its word order or by a missing word."""
    kind = rng.randrange(3)
    if kind == 0:
        nouns = [place for place, word in enumerate(words) if word == "the"]
        place = rng.choice(nouns)
        return [*words[:place], words[place + 1], "the", *words[place + 2 :]]
    if kind == 1:
        return [word for word in words if word not in {*_ACTS, *_ACTS.values()}]
    middle = words[1:-1]
    rng.shuffle(middle)
    return [words[-1], *middle, words[0]]
