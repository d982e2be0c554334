"""Invented worlds: facts whose exposures are counted, and language models trained from nothing on their sentences.

`world:NAME` (or `world:NAME@SEED`, a world drawn anew) is a model and a source of facts like any other.
"""

from subjattn.worlds.build import KNOWLEDGE as KNOWLEDGE
from subjattn.worlds.build import folder_of as folder_of
from subjattn.worlds.record import WORLDS as WORLDS
from subjattn.worlds.record import InventedWorld as InventedWorld
from subjattn.worlds.record import is_world as is_world
from subjattn.worlds.record import world_of as world_of
from subjattn.worlds.sentences import facts_of as facts_of
