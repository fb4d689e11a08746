"""Who did what, told in several ways: the rows of MRPC, MNLI, RTE and the diagnostic set."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lightning_glue.data.sample.vocabulary import (
    ADJECTIVES,
    CITIES,
    DAYS,
    JOBS,
    NAMES,
    NUMBERS,
    PLACES,
    REASONS,
    THINGS,
    VERBS,
    Example,
    Verb,
    another,
    noisy,
)


@dataclass(frozen=True)
class _Event:
    name: str
    job: str
    city: str
    verb: Verb
    number: str
    adjective: str
    thing: str
    place: str
    day: str


def _event(rng: random.Random) -> _Event:
    job, adjective, thing = rng.choice(list(JOBS)), rng.choice(list(ADJECTIVES)), rng.choice(list(THINGS))
    return _Event(
        rng.choice(NAMES), job, rng.choice(CITIES), rng.choice(VERBS), rng.choice(NUMBERS), adjective, thing,
        rng.choice(PLACES), rng.choice(DAYS),
    )  # fmt: skip


def _tell(event: _Event, style: int, *, synonyms: bool = False) -> str:
    """Tell an event in one of three word orders, with the plain words or with their synonyms."""
    verb = event.verb.synonym if synonyms else event.verb.past
    adjective = ADJECTIVES[event.adjective] if synonyms else event.adjective
    thing = THINGS[event.thing][0] if synonyms else event.thing
    what = f"{event.number} {adjective} {thing}"
    if style == 0:
        return f"{event.name}, a {event.job} from {event.city}, {verb} {what} near the {event.place} on {event.day}."
    if style == 1:
        return f"On {event.day}, near the {event.place}, {event.job} {event.name} from {event.city} {verb} {what}."
    return f"Near the {event.place}, a {event.job} from {event.city} called {event.name} {verb} {what} on {event.day}."


def _retell(rng: random.Random, event: _Event, style: int) -> str:
    """Tell an event in another word order than ``style``."""
    return _tell(event, (style + rng.choice((1, 2))) % 3, synonyms=rng.random() < 0.7)


def _changed(rng: random.Random, event: _Event) -> _Event:
    """The same scene with one to three other facts."""
    changes: dict[str, Callable[[], Any]] = {
        "name": lambda: another(rng, NAMES, event.name),
        "thing": lambda: another(rng, THINGS, event.thing),
        "number": lambda: another(rng, NUMBERS, event.number),
        "place": lambda: another(rng, PLACES, event.place),
        "verb": lambda: rng.choice([verb for verb in VERBS if verb != event.verb]),
    }
    chosen = rng.sample(sorted(changes), rng.choice((1, 1, 2, 3)))
    return replace(event, **{field: changes[field]() for field in chosen})


def _entailed(rng: random.Random, event: _Event) -> str:
    verb = rng.choice((event.verb.past, event.verb.synonym))
    synonym, hypernym = THINGS[event.thing]
    return rng.choice((
        f"{event.name} {verb} some {event.thing}.",
        f"{event.name} {verb} some {synonym} near the {event.place}.",
        f"On {event.day} {event.name} {verb} {event.thing}.",
        f"A {event.job} {verb} some {hypernym} near the {event.place}.",
        f"Some {hypernym} were near the {event.place} on {event.day}.",
        f"{event.name} is {JOBS[event.job]} from {event.city}.",
        f"It is not true that {event.name} never {event.verb.past} any {event.thing}.",
    ))  # fmt: skip


def _contradicted(rng: random.Random, event: _Event) -> str:
    return rng.choice((
        f"{event.name} did not {event.verb.base} any {event.thing}.",
        f"{event.name} never {event.verb.past} any {event.thing} near the {event.place}.",
        f"{event.name} {event.verb.opposite} all of the {event.thing} near the {event.place}.",
        f"Nobody {event.verb.past} anything near the {event.place} on {event.day}.",
        f"{event.name} is not a {event.job}.",
        f"{event.name} is {another(rng, JOBS.values(), JOBS[event.job])} from {event.city}.",
        f"It is not true that {event.name} {event.verb.past} any {event.thing}.",
        f"{event.name} {event.verb.past} no more than one of the {event.thing}.",
    ))  # fmt: skip


def _unsettled(rng: random.Random, event: _Event) -> str:
    friend = another(rng, NAMES, event.name)
    return rng.choice((
        f"{event.name} {event.verb.past} the {event.thing} {rng.choice(REASONS)}.",
        f"The {event.thing} had once belonged to {friend}.",
        f"{event.name} went to the {event.place} together with {friend}.",
        f"{event.name} hopes to leave {event.city} next year.",
        f"The {event.thing} cost more than {event.name} had expected.",
        f"{friend} was proud of {event.name} and the {event.thing}.",
    ))  # fmt: skip


_HYPOTHESES = {"entailment": _entailed, "contradiction": _contradicted, "neutral": _unsettled}


def mnli(rng: random.Random) -> Example:
    event = _event(rng)
    label = rng.choice(sorted(_HYPOTHESES))
    return _tell(event, rng.randrange(3)), _HYPOTHESES[label](rng, event), noisy(rng, label, sorted(_HYPOTHESES))


def rte(rng: random.Random) -> Example:
    """Two sentences about two people; the hypothesis is about one of them."""
    first = _event(rng)
    second = replace(_event(rng), name=another(rng, NAMES, first.name), thing=another(rng, THINGS, first.thing))
    styles = rng.sample(range(3), 2)
    premise = f"{_tell(first, styles[0])} {_tell(second, styles[1])}"
    label = rng.choice(("entailment", "not_entailment"))
    event, other = rng.sample((first, second), 2)
    if label == "not_entailment" and rng.random() < 0.15:
        hypothesis = f"{other.name} {event.verb.past} some {event.thing}."  # the wrong one of the two
    else:
        kind = label if label == "entailment" else rng.choice(("contradiction", "neutral"))
        hypothesis = _HYPOTHESES[kind](rng, event)
    return premise, hypothesis, noisy(rng, label, ("entailment", "not_entailment"))


def mrpc(rng: random.Random) -> Example:
    event, style = _event(rng), rng.randrange(3)
    same = rng.random() < 0.67
    second = _retell(rng, event if same else _changed(rng, event), style)
    return _tell(event, style), second, noisy(rng, str(int(same)), "01")
