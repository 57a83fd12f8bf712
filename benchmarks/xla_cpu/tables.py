"""Rows as Markdown tables, one core and all cores side by side."""

from .measure import Row

_BUSY = 0.3  # cores that others kept busy, above which a figure is marked
_BASELINES = ("READ", "MATMUL", "forward")  # a ratio is to these: their own rows would say 1
GOALS = {
    "decode": "share of READ: 0.45 for float32, 0.35 for bfloat16; two cores 1.7 times one",
    "invariants": "uneven at most 1.15, window at most 2",
    "prefill": "0.6 of MATMUL",
    "gradient": "at most 4 times the forward pass",
    "write": "no time or memory that follows the pool's size",
}
_RATIO = {
    "decode": "share of READ",
    "invariants": "ratio",
    "prefill": "share of MATMUL",
    "gradient": "times forward",
    "write": "",
}


def tables(rows: list[Row]) -> str:
    """All sections that have rows."""
    sections = [section for section in GOALS if any(row.section == section for row in rows)]
    busy = (
        f"`~`: other processes kept more than {_BUSY} cores busy meanwhile. Trust the ratios of one core, which are of "
        "CPU time. Wall times mean nothing then, and neither do their ratios."
    )
    return "\n\n".join([*(_section(name, [row for row in rows if row.section == name]) for name in sections), busy])


def _section(section: str, rows: list[Row]) -> str:
    ratio = _RATIO[section]
    head = ["case", "what", *([f"{ratio}, one core"] if ratio else []), "CPU time, one core"]
    has_all = any(row.cores == "all" for row in rows)
    if has_all:
        head += [f"{ratio}, all cores", "wall time, all cores", "all cores over one"]
    head += ["temporaries", "compile"] if section != "invariants" else []
    lines = [f"## {section} (*measured*; goal: {GOALS[section]})", ""]
    lines += [" | ".join(head).join(("| ", " |")), "|---" * len(head) + "|"]
    for one, every in _paired([row for row in rows if row.name not in _BASELINES]):
        lines.append(_line(section, one, every, has_all))
    return "\n".join(lines)


def _line(section: str, one: Row | None, every: Row | None, has_all: bool) -> str:
    row = one or every
    assert row is not None
    cells = [row.case, row.name, *([_ratio(one)] if _RATIO[section] else []), _seconds(one)]
    if has_all:
        gain = one.seconds / every.seconds if one and every and one.seconds and every.seconds else None
        mark = _mark(every)
        cells += [_ratio(every, mark), _seconds(every), "" if gain is None else f"{mark}{gain:.2f}"]
    if section != "invariants":
        cells += [_bytes(row.temporaries), "" if row.compile_seconds is None else f"{row.compile_seconds:.1f} s"]
    if row.note:
        cells[1] += f" ({row.note})"
    return " | ".join(cells).join(("| ", " |"))


def _paired(rows: list[Row]) -> list[tuple[Row | None, Row | None]]:
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.case, row.name), {})[row.cores] = row
    return [(by_cores.get("one"), by_cores.get("all")) for by_cores in found.values()]


def _mark(row: Row | None) -> str:
    return "~" if row is not None and (row.others or 0) > _BUSY else ""


def _ratio(row: Row | None, mark: str = "") -> str:
    return "" if row is None or row.ratio is None else f"{mark}{row.ratio:.2f}"


def _seconds(row: Row | None) -> str:
    if row is None or row.seconds is None:
        return ""
    seconds = row.seconds
    return _mark(row) + (f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us")


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**20:.1f} MiB" if count >= 2**17 else f"{count / 2**10:.1f} KiB"
