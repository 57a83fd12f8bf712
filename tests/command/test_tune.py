"""The command line: a tiny shape tuned in a process of its own, listed, found again and cleared."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

import paged
from paged import command
from paged.lower import Shape, synthetic

ROOT = pathlib.Path(__file__).parent.parent.parent
TINY = ["--q-heads=2", "--kv-heads=1", "--head-dim=8", "--page-size=8", "--dtype=float32", "--slots=1", "--context=9"]


@pytest.fixture(autouse=True)
def _compiled_once(monkeypatch):
    """Candidates compiled once for all tests of this process."""
    monkeypatch.setattr(sys.modules["paged.lower.tuning._tune"], "_jitted", lambda attend: attend)


def _run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "paged", "tune", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
    )


@pytest.mark.slow
def test_a_shape_is_tuned_by_a_process_and_its_file_found_by_another(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    first = _run(*TINY, "--seconds", "0.01", PAGED_TUNING=str(path))
    assert first.returncode == 0, first.stderr
    header, *table, winner, where = first.stdout.splitlines()
    assert header.split() == ["median", "ratio", "schedule"] and len(table) >= 2
    assert all(re.match(r" *[\d.]+ [mu]s  +[\d.]+  xla-blocks\(", line) for line in table)
    assert "<- heuristic" in table[0] and "1.00" in table[0]
    assert re.search(r"(wins|stays) at [\d.]+ of the heuristic's time", winner) and where == f"stored in {path}"
    assert "compiling xla-blocks" in first.stderr

    monkeypatch.setenv("PAGED_TUNING", str(path))
    spec = paged.AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=8)
    layout = paged.PageLayout(page_size=8, num_kv_heads=1, head_dim=8, dtype="float32")
    arrays = synthetic(spec, layout, Shape(slots=1, context=9))
    explanation = paged.lower(spec, layout).explain(*arrays[:3])
    assert explanation.source == "tuning file tuned.json" and str(explanation.schedule) in winner


def test_list_clear_and_off(tmp_path, capsys):
    path = tmp_path / "tuned.json"
    tune = ["tune", *TINY, "--seconds", "0.01", "--cache", str(path)]
    assert command.main(tune) == 0
    winner = capsys.readouterr().out.splitlines()[-2].split(" ", 1)[0]
    assert command.main(tune) == 0
    assert f"found in {path}; --again times it anew" in capsys.readouterr().out
    assert command.main(["tune", "--list", "--cache", str(path)]) == 0
    listed = capsys.readouterr().out
    assert f"{path}: 1 entries" in listed and winner in listed and "Program(2, 1, 8" in listed and "q=float32" in listed
    assert command.main(["tune", "--clear", "--cache", str(path)]) == 0
    assert "1 entries deleted" in capsys.readouterr().out and not path.exists()
    for arguments in (["--list"], ["--clear"]):
        assert command.main(["tune", *arguments, "--cache", "off"]) == 0
        assert "tuning is off" in capsys.readouterr().out


def test_without_tqdm_there_is_a_line_for_each_step(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main(["tune", *TINY, "--seconds", "0.01", "--cache", "off"]) == 0
    said = capsys.readouterr()
    assert "not stored: tuning is off" in said.out
    assert re.search(r"^\[0/\d\] compiling xla-blocks", said.err) and "timing" in said.err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--kv-heads", "3"], "multiple of num_kv_heads"),
        (["--dtype", "magic"], "magic"),
        (["--dtype", "int8"], "need scales"),
        (["--query-rows", "9", "--context", "8"], "query_rows=9"),
        (["--slots", "0"], "slots must be at least 1"),
    ],
)
def test_faults_are_named_without_a_traceback(capsys, arguments, text):
    assert command.main(["tune", *TINY, *arguments, "--cache", "off"]) == 2
    assert text in capsys.readouterr().err


def test_help_shows_an_example_that_is_one(capsys):
    with pytest.raises(SystemExit, match="0"):
        command.main(["tune", "--help"])
    example = next(line for line in capsys.readouterr().out.splitlines() if "python -m paged tune --q" in line)
    assert command.parser().parse_args(example.split()[3:]).context == 4096
