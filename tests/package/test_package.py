"""What users install: the wheel's contents, its types as a user sees them, and the lowest versions it says it takes."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MOST_BYTES = 2**20  # of the wheel: code, and nothing else
# What a user's editor must know: no public name is Any, and arguments are checked.
TYPED = """
import jax.numpy as jnp
import paged
from paged.runtime import Engine, PagePool, Sampler

spec = paged.AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64, window=128)
layout = paged.PageLayout(page_size=16, num_kv_heads=2, head_dim=64, dtype=jnp.bfloat16)
attend = paged.lower(spec, layout)
reveal_type(spec.replace(soft_cap=30.0))
reveal_type(layout.init(num_pages=4))
reveal_type(attend)
reveal_type(PagePool.init(8, num_slots=2, pages_per_seq=4, page_size=16))
reveal_type(Sampler(temperature=0.5))
"""
REVEALED = ("AttentionSpec", "Pages", "Attend", "PagePool", "Sampler")


def _built(folder):
    """The files that `python -m build` makes of the sources, without the network."""
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, sources / name)
    for name in ("paged", "tests"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (source,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    pytest.importorskip("build", reason="the package `build` makes wheels: `pip install build`")
    return _built(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def environment(distributions, tmp_path_factory):
    """A new environment with the wheel and what it asks for, and an empty folder to work in."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q", str(distributions[0])]
    done = subprocess.run(pip, capture_output=True, text=True)
    if "No matching distribution" in done.stderr or "Temporary failure in name resolution" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    (folder / "empty").mkdir()
    return python, folder / "empty"


def _run(python, folder, *arguments):
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(python), *arguments], cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_types_and_nothing_else(distributions):
    wheel, source = distributions
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"paged"}
    assert "paged/py.typed" in names and wheel.stat().st_size < MOST_BYTES
    packages = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "paged").rglob("*.py")}
    assert packages <= {name.rpartition("/")[0] for name in names}, "a folder of modules is not in the wheel"
    with tarfile.open(source) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "pyproject.toml", "paged"} <= tops and not {
        "tests",
        "benchmarks",
        "examples",
    } & tops


@pytest.mark.slow
def test_the_readme_and_the_commands_run_where_only_the_wheel_is(environment):
    python, folder = environment
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (folder / "readme.py").write_text("\n".join(code))
    _run(python, folder, "readme.py")
    assert "paged" in _run(python, folder, "-m", "paged", "--help")
    assert "p - j < 64" in _run(python, folder, "-m", "paged", "explain", "--window", "64", "--heads", "8/2")
    where = _run(python, folder, "-c", "import paged; print(paged.__file__)").strip()
    assert pathlib.Path(where).is_relative_to(folder.parent / "venv")


@pytest.mark.slow
def test_types_are_those_that_a_user_sees(environment):
    python, folder = environment
    pyright = pathlib.Path(sys.executable).with_name("pyright")
    if not pyright.exists():
        pytest.skip("pyright is not installed: the extra `dev` has it")
    (folder / "typed.py").write_text(TYPED)
    # A call with a wrong type must be found: otherwise the types do not reach the user.
    (folder / "wrong.py").write_text(
        "import paged\npaged.AttentionSpec(num_q_heads='8', num_kv_heads=2, head_dim=64)\n"
    )
    command = [str(pyright), "--pythonpath", str(python), "--outputjson", "typed.py", "wrong.py"]
    told = json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout)
    errors = {pathlib.Path(d["file"]).name for d in told["generalDiagnostics"] if d["severity"] == "error"}
    shown = [d["message"] for d in told["generalDiagnostics"] if d["severity"] == "information"]
    assert errors == {"wrong.py"}, told["generalDiagnostics"]
    assert [re.findall(r'is "(\w+)', message)[0] for message in shown] == list(REVEALED)


def test_the_oldest_versions_that_are_tested_are_those_that_are_allowed():
    """`make test-oldest` installs them."""
    makefile = (ROOT / "Makefile").read_text()
    pinned = dict(pair.split("==") for pair in re.findall(r"^OLDEST := (.*)$", makefile, re.MULTILINE)[0].split())
    allowed = dict(requirement.split(">=") for requirement in PROJECT["dependencies"])
    assert pinned.keys() == allowed.keys()
    for name, version in pinned.items():
        assert version == allowed[name] or version.removesuffix(".0") == allowed[name], name
