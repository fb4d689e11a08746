"""The words of the generated sentences, and how one is drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

NOISE = 0.04  # share of rows of the classification tasks with a wrong label

Example = tuple[str, ...]  # the texts of one row, then its label
Make = Callable[[random.Random], Example]

WOMEN = "Alma Berit Clara Dora Edith Fiona Greta Hanna Ines Judith Karin Lena Mirja Nadia Olga Petra Rosa Sofia Tilda"
MEN = "Aron Bruno Carlos David Emil Felix Gustav Henrik Ivan Jonas Kurt Lukas Marco Nils Oscar Pavel Ruben Simon Tomas"
NAMES = (*WOMEN.split(), *MEN.split())
CITIES = tuple(
    ["Lisbon", "Oslo", "Prague", "Dublin", "Vienna", "Cairo", "Lima", "Turin", "Bergen", "Krakow", "Porto", "Delhi"]
)
JOBS = {  # job: what everyone of that job is
    "painter": "an artist", "poet": "an artist", "sculptor": "an artist", "nurse": "a medical worker",
    "dentist": "a medical worker", "surgeon": "a medical worker", "carpenter": "a tradesperson",
    "plumber": "a tradesperson", "baker": "a tradesperson", "teacher": "an educator", "professor": "an educator",
    "tutor": "an educator",
}  # fmt: skip


@dataclass(frozen=True)
class Verb:
    past: str
    synonym: str
    opposite: str
    base: str


VERBS = (
    Verb("bought", "purchased", "sold", "buy"),
    Verb("repaired", "fixed", "damaged", "repair"),
    Verb("found", "discovered", "lost", "find"),
    Verb("concealed", "covered up", "displayed", "conceal"),
    Verb("packed", "boxed up", "unpacked", "pack"),
    Verb("polished", "shined", "scratched", "polish"),
    Verb("kept", "held on to", "gave away", "keep"),
    Verb("accepted", "received", "refused", "accept"),
    Verb("borrowed", "got on loan", "lent out", "borrow"),
)
THINGS = {  # plural: (synonym, hypernym)
    "violins": ("fiddles", "instruments"), "cellos": ("bass violins", "instruments"),
    "lamps": ("lights", "household goods"), "kettles": ("tea pots", "household goods"),
    "suitcases": ("travel bags", "luggage"), "backpacks": ("rucksacks", "luggage"),
    "necklaces": ("neck chains", "jewellery"), "bracelets": ("bangles", "jewellery"),
    "bicycles": ("bikes", "vehicles"), "motorcycles": ("motorbikes", "vehicles"),
    "paintings": ("pictures", "works of art"), "statues": ("sculptures", "works of art"),
    "jackets": ("coats", "clothes"), "trousers": ("pants", "clothes"),
}  # fmt: skip
ADJECTIVES = {
    "old": "aged", "small": "little", "expensive": "costly", "pretty": "beautiful", "strange": "odd", "large": "big",
}  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty")
PLACES = ("harbour", "museum", "station", "library", "airport", "theatre", "market", "school", "castle", "hospital")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
REASONS = (
    "as a gift for an old friend", "to impress the new neighbours", "because the weather was bad", "to settle a bet",
    "for a wedding in the family", "after a long quarrel with the landlord", "on the advice of a lawyer",
    "to please a demanding uncle", "because the doctor had suggested it", "for a film about the war",
)  # fmt: skip


def another(rng: random.Random, values: Iterable[str], *taken: str) -> str:
    """One of ``values`` that is none of ``taken``."""
    return rng.choice([value for value in values if value not in taken])


def noisy(rng: random.Random, label: str, labels: Sequence[str]) -> str:
    """``label``, or in few rows a wrong one of ``labels``."""
    return another(rng, labels, label) if rng.random() < NOISE else label
