"""Places and works with Wikipedia page views, from the world models of Gurnee & Tegmark 2024 (upstream DBpedia).

The answers are names of Wikipedia pages: underscores and a bracketed explanation are taken off; a page that is
no name (a list, a file) is listed as rejected.
"""

from __future__ import annotations

import re
from pathlib import Path

from subjattn.facts.cities import ACCEPTED
from subjattn.facts.hub import only_file
from subjattn.facts.table import Read, Reader, read_records
from subjattn.facts.templates import TEMPLATES


_WORKS = {"song": "performer", "movie": "director", "book": "author"}
_NO_NAME = re.compile(r"^List[ _]of|[|]|:$|\.(svg|png|jpg)$", re.IGNORECASE)


def read_places(path: Path) -> Read:
    """Places and their country."""
    file = only_file(path, "world_place.csv")
    reader = Reader("world places")
    question = TEMPLATES["country"]["question"]
    for row, cells in read_records(file, reader, ("name", "country", "page_views")):
        country = re.sub(r"\s*\(.*\)$", "", cells["country"].replace("_", " ")).strip()
        if _NO_NAME.search(cells["country"]):
            reader.reject(str(file), row, f"the country {country!r} is no name")
            continue
        answers = ACCEPTED.get(country, [country])
        name, views = cells["name"], cells["page_views"]
        reader.add(str(file), row, f"place-{row}", name, "country", question, answers, popularity=views)
    return reader.read()


def read_works(path: Path) -> Read:
    """Songs, films and books, and who performed, directed or wrote them."""
    file = only_file(path, "art.csv")
    reader = Reader("world works")
    for row, cells in read_records(file, reader, ("title", "creator", "entity_type", "page_views")):
        relation = _WORKS.get(cells["entity_type"])
        if relation is None:
            reader.reject(
                str(file), row, f"the entity_type {cells['entity_type'][:80]!r} is none of {', '.join(_WORKS)}"
            )
        elif _NO_NAME.search(cells["creator"]):
            reader.reject(str(file), row, f"the creator {cells['creator'][:80]!r} is no name")
        else:
            question = TEMPLATES[relation]["question"]
            title, views = cells["title"], cells["page_views"]
            reader.add(str(file), row, f"work-{row}", title, relation, question, [cells["creator"]], popularity=views)
    return reader.read()
