"""Compiling for GPUs that are not there: what the form for GPUs launches and stores, and how failures are told."""

import dataclasses
import importlib.util
import subprocess

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paged
from paged.lower import _compile_gpu
from paged.lower.gpu_targets import GPU_TARGETS
from paged.runtime import LayerStack, PagedAttention

SPEC = paged.AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128)
LAYOUT = paged.PageLayout(page_size=16, num_kv_heads=8, head_dim=128)
HAS_COMPILER = importlib.util.find_spec("jax_plugins") is not None and (
    importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
)
needs_compiler = pytest.mark.skipif(
    not HAS_COMPILER, reason='the GPU compiler is not installed: pip install "paged[gpu-compile]" brings it'
)
MIB = 2**20


def arguments(slots, tokens, rows=1, width=None, layout=LAYOUT):
    """Queries, new keys and values, pages and batch of sequences of so many tokens, in tables for ``width`` tokens."""
    tables = np.zeros((slots, (width or tokens) // 16), int)
    batch = paged.RaggedBatch.decode(np.full(slots, tokens), tables, query_rows=rows)
    pages = layout.wrap(*(jax.ShapeDtypeStruct(x, layout.dtype) for x in layout.array_shapes(slots * tokens // 16)))
    q, kv = (jax.ShapeDtypeStruct((slots * rows, heads, 128), jnp.bfloat16) for heads in (32, 8))
    return q, kv, pages, batch


def compiled(*sizes, spec=SPEC, generation="h200", writes=False, options=None, **more):
    q, kv, pages, batch = arguments(*sizes, **more)
    if writes:  # in a batch that may copy pages first
        batch = dataclasses.replace(batch, copy_from=np.full(sizes[0], -1, np.int32))
    new = (kv, kv) if writes else None
    attend = paged.lower(spec, LAYOUT, "xla")
    return paged.compile_for(attend, generation, q, pages, batch, new=new, compiler_options=options)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("generation", ["h200", "a100"])
@pytest.mark.parametrize(("slots", "tokens"), [(16, 4096), (256, 1024)])
def test_decode_is_few_launches_without_a_loop(slots, tokens, generation):
    made = compiled(slots, tokens, generation=generation)
    assert made.gpu.launches <= 20 and made.gpu.loops == made.gpu.host_steered == made.gpu.launches_in_loops == 0
    assert made.temporary_bytes < 64 * MIB
    assert len(made.gpu.kernels) >= 5 and not any(kernel.spilled_bytes for kernel in made.gpu.kernels)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("width", [2**17, 2**20])
def test_temporaries_are_bounded_in_a_table_of_any_width(width):
    """More than one step is a loop that follows the batch: one, and two for lists that the host reads."""
    made = compiled(16, 4096, width=width)
    assert made.temporary_bytes < 256 * MIB and made.gpu.loops == made.gpu.host_steered == 1
    assert made.gpu.launches <= 20 and made.gpu.launches_in_loops <= 20


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("width", [2**17, 2**20])
def test_in_a_graph_no_loop_is_steered_by_the_host(width):
    """A decode call over tables of so many tokens has one loop."""
    made = compiled(16, 4096, width=width, options=paged.GPU_GRAPHS)
    assert made.gpu.loops == 1 and made.gpu.host_steered == 0 and made.temporary_bytes < 256 * MIB


@pytest.mark.slow
@needs_compiler
def test_in_a_graph_the_loops_of_a_large_ragged_batch_are_not_steered_by_the_host():
    """2048 rows of 32 sequences: loops over row blocks, and loops over page blocks inside of these."""
    _, _, pages, batch = arguments(32, 4096, 64, width=8192)
    batch = paged.RaggedBatch(batch.lengths, batch.block_tables, 64 * np.arange(33))
    q = jax.ShapeDtypeStruct((2048, 32, 128), jnp.bfloat16)
    attend = paged.lower(SPEC, LAYOUT, "xla")
    made = paged.compile_for(attend, "h200", q, pages, batch, compiler_options=paged.GPU_GRAPHS)
    assert made.gpu.loops >= 2 and made.gpu.host_steered == 0 and made.temporary_bytes < 256 * MIB


def test_the_options_for_graphs_are_options_of_the_compiler():
    """Of any platform: XLA checks their names and values."""
    assert jax.jit(lambda x: x + 1, compiler_options=paged.GPU_GRAPHS)(1) == 2
    wrong = {name: value.replace("WHILE", "LOOPS") for name, value in paged.GPU_GRAPHS.items()}
    with pytest.raises(Exception, match="is not a valid enum value"):
        jax.jit(lambda x: x + 1, compiler_options=wrong)(1)


@pytest.mark.slow
@needs_compiler
def test_a_window_stores_the_scores_of_its_own_pages():
    """A list has room for 9 pages of 256, which are the pages of 128 tokens at most: so many are read."""
    made = compiled(16, 4096, spec=SPEC.replace(window=128))
    assert made.schedule.pages_per_block == 9 and made.gpu.launches <= 20 and made.gpu.host_steered == 0
    assert made.temporary_bytes < 2 * MIB


@pytest.mark.slow
@needs_compiler
def test_prefill_is_few_launches_without_a_loop():
    made = compiled(1, 4096, 512)
    assert made.gpu.launches <= 40 and made.gpu.loops == made.gpu.host_steered == 0
    assert made.temporary_bytes < 256 * MIB


@pytest.mark.slow
@needs_compiler
def test_an_update_writes_in_place():
    made = compiled(16, 4096, writes=True)
    assert made.gpu.launches <= 20 and made.gpu.loops == made.gpu.host_steered == 0
    assert made.temporary_bytes < 64 * MIB < 256 * MIB < made.output_bytes


@pytest.mark.slow
@needs_compiler
def test_a_gradient_is_bounded_and_has_no_loop_where_one_has_none():
    """Of queries and pages, of 64 rows over 2048 tokens: the pool's gradient is an array of its own."""
    q, _, pages, batch = arguments(1, 2048, 64)
    attend = paged.lower(SPEC, LAYOUT, "xla").on_chip("h200")

    def gradient(q, pages, batch):
        loss = lambda q, arrays: jnp.sum(attend(q, LAYOUT.wrap(*arrays), batch).astype(jnp.float32))
        return jax.grad(loss, argnums=(0, 1))(q, pages.arrays)

    sizes, program = _compile_gpu.compile_on_gpu(GPU_TARGETS["h200"], jax.jit(gradient), None, q, pages, batch)
    assert program.loops == program.host_steered == 0 and program.launches <= 80
    assert sizes["temp"] < 512 * MIB


@pytest.mark.slow
@needs_compiler
def test_a_step_of_stacked_layers_waits_for_nothing_and_copies_no_pool(monkeypatch):
    """The loop over layers has a known number of turns, also in a batch that may copy pages first."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cuda")  # layers choose their schedules by it

    def make(key):
        facts = {"num_pages": 2048, "embed_dim": 256, "dtype": jnp.bfloat16, "check": False}
        return PagedAttention(SPEC, LAYOUT, **facts, key=key)

    stack, state = eqx.nn.make_with_state(LayerStack.make)(make, jax.random.split(jax.random.key(0), 3))
    weights, rest = eqx.partition(stack, eqx.is_array)
    *_, batch = arguments(8, 4096)
    batch = dataclasses.replace(batch, copy_from=np.full(8, -1, np.int32))
    run = lambda weights, x, batch, state: eqx.combine(weights, rest)(x, batch, state)
    x = jax.ShapeDtypeStruct((8, 256), jnp.bfloat16)
    sizes, program = _compile_gpu.compile_on_gpu(GPU_TARGETS["h200"], run, 3, weights, x, batch, state)
    assert program.loops == 1 and program.host_steered == 0 and program.launches_in_loops <= 60
    assert sizes["temp"] < 64 * MIB < sizes["alias"] == 3 * 128 * MIB


@pytest.mark.skipif(HAS_COMPILER, reason="the GPU compiler is installed")
def test_a_missing_compiler_is_an_import_error_that_says_what_to_install():
    with pytest.raises(ImportError, match=r'pip install "paged\[gpu-compile\]"'):
        compiled(2, 64)


def test_an_unknown_generation_raises_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"generation must be one of \['a100', .*'h200', .*'v6e'\]; got 'h201'"):
        compiled(2, 64, generation="h201")


LISTED = """\
001: kCopy  [source       | next=003 (2)] kCopy
002: kCommandBuffer [source | sink]
    003: kCustomKernel [source | next=004 (1)] first grid: [8, 1, 1] threads: [64, 1, 1]  shared_memory: 64 bytes
    004: kWhile [prev=002 (1) | sink        ]
condition:
        005: kCustomKernel [source | sink] is_less grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
      body:
        006: kCustomKernel [source | sink] add grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
007: kWhile [prev=002 (1) | sink        ]
condition:
    008: kCustomKernel [source | sink] is_less grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    009: kConditional [source | sink]
        010: kGemm [source | sink] dot
011: kGemm [prev=007 (1) | sink] dot
"""


PROGRAM = """\
%add (p: s32[]) -> s32[] {{
}}
%body (p: s32[]) -> s32[] {{
  %a = s32[] while(%p), condition=%is_less, body=%add{}
}}
ENTRY %main (p: s32[]) -> s32[] {{
  %b = s32[] call(%p), to_apply=%body
  %c = s32[] while(%b), condition=%is_less, body=%add{}
}}
"""
KNOWN = ', backend_config={"known_trip_count":{"n":"4"}}'


@pytest.mark.parametrize(
    ("text", "steered"),
    [
        *(("", 2), (PROGRAM.format("", ""), 2), (PROGRAM.format("", KNOWN), 1)),
        *((PROGRAM.format(KNOWN, ""), 2), (PROGRAM.format(KNOWN, KNOWN), 1)),
    ],
    ids=["no text", "none", "the second", "the one in a graph", "both"],
)
def test_launches_and_loops_are_counted_from_the_list_of_what_is_launched(tmp_path, text, steered):
    (tmp_path / "module.thunk_sequence.txt").write_text("001: kCopy [source | sink] kCopy\n")
    (tmp_path / "module.thunk_sequence_after_thunk_passes.txt").write_text(LISTED)
    assert _compile_gpu._program(tmp_path, text) == _compile_gpu.GpuProgram(3, 4, 2, steered, ())


@pytest.mark.parametrize(
    ("ended", "told"),
    [
        (subprocess.CompletedProcess([], -6, "", "LLVM ERROR: Cannot select"), "ended with status -6: LLVM ERROR"),
        (subprocess.TimeoutExpired([], 1), "did not end in 900 seconds"),
    ],
)
def test_a_compiler_that_ends_or_hangs_is_told(monkeypatch, tmp_path, ended, told):
    def run(*args, **options):
        if isinstance(ended, Exception):
            raise ended
        return ended

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(_compile_gpu.CompilerFailed, match=told):
        _compile_gpu._compiled(tmp_path)


def test_a_ptxas_that_does_not_run_is_told(tmp_path, monkeypatch):
    """Such as a file of its name that only says how to install it. The program would seem to have no kernel."""
    (tmp_path / "module.ptx").write_text(".target sm_90\n")
    monkeypatch.setattr(_compile_gpu, "_ptxas", lambda: "false")
    with pytest.raises(_compile_gpu.CompilerFailed, match="false ended with status 1"):
        _compile_gpu._program(tmp_path, "")
