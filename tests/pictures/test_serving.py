"""Pictures of pools and of steps, records of an engine, and whether the pictures of the documentation are stale."""

import xml.etree.ElementTree as ET

import pytest

from examples import pictures as examples
from paged import pictures
from paged.runtime import Engine, GroupUsage, StepRecord, StepReport
from tests.pictures.drawn import SVG, require_sound, tiles

POOL = {"pages": (8, 4), "used": (5, 1), "shared": (2, 0), "cached": (1, 0)}
RECORDS = [
    StepRecord({0: 7, 1: 5}, prompts=(0, 1), **POOL),
    StepRecord({0: 1, 1: 1}, drawn={0: 1, 1: 1}, **POOL),
    StepRecord({0: 1}, drawn={0: 3}, drafted={0: 4}, preempted=(1,), **{**POOL, "used": (7, 4)}),
    StepRecord({0: 1, 2: 0}, ended=(0,), waiting=1, **POOL),
    StepRecord({1: 6, 2: 12}, prompts=(1, 2), **POOL),
]


def test_steps_are_drawn_as_they_ran():
    picture = pictures.steps(RECORDS)
    require_sound(picture)
    assert {letter: tiles(picture.svg, letter)[0] for letter in "FDVXS"} == {
        "F": {(0, 0), (1, 0), (1, 4), (2, 4)},
        "D": {(0, 1), (1, 1), (0, 3)},
        "V": {(0, 2)},
        "X": {(1, 2), (1, 3)},
        "S": {(2, 3)},
    }
    assert picture.description == (
        "3 requests in 5 steps, 34 rows: 30 of prompts, 4 of decoding; 2 of 4 drafts accepted"
    )
    assert {"12", "7", "6", "5"} <= {box.words for box in picture.boxes}  # rows of chunks


def test_a_pool_is_drawn_group_by_group():
    first, second = (pictures.pool(RECORDS, group=group) for group in range(2))
    assert first.description == "at most 7 of 8 pages used, 2 shared, 1 cached; 1 preemption in 5 steps"
    assert second.description.startswith("at most 4 of 4 pages used, 0 shared")
    require_sound(first)
    require_sound(second)
    bars = [path for path in ET.fromstring(first.svg).iter(f"{SVG}path") if path.get("class") == "fF"]
    heights = {float(point.split()[1]) for point in bars[0].get("d", "")[1:-1].split("L")}
    bottom = max(heights)
    assert sorted(round((bottom - height) / 180 * 8, 2) for height in heights) == [0, 3, 5]  # used and not shared


def test_thousands_of_steps_are_small():
    many = [StepRecord({i % 70: 1 + i % 3, 69: 1}, prompts=(i % 70,) if i % 3 else (), **POOL) for i in range(5000)]
    for picture in (pictures.pool(many), pictures.steps(many)):
        require_sound(picture)
        assert len(picture.svg) < 300_000


def test_reports_of_generate_are_drawn_as_a_pool():
    usage = GroupUsage(("everything",), 8, 5, 0, 64)
    facts = {"kind": "decode", "tokens": 2, "new_tokens": 2, "pages_in_use": 5, "running": 2, "waiting": 0}
    report = StepReport(**facts, drawn={0: (3,), 1: (4,)}, ended=(), groups=(usage,), pages_shared=1, pages_cached=2)
    assert pictures.pool([report] * 3).description.startswith("at most 5 of 8 pages used, 1 shared, 2 cached")
    with pytest.raises(ValueError, match=r"whose its tokens were: 2 in all; got rows=\{\}"):
        pictures.steps([report])


def test_reports_of_generate_are_drawn_as_steps():
    """Place 1 has no slot after the second step, in which it did not end: it has given it up."""
    usage = GroupUsage(("everything",), 8, 5, 0, 64)
    told = [
        ({0: 4, 1: 3}, (0, 1), {}, ()),
        ({0: 1, 1: 1}, (), {0: (7,), 1: (8,)}, ()),
        ({0: 1}, (), {0: (9,)}, (0,)),
        ({1: 4, 2: 0}, (1,), {1: (5,)}, (1,)),
    ]
    facts = {"kind": "decode", "new_tokens": 1, "pages_in_use": 5, "running": 1, "waiting": 0, "groups": (usage,)}
    reports = [
        StepReport(**facts, tokens=sum(rows.values()), rows=rows, prompts=prompts, drawn=drawn, ended=ended)
        for rows, prompts, drawn, ended in told
    ]
    picture = pictures.steps(reports)
    require_sound(picture)
    assert picture.text.splitlines()[:3] == ["request 0 #dd", "request 1 #dx#", "request 2    ."]
    assert picture.description == "3 requests in 4 steps, 14 rows: 11 of prompts, 3 of decoding"
    assert pictures.pool(reports).description.endswith("; 1 preemption in 4 steps")


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="no step to draw"):
        pictures.pool([])
    with pytest.raises(ValueError, match="group must be in"):
        pictures.pool(RECORDS, group=2)
    silent = object.__new__(Engine)
    silent._recorder = None
    with pytest.raises(ValueError, match="record=True"):
        pictures.pool(silent)


def test_the_pictures_of_the_documentation_are_not_stale():
    """Where this fails, ``make pictures`` draws them anew."""
    records = examples.read_run(examples.RUN.read_text(encoding="utf-8"))
    assert examples.read_run(examples.write_run(records)) == records
    drawn = examples.drawn(records)
    assert {path.stem for path in examples.FOLDER.glob("*.svg")} == set(drawn)
    for name, picture in drawn.items():
        assert (examples.FOLDER / f"{name}.svg").read_text(encoding="utf-8") == picture.svg + "\n", name
        require_sound(picture)


@pytest.mark.slow
def test_an_engine_records_what_it_counts():
    """The run that the documentation shows, run again."""
    engine = examples.engine()
    for _ in engine.stream():
        pass
    stats, records = engine.stats(), engine.records
    assert records == examples.read_run(examples.RUN.read_text(encoding="utf-8"))
    assert len(records) == stats.steps and sum(len(record.preempted) for record in records) == stats.preemptions > 0
    assert sum(sum(record.drawn.values()) for record in records) == stats.new_tokens
    prompts = sum(record.rows[number] for record in records for number in record.prompts)
    assert prompts <= stats.prompt_tokens and sorted(n for record in records for n in record.ended) == list(range(10))
    assert max(record.used[0] for record in records) <= stats.pages == records[0].pages[0]
    assert any(record.shared[0] for record in records) and any(record.cached[0] for record in records)
