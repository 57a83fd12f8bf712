"""The pictures of README.md and docs, and the run of an engine that two of them show: `make pictures`."""

import dataclasses
import json
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import paged
from paged import pictures
from paged.runtime import Engine, PagedAttention, Rotary, StepRecord

FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "pictures"
RUN = FOLDER / "run.json"
VOCABULARY = 50
_BY_REQUEST = ("rows", "drawn", "drafted")


class OneLayer(eqx.Module):
    """A model of one attention layer, whose likeliest next token is the token itself."""

    attention: PagedAttention

    def __init__(self, key: jax.Array):
        spec = paged.AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
        layout = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
        self.attention = PagedAttention(spec, layout, num_pages=24, embed_dim=VOCABULARY, rotary=Rotary(8), key=key)

    def __call__(self, tokens, batch, state):
        x = jax.nn.one_hot(tokens, VOCABULARY)
        y, state = self.attention(x, batch, state)
        return x + 1e-3 * jnp.tanh(y), state


def engine() -> Engine:
    """An engine that is asked ten requests that begin alike, with too few pages for four of them at their longest."""
    model, state = eqx.nn.make_with_state(OneLayer)(jax.random.key(0))
    asked = Engine(model, state, num_slots=4, max_tokens=48, chunk_size=12, steps=64, record=True)
    random = np.random.default_rng(1)
    common = random.integers(0, VOCABULARY, 9).tolist()
    for _ in range(10):
        own = random.integers(0, VOCABULARY, int(random.integers(1, 16))).tolist()
        asked.submit(common + own, max_new_tokens=int(random.integers(4, 24)))
    return asked


def write_run(records: list[StepRecord]) -> str:
    """Records as JSON, one line for each step."""
    return "[\n" + ",\n".join(json.dumps(dataclasses.asdict(record)) for record in records) + "\n]\n"


def read_run(text: str) -> list[StepRecord]:
    """What `write_run` wrote."""
    return [_record(values) for values in json.loads(text)]


def _record(values: dict) -> StepRecord:
    numbered = {name: {int(number): count for number, count in values[name].items()} for name in _BY_REQUEST}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return StepRecord(**{**values, **lists, **numbered})


def drawn(records: list[StepRecord]) -> dict[str, pictures.Picture]:
    """Every picture by the name of its file."""
    spec = paged.AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64)
    layout = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=64)
    plain, windowed = (paged.lower(one, layout, target="xla") for one in (spec, spec.replace(window=6)))
    sinks = spec.replace(causal=False, mask=(paged.Causal() & paged.Window(10)) | (paged.Causal() & paged.Prefix(3)))
    two = paged.RaggedBatch.decode(lengths=[10, 3], block_tables=[[2, 5, 0], [3, -1, -1]])
    three = paged.RaggedBatch([19, 11, 10], [[-1, -1, 9, 4, 8], [1, 2, 6, -1, -1], [1, 2, 11, -1, -1]], [0, 1, 6, 7])
    wide, large = spec.replace(head_dim=128), layout.replace(head_dim=128, page_size=16)
    pinned = paged.DecodeSchedule(pages_per_block=16, buffers=4)
    chip = paged.lower(wide, large, target="tpu", schedule=pinned).on_chip("v6e")
    decode = paged.RaggedBatch.decode([900, 150, 2000], np.arange(3 * 128).reshape(3, 128))
    return {
        "paging": pictures.pages(plain, two, num_pages=6),
        "window": pictures.pages(windowed, three, num_pages=16),
        "mask": pictures.mask(sinks, 32, 32, page_size=4, rows_per_tile=4),
        "heads": pictures.heads(spec.replace(sinks=True)),
        "schedule": pictures.schedule(chip, decode),
        "pool": pictures.pool(records),
        "steps": pictures.steps(records),
    }


def main() -> None:
    """Serve, draw and write everything."""
    FOLDER.mkdir(exist_ok=True)
    asked = engine()
    for _ in asked.stream():
        pass
    records = asked.records
    RUN.write_text(write_run(records), encoding="utf-8")
    for name, picture in drawn(records).items():
        picture.save(FOLDER / f"{name}.svg")
        print(f"{FOLDER / name}.svg: {len(picture.svg)} bytes")


if __name__ == "__main__":
    main()
