"""The rules of the house, read off the sources: arrows, imports, sizes, docstrings."""

import ast
import functools
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "paged").rglob("*.py"))
PROJECT = [
    path
    for folder in ("paged", "tests", "examples", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "__pycache__" not in path.parts
]
# What each layer may import besides itself. Nothing imports `compat`, the door included.
LAYERS = {
    "spec": (),
    "files": (),
    "lower": ("spec",),
    "runtime": ("spec", "files", "lower"),
    "models": ("spec", "files", "lower", "runtime"),
    "command": ("spec", "lower", "runtime", "models", "pictures"),
    "compat": ("spec", "lower"),
    "testing": ("spec", "lower", "runtime", "compat"),
    "pictures": ("spec", "lower", "runtime"),
}
# The rooms of a folder, lowest first: a room may import those before it. No circle can then close.
ROOMS = {
    "paged/lower": (
        "jax_version", "gpu_targets", "_gpu_worker", "_around", "program", "work", "base", "schedule", "require",
        "_ahead", "_check", "plan", "xla", "transforms", "tpu", "gpu", "registry", "tree", "_pages_seen", "_explain",
        "run", "attend",
        "_compile_gpu", "_compile_for", "tuning", "mesh", "door",
    ),
    "paged/lower/tpu": ("chips", "references", "pages", "write", "copy", "base", "decode", "prefill"),
    "paged/lower/gpu": ("chips", "schedule", "terms", "refs", "narrow", "kernel", "launch", "plan", "lowering"),
}  # fmt: skip
FILE_LINES, FUNCTION_LINES = 400, 60


@functools.cache
def _tree(path):
    return ast.parse(path.read_text())


def _place(path, node):
    return f"{path.relative_to(ROOT)}, line {node.lineno}"


@functools.cache
def _imports(path):
    """Absolute dotted names that a module imports from: relative imports resolved, `from a import b` as ``a``."""
    package, found = path.relative_to(ROOT).with_suffix("").parts[:-1], []
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            found += [(node, alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, node.module) if node.module else base)
            found += [(node, module, alias.name) for alias in node.names]
    return found


def _layer(parts):
    return parts[1] if len(parts) > 1 and parts[0] == "paged" and parts[1] in LAYERS else None


def test_arrows_point_from_runtime_and_compat_to_lower_to_spec():
    for path in SOURCES:
        own = _layer(path.relative_to(ROOT).with_suffix("").parts)
        for node, module, name in _imports(path):
            parts, where = module.split("."), _place(path, node)
            other = _layer(parts) or (_layer(["paged", name]) if parts == ["paged"] else None)
            if own is None:
                assert other != "compat", f"{where}: the door imports {module}"
                continue
            if other is not None:
                assert other in (own, *LAYERS[own]), f"{where}: {own} imports {module}"
            assert parts != ["paged"] or own is None, f"{where}: {own} imports the door, which imports it"


def test_siblings_import_through_the_package():
    """`from paged.spec import Causal`, not `from paged.spec.masks import Causal`: a file may move, a name may not."""
    for path in SOURCES:
        own = _layer(path.relative_to(ROOT).with_suffix("").parts)
        for node, module, _ in _imports(path):
            parts = module.split(".")
            if _layer(parts) not in (None, own):
                assert len(parts) == 2, f"{_place(path, node)}: {module} reaches into another package"


@pytest.mark.parametrize("folder", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(folder):
    """So decode is read without prefill, and kernels without the door."""
    floors, parts = ROOMS[folder], tuple(folder.split("/"))
    paths = [path for path in SOURCES if path.is_relative_to(ROOT / folder) and path != ROOT / folder / "__init__.py"]
    rooms = {path: path.relative_to(ROOT / folder).with_suffix("").parts[0] for path in paths}
    assert set(rooms.values()) == set(floors)
    for path, room in rooms.items():
        for node, module, name in _imports(path):
            target = tuple(module.split("."))
            if target[: len(parts)] == parts:
                other = target[len(parts)] if len(target) > len(parts) else name
                where = f"{path.relative_to(ROOT)}, line {node.lineno}"
                assert other == room or other in floors[: floors.index(room)], f"{where}: {room} imports {other}"


def test_no_folder_has_a_circle_of_imports():
    for folder in sorted({path.parent for path in SOURCES}):
        rooms, parts = {}, folder.relative_to(ROOT).parts
        for path in (
            source for source in SOURCES if source.is_relative_to(folder) and source != folder / "__init__.py"
        ):
            imported = [(*module.split("."), name) for _, module, name in _imports(path)]
            others = {target[len(parts)] for target in imported if target[: len(parts)] == parts}
            rooms.setdefault(path.relative_to(folder).with_suffix("").parts[0], set()).update(others)
        inside = {
            room: {other for other in others if other in rooms and other != room} for room, others in rooms.items()
        }
        list(graphlib.TopologicalSorter(inside).static_order())  # raises CycleError, which names the circle


def test_no_import_is_inside_a_function_and_none_is_a_star():
    for path in PROJECT:
        for function in (n for n in ast.walk(_tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)):
            inner = [_place(path, n) for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not inner, f"imports inside of {function.name}: {inner}"
        for node, module, name in _imports(path):
            assert name != "*", f"{_place(path, node)}: star import from {module}"


def test_sizes_fit_a_reader():
    for path in PROJECT:
        count = len(path.read_text().splitlines())
        assert count <= FILE_LINES, f"{path.relative_to(ROOT)} has {count} lines"
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1 - _docstring_lines(node)
                assert lines <= FUNCTION_LINES, f"{_place(path, node)}: {node.name} has {lines} lines"


def _docstring_lines(function):
    """A documented argument costs a reader no line of code."""
    first = function.body[0]
    return (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) else 0


def test_every_module_says_what_it_holds():
    for path in PROJECT:
        docstring = ast.get_docstring(_tree(path))
        assert docstring and docstring.splitlines()[0].rstrip().endswith((".", "?", ":")), path.relative_to(ROOT)
        assert path.stem not in ("utils", "util", "helpers", "misc", "common"), path.relative_to(ROOT)


def test_no_machine_path_is_committed():
    """A path of one machine in a committed file works nowhere else."""
    pattern = re.compile(r"(?<![\w.])/(?:tmp|home|root|work|Users|mnt)/\w")
    found = []
    for suffix in ("*.py", "*.toml", "*.md", "*.yml", "*.yaml", "Makefile", "*.cfg"):
        for path in ROOT.rglob(suffix):
            if not any(part.startswith(".") and part != ".ci" for part in path.relative_to(ROOT).parts):
                found += [f"{path.relative_to(ROOT)}: {m.group()}" for m in pattern.finditer(path.read_text())]
    assert not found


def _is_overload(node):
    """One more signature of a function, whose documentation is with its body."""
    return any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)


def _public_names():
    """``(file, definition)`` of every name that the doors re-export, found by following the re-exports."""
    doors = (
        ROOT / "paged",
        *(ROOT / "paged" / layer for layer in ("compat", "models", "pictures", "runtime", "testing")),
    )
    pending, seen = [(door / "__init__.py", None) for door in doors], []
    while pending:
        path, wanted = pending.pop()
        tree = _tree(path)
        conditional = [node for branch in tree.body if isinstance(branch, ast.If) for node in branch.body]
        for node in (*tree.body, *conditional):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == wanted and not _is_overload(node):
                seen.append((path, node))
            elif isinstance(node, ast.ImportFrom) and node.level:
                base = path.parent
                for _ in range(node.level - 1):
                    base = base.parent
                for alias in node.names:
                    if wanted in (None, alias.asname or alias.name):
                        target = base / (node.module or alias.name).replace(".", "/")
                        name = alias.name if node.module else None
                        file = target / "__init__.py" if target.is_dir() else target.with_suffix(".py")
                        if name is not None:
                            pending.append((file, name))
    return sorted(seen, key=lambda found: found[1].name)


def test_public_names_are_documented_and_functions_by_example():
    interfaces = {"Mask", "ScoreOp", "Lowering", "RotaryScaling"}
    for path, node in _public_names():
        where, docstring = f"{_place(path, node)}: {node.name}", ast.get_docstring(node)
        assert docstring, f"{where} has no docstring"
        if isinstance(node, ast.FunctionDef):
            assert ">>>" in docstring, f"{where} has no example"
            continue
        inherited = any(ast.unparse(base) in interfaces for base in node.bases)
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and not _is_overload(n)]
        for method in (n for n in methods if not n.name.startswith("_")):
            assert inherited or ast.get_docstring(method), f"{where}.{method.name} has no docstring"


def test_the_public_names_were_found():
    names = {node.name for _, node in _public_names()}
    assert {"lower", "write", "merge", "reference", "check", "AttentionSpec", "PageLayout", "Causal"} <= names
    assert {"page_attention", "ragged_page_attention_v3", "generate", "PagePool"} <= names
