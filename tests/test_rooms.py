"""The rooms of the house: which folder may import which, held for every folder of `paged`."""

import ast
import graphlib
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "paged").rglob("*.py"))

# The rooms of `paged.lower` and of its TPU kernels, each with the rooms that it may import.
LOWER = {
    "program": (),
    "base": ("program",),
    "schedule": ("program", "base"),
    "xla": ("program", "base", "schedule", "jax_version"),
    "tpu": ("program", "base", "schedule", "xla"),
    "registry": ("program", "base", "xla", "tpu"),
    "attend": ("program", "base", "schedule", "registry", "require", "_check", "_explain"),
    "mesh": ("program", "base", "attend", "require", "_check", "_explain", "jax_version"),
    "tuning": ("program", "base", "schedule", "attend"),
    "door": ("program", "base", "schedule", "registry", "require", "attend", "mesh"),
}
TPU = {
    "chips": (),
    "references": ("chips",),
    "pages": ("chips", "references"),
    "write": ("chips", "references", "pages", "transforms"),
    "decode": ("base", "chips", "references", "pages", "write", "transforms"),
    "prefill": ("base", "chips", "references", "pages", "transforms", "decode"),
}


def _module(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _imported(path):
    """The modules that a file imports, as tuples of names. ``from package import module`` counts as the module."""
    modules, package = {_module(source) for source in SOURCES}, path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            target = (*base, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                yield (*target, alias.name) if (*target, alias.name) in modules else target


def _rooms(folder):
    """For each room of a package, a file or a folder in it, the other rooms of that package that it imports."""
    depth, rooms = len(folder), {}
    for path in SOURCES:
        module = _module(path)
        if module[:depth] == folder and len(module) > depth:
            others = rooms.setdefault(module[depth], set())
            others |= {to[depth] for to in _imported(path) if to[:depth] == folder and len(to) > depth}
    return {room: others - {room} for room, others in rooms.items()}


def test_no_folder_has_a_circle_of_imports():
    for folder in sorted({_module(path) for path in SOURCES if path.name == "__init__.py"}):
        list(graphlib.TopologicalSorter(_rooms(folder)).static_order())  # raises CycleError, which names the circle


def test_rooms_import_what_they_may_and_no_more():
    for folder, allowed in ((("paged", "lower"), LOWER), (("paged", "lower", "tpu"), TPU)):
        rooms = _rooms(folder)
        for room, others in allowed.items():
            more = rooms[room] - set(others)
            assert not more, f"{'.'.join(folder)}.{room} imports {sorted(more)}"


def test_decode_imports_nothing_of_prefill():
    """Nor does a file that decode's files import, at any distance, below the packages' own doors."""
    sources = {_module(path): path for path in SOURCES}
    pending = [module for module in sources if module[:4] == ("paged", "lower", "tpu", "decode")]
    seen = set(pending)
    while pending:
        for found in set(_imported(sources[pending.pop()])) & set(sources) - seen:
            seen.add(found)
            pending.append(found)
    assert ("paged", "lower", "tpu", "pages", "stream") in seen, "the walk goes nowhere"
    assert not [module for module in seen if module[:4] == ("paged", "lower", "tpu", "prefill")]
