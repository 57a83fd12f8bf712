"""What XLA runs around the kernels of a whole call, counted in the program that the real TPU compiler makes.

A call pays for it between its arguments and its results, whatever its kernel takes. `MOST` has the most of each kind
that a call may have. The numbers are those that the calls have: whoever takes something away lowers them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import paged
from paged.lower import Around, operations_of
from paged.lower._compile_for import compile_on
from paged.lower.tpu import chip_named

from .points import needs_libtpu

POOL_BYTES = 512 * 2**20  # a smaller pool may be placed in VMEM, where copying it shows nothing
WIDE, NARROW = 128, 64  # heads; of the narrow ones keys and values are joined in pages
DECODE_ROWS = [(1, 1032 + 52 * i) for i in range(60)]
CHUNKS = [(256, length) for length in (1024, 2048, 3072, 4096)]
BATCHES = {  # (query rows, tokens) of each sequence
    "16 x 4096": [(1, 4096)] * 16,
    "64 x 2048": [(1, 2048)] * 64,
    "256 x 1024": [(1, 1024)] * 256,
    "512 of 4096": [(512, 4096)],
    "60 + 4 x 256": [*DECODE_ROWS, *CHUNKS],
}
GROUPS = {"group 1": (16, 16), "group 3": (24, 8), "group 5": (40, 8), "group 5, float16": (40, 8)}  # heads
WINDOW = {"window": 128}
JOINED = {"head_dim": NARROW, "sinks": True, **WINDOW}
LISTED = {"mask": paged.Window(1024) | paged.Prefix(64)}  # its pages are no interval: they are listed
# (batch, call, terms, generation): (kernels, operations, loops, sorts, fusions, copies, KiB that they write)
MOST = {
    ("16 x 4096", "update", "", "v6e"): (1, 4, 0, 0, 1, 2, 17),
    ("16 x 4096", "attend", "listed", "v5e"): (1, 28, 0, 1, 16, 5, 153),
    ("64 x 2048", "attend", "window", "tpu7x"): (1, 2, 0, 0, 1, 0, 1),
    ("16 x 4096", "write", "", "v6e"): (1, 5, 0, 0, 2, 2, 17),
    ("64 x 2048", "update", "joined", "v6e"): (1, 3, 0, 0, 1, 0, 1),
    ("512 of 4096", "write", "", "v6e"): (2, 16, 0, 0, 0, 4, 2050),
    ("64 x 2048", "attend", "group 5", "v6e"): (1, 2, 0, 0, 1, 0, 1),
    ("64 x 2048", "attend", "group 5, float16", "v6e"): (1, 4, 0, 0, 3, 0, 1921),
    ("64 x 2048", "layers", "", "v6e"): (1, 12, 1, 0, 2, 4, 1057),
    ("64 x 2048", "update", "", "v5e"): (1, 2, 0, 0, 1, 0, 1),
    ("256 x 1024", "update", "", "tpu7x"): (1, 4, 0, 0, 1, 1, 131),
    ("512 of 4096", "update", "", "v6e"): (3, 13, 0, 0, 0, 1, 1),
    ("60 + 4 x 256", "update", "", "v6e"): (4, 13, 0, 0, 5, 5, 69),
    ("60 + 4 x 256", "write", "", "v6e"): (2, 9, 0, 0, 3, 3, 4403),
    ("64 x 2048", "update", "group 1", "v5e"): (1, 2, 0, 0, 1, 0, 1),
    ("64 x 2048", "update", "group 3", "tpu7x"): (1, 2, 0, 0, 1, 0, 1),
}
LAYERS = 4
FAST = 5  # rows of the table that always run: one to two seconds each


def _call(batch, call, terms, generation):
    """What a user writes, jitted, and its arguments as shapes; the pages are donated where they are written."""
    rows, lengths = zip(*BATCHES[batch], strict=True)
    q_heads, kv_heads = GROUPS.get(terms, (32, 8))
    more = {"window": WINDOW, "listed": LISTED, "joined": JOINED}.get(terms, {})
    spec = paged.AttentionSpec(num_q_heads=q_heads, num_kv_heads=kv_heads, **{"head_dim": WIDE, **more})
    dim, order = spec.head_dim, "packed" if spec.head_dim == WIDE else "joined"
    layout = paged.PageLayout(page_size=16, num_kv_heads=kv_heads, head_dim=dim, order=order)
    attend = paged.lower(spec, layout, target="tpu").on_chip(generation)
    tokens, seqs = sum(rows), len(rows)

    def step(lengths, tables, starts):
        if max(rows) == 1:
            return paged.RaggedBatch.decode(lengths, tables)
        if seqs == 1:
            return paged.RaggedBatch.prefill(lengths[0], tables[0], tokens)
        return paged.RaggedBatch(lengths, tables, starts)

    def layers(pages, q, k, v, *integers):
        """What every layer of a model pays: its results are the next one's queries."""

        def layer(carry, i):
            q, pages = carry
            return attend.update(q, k, v, pages, step(*integers).for_layer(i, num_pages // LAYERS, LAYERS)), None

        return jax.lax.scan(layer, (q, pages), jnp.arange(LAYERS))[0]

    calls = {
        "layers": layers,
        "attend": lambda pages, q, k, v, *integers: attend(q, pages, step(*integers)),
        "update": lambda pages, q, k, v, *integers: attend.update(q, k, v, pages, step(*integers[:3]), *integers[3:]),
        "write": lambda pages, q, k, v, *integers: paged.write(k, v, pages, step(*integers), "tpu"),
    }
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    num_pages = POOL_BYTES // layout.bytes_per_page
    pool = [shape(*dims) for dims in layout.array_shapes(num_pages)]
    integers = [shape(*dims, dtype=jnp.int32) for dims in ((seqs,), (seqs, -(-max(lengths) // 16)), (seqs + 1,))]
    new, sinks = shape(tokens, kv_heads, dim), [shape(q_heads, dtype=jnp.float32)] if spec.sinks else []
    donated = () if call == "attend" else 0
    return jax.jit(calls[call], donate_argnums=donated), (
        layout.wrap(*pool),
        shape(tokens, q_heads, dim, dtype=jnp.float16 if terms.endswith("float16") else jnp.bfloat16),
        new,
        new,
        *integers,
        *sinks,
    )


@needs_libtpu
@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, id=", ".join(filter(None, key)), marks=[] if i < FAST else [pytest.mark.kernels])
        for i, key in enumerate(MOST)
    ],
)
def test_nothing_creeps_back_around_the_kernels(key):
    function, args = _call(*key)
    text = compile_on(chip_named(key[-1]), function, *args).as_text()
    found = Around.of(text)
    counts = dataclasses.astuple(dataclasses.replace(found, written_bytes=-(-found.written_bytes // 1024)))
    operations = ", ".join(made.name for made in operations_of(text) if not made.is_kernel)
    assert found.kernels == MOST[key][0]
    assert all(count <= most for count, most in zip(counts, MOST[key], strict=True)), f"{counts}: {operations}"


PROGRAM = """HloModule jit_step, is_scheduled=true

%fused.1 (param_0: s32[4]) -> s32[4] {
  %param_0 = s32[4]{0:T(128)} parameter(0)
  ROOT %add.7 = s32[4]{0:T(128)} add(%param_0, %param_0)
}

%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[]{:T(128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  ROOT %lt = pred[]{:T(512)} compare(%a, %b), direction=LT
}

%body.2 (state: (s32[], s32[4])) -> (s32[], s32[4]) {
  %state = (s32[]{:T(128)}, s32[4]{0:T(128)}) parameter(0)
  %sort.3 = (s32[4]{0:T(128)}, bf16[4]{0:T(256)}) sort(%x, %y), dimensions={0}, to_apply=%less
  ROOT %tuple.1 = (s32[]{:T(128)}, s32[4]{0:T(128)}) tuple(%n, %z)
}

%condition.2 (state.1: (s32[], s32[4])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, s32[4]{0:T(128)}) parameter(0)
  ROOT %compare.5 = pred[]{:T(512)} compare(%i, %n.1), direction=LT
}

ENTRY %main (x.1: s32[4], q: bf16[8,128]) -> bf16[8,128] {
  %x.1 = s32[4]{0:T(128)} parameter(0)
  %fusion.1 = s32[4]{0:T(128)S(1)} fusion(%x.1), kind=kLoop, calls=%fused.1, backend_config={"estimated_cycles":"2120"}
  %copy-start.1 = (s32[4]{0:T(128)}, s32[4]{0:T(128)S(1)}, u32[]{:S(2)}) copy-start(%fusion.1)
  %copy-done.1 = s32[4]{0:T(128)} copy-done(%copy-start.1)
  %buffer = s32[4]{0:T(128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %while.1 = (s32[]{:T(128)}, s32[4]{0:T(128)}) while(%init), condition=%condition.2, body=%body.2
  ROOT %step.1 = bf16[8,128]{1,0} custom-call(%x.1, %q), custom_call_target="tpu_custom_call", metadata={op_name="step"}
}
"""


def test_operations_are_counted_where_they_run():
    """Fused computations and a sort's comparison are part of their operation; a loop's body runs."""
    assert [made.name for made in operations_of(PROGRAM)] == [
        "fusion.1", "copy-start.1", "while.1", "compare.5", "sort.3", "step.1",
    ]  # fmt: skip
    assert Around.of(PROGRAM) == Around(1, 4, 1, 1, 1, 1, 16 + 16 + 1 + (16 + 8))
    assert next(operations_of(PROGRAM)).estimated_cycles == 2120
