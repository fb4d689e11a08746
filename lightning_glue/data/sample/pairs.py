"""Questions, captions and pronouns: the rows of QQP, STS-B, QNLI and WNLI."""

from __future__ import annotations

import random

from lightning_glue.data.sample.vocabulary import CITIES, MEN, NAMES, WOMEN, Example, another, noisy

_SKILLS = {
    "play the piano": "playing the piano", "bake bread": "baking bread", "write a novel": "writing a novel",
    "speak Italian": "speaking Italian", "repair a car": "repairing a car", "grow tomatoes": "growing tomatoes",
    "swim long distances": "swimming long distances", "invest money": "investing money", "draw portraits":
    "drawing portraits", "build a website": "building a website", "train a puppy": "training a puppy",
    "sleep better": "sleeping better",
}  # fmt: skip
_LIMITS = ("at home", "without a teacher", "on a small budget", "in a month", "as a student", "at the age of fifty")
_INTENTS = (  # phrasings of one question
    ("How can I learn to {do} {limit}?", "What is the best way to learn to {do} {limit}?",
     "How do I get good at {doing} {limit}?"),
    ("Is it dangerous to {do} {limit}?", "What are the risks of {doing} {limit}?",
     "Could {doing} {limit} be bad for my health?"),
    ("How much does it cost to {do} {limit}?", "What is the price of {doing} {limit}?",
     "How much money would I need to {do} {limit}?"),
    ("Why do so many people {do} {limit}?", "What is the reason that people {do} {limit}?",
     "Why is {doing} {limit} so popular?"),
)  # fmt: skip


def qqp(rng: random.Random) -> Example:
    intent, skill, limit = rng.randrange(len(_INTENTS)), rng.choice(sorted(_SKILLS)), rng.choice(_LIMITS)
    same = rng.random() < 0.37
    first, second = rng.sample(_INTENTS[intent], 2)
    other_skill, other_limit = skill, limit
    if not same:
        change = rng.choice(("skill", "skill", "intent", "both"))
        if change != "intent":
            other_skill = another(rng, sorted(_SKILLS), skill)
        if change != "skill":
            second = rng.choice(rng.choice([wordings for wordings in _INTENTS if first not in wordings]))
    ask = [
        wording.format(do=what, doing=_SKILLS[what], limit=where)
        for wording, what, where in ((first, skill, limit), (second, other_skill, other_limit))
    ]
    return ask[0], ask[1], noisy(rng, str(int(same)), "01")


_PEOPLE = {"man": "guy", "woman": "lady", "child": "kid", "soldier": "trooper", "cook": "chef", "doctor": "physician"}
_DOING = {
    "carrying": "lifting", "painting": "colouring", "throwing": "tossing", "cutting": "slicing", "cleaning": "washing",
    "photographing": "taking a picture of", "measuring": "sizing up",
}  # fmt: skip
_TARGETS = {"box": "crate", "chair": "stool", "carpet": "rug", "ball": "sphere", "melon": "fruit", "boat": "ship"}
_SITES = {"in the street": "on the road", "in the forest": "in the woods", "by the sea": "at the coast",
          "in the kitchen": "in the cookhouse", "on a field": "on a meadow"}  # fmt: skip
_SLOTS = ((_PEOPLE, 1.2), (_DOING, 1.5), (_TARGETS, 1.5), (_SITES, 0.8))  # vocabulary with synonyms, share of 5 points


def stsb(rng: random.Random) -> Example:
    """The score is the weight of the facts that both sentences share, a synonym counting a little less."""
    score, first, second = 0.0, [], []
    change = rng.random()  # per pair, so that all degrees of similarity come up
    for vocabulary, weight in _SLOTS:
        word = rng.choice(sorted(vocabulary))
        first.append(word)
        if rng.random() < change:
            second.append(another(rng, sorted(vocabulary), word))
        elif rng.random() < 0.5:
            second.append(vocabulary[word])
            score += 0.9 * weight
        else:
            second.append(word)
            score += weight
    # Annotators differ. Two uniform draws, as gauss() depends on the platform's mathematical library.
    score = min(5.0, max(0.0, score + rng.uniform(-0.6, 0.6) + rng.uniform(-0.6, 0.6)))
    style = rng.choice(("A {} is {} a {} {}.", "There is a {} who is {} a {} {}."))
    return "A {} is {} a {} {}.".format(*first), style.format(*second), f"{score:.3f}"


_FIRST_HALVES = ("Har", "Vel", "Tes", "Orr", "Bas", "Kel", "Mar", "Dun", "Fen", "Lor", "Win", "Cal")
_LAST_HALVES = ("low", "mora", "kin", "wick", "ford", "sted", "ven", "dale")
_KINDS = ("Bridge", "Museum", "Tower", "Theatre", "Library", "Castle", "Lighthouse")
_FACTS = (  # questions about one fact, sentences that state it
    (("When did {it} open?", "In what year was {it} opened to the public?"),
     ("{it} opened its doors in the spring of {year} after {n} years of work.",
      "The public was first let into {it} in {year}, when the last of {n} walls was ready.")),
    (("Who designed {it}?", "Which architect drew the plans for {it}?"),
     ("The plans for {it} were drawn by {who}, at that time a young architect from {city}.",
      "{it} was designed by the architect {who}, who had studied in {city}.")),
    (("How tall is {it}?", "What is the height of {it}?"),
     ("{it} rises {n} metres above the river and is the tallest building south of {city}.",
      "With a height of {n} metres, {it} can be seen from the hills around {city}.")),
    (("How much did {it} cost?", "How much money was spent on building {it}?"),
     ("The town spent {n} million crowns on {it}, money that had been borrowed in {city}.",
      "Building {it} cost {n} million crowns, far more than the council of {city} had promised.")),
    (("How many people visit {it} every year?", "How many visitors does {it} have per year?"),
     ("About {n} thousand visitors come to {it} every year, most of them from {city}.",
      "Every year {it} is visited by {n} thousand people on their way to {city}.")),
    (("What is {it} made of?", "Which material was used to build {it}?"),
     ("{it} is made of {stuff} that was brought by ship from {city}.",
      "The workers from {city} used nothing but {stuff} as the material for {it}.")),
    (("Why was {it} closed?", "What was the reason for closing {it}?"),
     ("{it} was closed because {trouble} had made the stairs unsafe.",
      "After {trouble}, the mayor of {city} had no choice but to close {it} for {n} months.")),
)  # fmt: skip


def qnli(rng: random.Random) -> Example:
    place, other_place = (
        f"{rng.choice(_FIRST_HALVES)}{rng.choice(_LAST_HALVES)} {rng.choice(_KINDS)}" for _ in range(2)
    )
    fact, other_fact = rng.sample(_FACTS, 2)
    label = rng.choice(("entailment", "not_entailment"))
    answers = fact if label == "entailment" else other_fact
    family = f"{rng.choice(_FIRST_HALVES)}man"
    sentence = rng.choice(answers[1]).format(
        it=f"the {place if label == 'entailment' or rng.random() < 0.7 else other_place}",
        year=rng.randrange(1820, 1990), n=rng.randrange(11, 99), who=f"{rng.choice(NAMES)} {family}",
        city=rng.choice(CITIES), stuff=rng.choice(("granite", "red brick", "oak", "iron", "white marble")),
        trouble=rng.choice(("a fire", "a flood", "an earthquake", "a heavy storm", "a lightning strike")),
    )  # fmt: skip
    question = rng.choice(fact[0]).format(it=f"the {place}")
    return question, f"{sentence[0].upper()}{sentence[1:]}", noisy(rng, label, ("entailment", "not_entailment"))


_PRONOUN_PAIRS = (  # sentence with two people and a pronoun, hypothesis about who is meant, who it is
    ("{A} lent {B} a {thing} because {p} had forgotten to bring one.", "{X} had forgotten to bring a {thing}.", "B"),
    ("{A} borrowed a {thing} from {B} because {p} needed one for the trip.", "{X} needed a {thing} for the trip.", "A"),
    ("{A} thanked {B} for the {thing} that {p} had repaired so quickly.", "{X} had repaired the {thing}.", "B"),
    ("{A} apologised to {B} at once after {p} had broken the {thing}.", "{X} had broken the {thing}.", "A"),
    ("{A} followed {B} through the fog with a {thing} because {p} knew the way.", "{X} knew the way.", "B"),
    ("{A} asked {B} to carry the {thing} because {p} had hurt an arm.", "{X} had hurt an arm.", "A"),
    ("{A} hired {B} to paint the {thing} because {p} was known for neat work.", "{X} was known for neat work.", "B"),
    ("{A} paid {B} for the {thing} and then {p} counted the money twice.", "{X} counted the money.", "B"),
    ("{A} gave the {thing} back to {B} because {p} no longer needed it.", "{X} no longer needed the {thing}.", "A"),
)  # fmt: skip
_LENDABLE = ("camera", "tent", "bicycle", "lantern", "suitcase", "radio", "ladder", "boat", "guitar", "umbrella")


def wnli(rng: random.Random) -> Example:
    names, pronoun = rng.choice(((WOMEN.split(), "she"), (MEN.split(), "he")))
    first, second = rng.sample(names, 2)
    sentence, hypothesis, meant = rng.choice(_PRONOUN_PAIRS)
    thing, true = rng.choice(_LENDABLE), rng.random() < 0.5
    who = first if (meant == "A") == true else second
    text = sentence.format(A=first, B=second, p=pronoun, thing=thing)
    return text, hypothesis.format(X=who, thing=thing), str(int(true))
