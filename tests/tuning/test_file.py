"""The tuning file: whole whatever writes it and whenever, and ignored with one warning where it is not whole."""

import json
import os
import pathlib
import subprocess
import sys
import warnings

import pytest

import paged
from paged.lower.schedule import file as file_module

from .small import FILE, LAYOUT, OTHER, SPEC, chosen, entry, key, stored

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The path of the process's tuning file."""
    monkeypatch.setenv("PAGED_TUNING", str(tmp_path / "folder" / "tuned.json"))
    return tmp_path / "folder" / "tuned.json"


def _write(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def _texts(path):
    """The content of a file with one entry, as JSON to be changed."""
    stored(path, entry())
    return json.loads(path.read_text())


def _with_entry(**changes):
    def spoil(content):
        content["entries"][0].update(changes)
        return json.dumps(content)

    return spoil


# Contents of damaged files, and the warning for each.
CORRUPT = {
    "empty": (lambda content: "", "cannot be read"),
    "truncated": (lambda content: json.dumps(content)[:-9], "cannot be read"),
    "not text": (lambda content: b"\xff\xfe\x00", "cannot be read"),
    "too deep": (lambda content: "[" * 10**5, "cannot be read"),
    "a list": (lambda content: "[]", "not one of paged's"),
    "another program's": (lambda content: '{"entries": 3}', "not one of paged's"),
    "another format": (lambda content: json.dumps({**content, "paged_tuning": 2}), "another format"),
    "no format": (lambda content: json.dumps({"entries": content["entries"]}), "another format"),
    "entry is a number": (lambda content: json.dumps({**content, "entries": [7]}), "entry has .*got 7"),
    "more in an entry": (_with_entry(colour="red"), "entry has .*colour"),
    "key is a list": (_with_entry(key=[1]), "key has"),
    "key lacks texts": (_with_entry(key={"paged": "1"}), "key has"),
    "key of numbers": (
        lambda content: _with_entry(key=dict.fromkeys(content["entries"][0]["key"], 3))(content),
        "texts",
    ),
    "no time": (_with_entry(seconds=0), "above 0"),
    "time is a text": (_with_entry(ratio="1"), "above 0"),
    "time is nan": (_with_entry(seconds=float("nan")), "above 0"),
}
# Entries that are whole, and hold no schedule that runs here.
USELESS = {
    "schedule is a text": ("magic", "names its .lowering."),
    "schedule of nothing known": ({"lowering": "magic"}, "names its .lowering."),
    "schedule of 0": ({**json.loads(FILE.to_json()), "pages_per_block": 0}, "at least 1"),
    "schedule of a text": ({**json.loads(FILE.to_json()), "pages_per_block": "many"}, "Python int"),
    "schedule with less": ({"lowering": "xla-blocks"}, "fields"),
    "schedule with more": ({**json.loads(FILE.to_json()), "buffers": 5}, "fields"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_what_cannot_be_read_is_warned_of_once_and_passed_over(path, name):
    spoil, text = CORRUPT[name]
    _write(path, spoil(_texts(path)))
    with pytest.warns(paged.TuningWarning, match=text) as caught:
        attends = [paged.lower(SPEC, LAYOUT) for _ in range(3)]
    assert len(caught) == 1 and {chosen(attend)[1] for attend in attends} == {"heuristic"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", paged.TuningWarning)
        paged.TuningFile(path).store([entry(OTHER)])
    assert chosen(paged.lower(SPEC, LAYOUT)) == (OTHER, "tuning file tuned.json"), "tuning again makes it whole"


def test_a_file_that_is_not_ours_is_put_aside_and_not_lost(path):
    new = entry()
    _write(path, "dear diary")
    with pytest.warns(paged.TuningWarning, match=r"is now .*tuned\.json\.unreadable"):
        paged.TuningFile(path).store([new])
    assert path.with_name("tuned.json.unreadable").read_text() == "dear diary"


@pytest.mark.parametrize("name", USELESS)
def test_a_schedule_that_cannot_run_is_warned_of_once_and_passed_over(path, name):
    schedule, text = USELESS[name]
    _write(path, _with_entry(schedule=schedule)(_texts(path)))
    attend = paged.lower(SPEC, LAYOUT)
    with pytest.warns(paged.TuningWarning, match=text) as caught:
        assert {chosen(attend)[1] for _ in range(3)} == {"heuristic"}
    assert len(caught) == 1


@pytest.mark.parametrize("origin", ["paged", "jax", "device"])
def test_what_was_tuned_elsewhere_is_warned_of_once_and_passed_over(path, origin):
    stored(path, entry(of=key(**{origin: f"another {origin} of {path.parent.parent.name}"})))
    attend = paged.lower(SPEC, LAYOUT)
    with pytest.warns(paged.TuningWarning, match=f"tuned on .*another {origin}.*It is ignored here") as caught:
        assert {chosen(attend)[1] for _ in range(3)} == {"heuristic"}
    assert len(caught) == 1
    stored(path, entry())
    assert chosen(paged.lower(SPEC, LAYOUT))[0] == FILE and len(paged.TuningFile(path).entries()) == 2


@pytest.mark.parametrize("part", ["lowerings", "program", "layout", "shape"])
def test_what_is_of_something_else_is_passed_over_in_silence(path, part):
    stored(path, entry(of=key(**{part: "something else"})))
    assert chosen(paged.lower(SPEC, LAYOUT))[1] == "heuristic"


def test_no_file_is_no_fault_and_a_folder_in_its_place_is_no_crash(path):
    assert chosen(paged.lower(SPEC, LAYOUT))[1] == "heuristic" and not path.parent.exists()
    path.mkdir(parents=True)
    with pytest.warns(paged.TuningWarning, match="cannot be read"):
        assert chosen(paged.lower(SPEC, LAYOUT))[1] == "heuristic"
    with pytest.raises(OSError, match="directory"):
        paged.TuningFile(path).store([entry()])
    assert path.is_dir()


def test_a_write_that_dies_leaves_the_old_file(path, monkeypatch):
    stored(path, entry())
    before = path.read_text()

    def dies(number):
        raise KeyboardInterrupt

    monkeypatch.setattr(file_module.os, "fsync", dies)
    with pytest.raises(KeyboardInterrupt):
        paged.TuningFile(path).store([entry(OTHER)])
    monkeypatch.undo()
    assert path.read_text() == before
    stored(path, entry(OTHER))
    assert paged.TuningFile(path).entries() == (entry(OTHER),)


WRITER = """
import sys
from paged.lower.schedule import Entry, Key, TuningFile
from paged import XlaSchedule
import pathlib

path, who, count = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for i in range(count):
    key = Key(paged="1", jax="1", device=who, lowerings="x", program=str(i), layout="l", shape="s")
    TuningFile(path).store([Entry(key, XlaSchedule(pages_per_block=i + 1).to_json(), 1.0, 1.0)])
"""


@pytest.mark.slow
def test_two_processes_that_write_at_once_lose_nothing_and_readers_see_whole_files(path):
    count = 60
    arguments = [[sys.executable, "-c", WRITER, str(path), who, str(count)] for who in ("one", "two")]
    writers = [subprocess.Popen(command, cwd=ROOT) for command in arguments]
    sizes = []
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            sizes.append(len(json.loads(path.read_text())["entries"]))
    assert [writer.returncode for writer in writers] == [0, 0]
    assert sizes == sorted(sizes) and len(set(sizes)) > 2, "the reader saw it grow"
    found = {(e.key.device, e.key.program): e.parsed().pages_per_block for e in paged.TuningFile(path).entries()}
    assert found == {(who, str(i)): i + 1 for who in ("one", "two") for i in range(count)}
    assert sorted(p.name for p in path.parent.iterdir()) == ["tuned.json", "tuned.json.lock"]


def test_where_the_file_is(tmp_path, monkeypatch):
    monkeypatch.delenv("PAGED_TUNING")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert paged.TuningFile.at().path == tmp_path / ".cache" / "paged" / "tuning.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert paged.TuningFile.at().path == tmp_path / "cache" / "paged" / "tuning.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert paged.TuningFile.at().path == tmp_path / ".cache" / "paged" / "tuning.json"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert paged.TuningFile.at().path == tmp_path / "Library" / "Caches" / "paged" / "tuning.json"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert paged.TuningFile.at().path == tmp_path / "local" / "paged" / "tuning.json"
    monkeypatch.setenv("PAGED_TUNING", "~/mine.json")
    assert paged.TuningFile.at().path == tmp_path / "mine.json"
    assert paged.TuningFile.at("off") is None and paged.TuningFile.at(tmp_path / "x").path == tmp_path / "x"


def test_without_a_home_there_is_no_file(monkeypatch):
    monkeypatch.delenv("PAGED_TUNING")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "nowhere")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert paged.TuningFile.at() is None
    assert chosen(paged.lower(SPEC, LAYOUT))[1] == "heuristic"
