"""`RUNNERS`: every way in which this library runs an attention, in one table; and `across_targets`, made from it."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from paged.lower import LOWERINGS, Attend, Axes, DecodeSchedule, Program, lower
from paged.spec import AttentionSpec, PageLayout

from .cases import CORNERS, Corner, Phase
from .entries import ENTRY_POINTS, EntryPoint
from .interpreter import interpreted
from .lowerings import Checked, check_lowering
from .on_mesh import OnMesh
from .promises import LOWERING_CHECKS, ROWS, Attention, LowerFn
from .specs import BROUGHT, PLAIN, SPECS

# Sequences of several tiles of query rows, beside single rows; batches of 64 rows hold it.
LONG = Corner(((4, 0), (0, 1), (4, -1), (2, 0), (3, 1)), (17, 1, 33, 1, 4))


@dataclasses.dataclass(frozen=True)
class Runner:
    """A named way to run an attention: how it is lowered, and on what `check_lowering` tries it.

    Its schedule is small, so that sequences of a few pages take several steps. A schedule never changes what a result
    means.

    * ``name``: what it is called.
    * ``lower``: ``lower(spec, layout)``, for `check_lowering`. A ``ValueError`` is a refusal.
    * ``layout``: the smallest layout that it accepts for its specs.
    * ``phases``: the phases that it runs.
    * ``specs``: the attentions that it is tried on, by name. One that it refuses is left out.
    * ``rows``, ``corners``: see `check_lowering`.
    * ``without``: the names of checks that it cannot pass, with the reason for each.
    """

    name: str
    lower: LowerFn
    layout: PageLayout
    phases: tuple[Phase, ...]
    specs: Mapping[str, AttentionSpec] = dataclasses.field(default_factory=lambda: {**SPECS, **BROUGHT})
    rows: Mapping[Phase, int] = dataclasses.field(default_factory=lambda: ROWS)
    corners: tuple[str | Corner, ...] = tuple(CORNERS)
    without: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def checks(self) -> tuple[str, ...]:
        """The names in `LOWERING_CHECKS` that it must pass: those for one of its phases, but for `without`."""
        own = (name for name, check in LOWERING_CHECKS.items() if set(check.phases) & set(self.phases))
        return tuple(name for name in own if name not in self.without)

    def check(self, **what: Any) -> Checked:
        """`check_lowering` of this runner: all that it must pass, or what the arguments pick of it.

        **Arguments:**

        - `what`: arguments of `check_lowering`, such as ``specs``, ``phases`` or ``checks``.

        **Returns:** what was tried. Raises `CheckFailure`.
        """
        own = {
            "specs": self.specs.values(),
            "layouts": [self.layout],
            "phases": self.phases,
            "corners": self.corners,
            "checks": self.checks,
            "rows": self.rows,
        }
        return check_lowering(self.lower, **{**own, **what})


def _layout(page_size: int, order: Any = "packed") -> PageLayout:
    return PageLayout(page_size=page_size, num_kv_heads=2, head_dim=8, dtype=jnp.float32, order=order)


def _small(name: str, spec: AttentionSpec, layout: PageLayout, small: Any, kept: Any = ()) -> Attend:
    """The attention of a lowering by name, with fields of its own schedule changed: ``small`` ones if it can run so."""
    lowering, program = next(low for low in LOWERINGS if low.name == name), Program.from_spec(spec)
    reason = lowering.refuses(program, layout)
    if reason is not None:
        raise ValueError(reason)
    own = lowering.schedule(program, layout).replace(**dict(kept))
    attend = lower(spec, layout, lowering.target, schedule=own.replace(**small))
    try:
        attend.choice()
    except ValueError:
        attend = lower(spec, layout, lowering.target, schedule=own)
    return attend if lowering.target in ("xla", jax.default_backend()) else interpreted(attend)


def _xla(spec: AttentionSpec, layout: PageLayout) -> Attend:
    """Blocks of one page, two blocks in a step, tiles of four rows."""
    return _small("xla-blocks", spec, layout, {"pages_per_block": 1, "rows_per_tile": 4, "blocks_per_step": 2})


def _xla_at_once(spec: AttentionSpec, layout: PageLayout) -> Attend:
    """The form for GPUs: steps of two row blocks and one page, tiles of five rows."""
    small = {"pages_per_block": 1, "rows_per_tile": 5, "row_blocks_at_once": 2, "blocks_per_step": 1, "form": "at_once"}
    return _small("xla-blocks", spec, layout, small)


def _decode(sequence: str, spec: AttentionSpec, layout: PageLayout) -> Attend:
    """Blocks of two pages."""
    return _small("tpu-decode", spec, layout, {"pages_per_block": 2}, {"sequence": sequence})


def _ragged(spec: AttentionSpec, layout: PageLayout) -> Attend:
    """Blocks of two pages, or as few as have 128 tokens; tiles of 16 rows; single rows by the decode kernel."""
    pages, single = max(2, 128 // layout.page_size), DecodeSchedule(pages_per_block=2)
    small = {"pages_per_block": pages, "rows_per_tile": 16, "buffers": 2, "single_rows": single}
    return _small("tpu-ragged", spec, layout, small)


_INTERPRETED = {"update in place": "Pallas's interpreter copies; compiled programs are looked at instead"}
_RICH = PLAIN.replace(window=5, soft_cap=4.0, scale=0.3)  # what entry points have arguments for


def _entry(name: str, entry: EntryPoint) -> Runner:
    def lower_entry(spec: AttentionSpec, layout: PageLayout) -> Attention:
        return entry.lower(spec, layout, target="xla")

    rich = _RICH.replace(sinks=entry.takes_sinks)
    without = {"hidden first pages": "it has no argument for a mask"}
    without |= {name: "it gives no log-sum-exp" for name, check in LOWERING_CHECKS.items() if check.needs == "state"}
    if not entry.writes:
        without["full pages end at the length"] = "it is always causal"
        without |= {name: "it does not write" for name, check in LOWERING_CHECKS.items() if check.needs == "update"}
    else:
        without["update in place"] = "it donates its cache itself, so this adaptor copies it"
    if "ragged" not in entry.phases:
        without["starts that lie"] = "it has no query_starts"
    specs = {"rich": rich, "plain": PLAIN}
    return Runner(name, lower_entry, _layout(4, entry.order), entry.phases, specs, without=without)


_ALL = {**SPECS, **BROUGHT}
# The window hides some first pages of a long prompt.
_SPECS_OF_PROMPTS = {"window": PLAIN.replace(window=100), **_ALL}
_KERNELS: Iterable[tuple[str, LowerFn, int, tuple[Phase, ...], Mapping, Mapping[Phase, int], tuple[Corner, ...]]] = (
    ("tpu-decode inline", functools.partial(_decode, "inline"), 8, ("decode",), _ALL, {"decode": 2}, ()),
    ("tpu-decode grid", functools.partial(_decode, "grid"), 8, ("decode",), _ALL, {"decode": 2}, ()),
    ("tpu-ragged", _ragged, 64, ("ragged", "prefill"), _SPECS_OF_PROMPTS, {"ragged": 64, "prefill": 20}, (LONG,)),
)

RUNNERS: Mapping[str, Runner] = {
    runner.name: runner
    for runner in (
        Runner("xla", _xla, _layout(4), ("decode", "ragged", "prefill")),
        Runner("xla at once", _xla_at_once, _layout(4), ("decode", "ragged", "prefill")),
        *(
            Runner(name, kernel, _layout(size), phases, specs, rows, (*CORNERS, *more), _INTERPRETED)
            for name, kernel, size, phases, specs, rows, more in _KERNELS
        ),
        *(_entry(name, entry) for name, entry in ENTRY_POINTS.items()),
    )
}
"""The ways to run an attention, by name: lowerings, and entry points of `paged.compat`."""


def mesh_runner(mesh: Mesh, axes: Axes) -> Runner:
    """A row like those of `RUNNERS`, of an attention on a mesh of devices.

    **Arguments:**

    - `mesh`: the devices.
    - `axes`: which axis divides KV heads, which contexts. Axes of sequences need stacked batches, and are not for this.

    **Returns:** the runner, on XLA.

    >>> mesh = jax.make_mesh((1,), ("model",), devices=jax.devices()[:1])
    >>> runner = mesh_runner(mesh, paged.Axes(kv_heads="model"))
    >>> len(runner.check(specs=[runner.specs["plain"]], checks=["holes are invisible"]).passed)
    3
    """
    if axes.sequences is not None:
        raise ValueError(f"axes must divide KV heads or contexts alone; got sequences={axes.sequences!r}.")
    sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    without = {"update in place": "whole arrays are put on the devices, and so copied"}
    if axes.context is not None:
        without["page order is invisible"] = "which device holds a page decides in which order states are merged"

    def lower_on_mesh(spec: AttentionSpec, layout: PageLayout) -> Attention:
        return OnMesh.lower(spec, layout, mesh, axes)

    return Runner(f"mesh of {sizes}", lower_on_mesh, _layout(4), ("decode", "ragged", "prefill"), without=without)


def across_targets(
    spec: AttentionSpec, layout: PageLayout, mesh: Mesh | None = None, axes: Axes | None = None
) -> dict[str, Attention]:
    """Every way in which this library runs an attention, by name.

    **Arguments:**

    - `spec`, `layout`: of the attention.
    - `mesh`, `axes`: a mesh that divides KV heads or contexts, which adds a row; see `mesh_runner`.

    **Returns:** an attention ``f(q, pages, batch, sinks)`` of each row of `RUNNERS` that accepts the spec and the
    layout: XLA in both forms, the TPU kernels, and the entry points of `paged.compat`. Schedules are small. Kernels
    without a device are `interpreted`, and entry points run on XLA.

    **Raises:** ``ValueError`` with each row's reason, where none accepts.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    >>> list(across_targets(spec, PageLayout(page_size=8, num_kv_heads=2, head_dim=8, dtype=jnp.float32)))
    ['xla', 'xla at once', 'tpu-decode inline', 'tpu-decode grid', 'tpu-ragged']
    >>> list(across_targets(spec, PageLayout(page_size=8, num_kv_heads=2, head_dim=8, order="split")))[4:]
    ['tpu-ragged', 'page_attention', 'prefill_page_attention']
    """
    rows, found, reasons = list(RUNNERS.values()), {}, []
    if mesh is not None and axes is not None:
        rows.append(mesh_runner(mesh, axes))
    for runner in rows:
        try:
            found[runner.name] = runner.lower(spec, layout)
        except ValueError as error:
            reasons.append(f"{runner.name}: {error}")
    if not found:
        raise ValueError(f"No lowering accepts this spec over this layout: {' '.join(reasons)}")
    return found
