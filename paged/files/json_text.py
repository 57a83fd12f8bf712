"""JSON from files that nobody vouches for."""

import collections
import json
import pathlib
from typing import Any


def parse_object(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    """The object that a JSON text holds. Raises ``ValueError``, which names the file, for anything else.

    A name that stands twice is refused: two readers would disagree about its value.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = collections.Counter(name for name, _ in pairs)
            twice = next(name for name, count in counts.items() if count > 1)
            raise ValueError(f"the name {twice[:100]!r} stands twice")
        return found

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its JSON cannot be read: {str(error)[:200]}.") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path}: its JSON must be an object, {{...}}; got a {type(parsed).__name__}.")
    return parsed
