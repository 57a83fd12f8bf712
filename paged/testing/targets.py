"""The same attention on every lowering that accepts it, interpreted where there is no device for it."""

import jax

from paged.lower import LOWERINGS, Attend, DecodeSchedule, Program, lower
from paged.spec import AttentionSpec, PageLayout

from .interpreter import interpreted


def across_targets(spec: AttentionSpec, layout: PageLayout) -> dict[str, Attend]:
    """Every way in which this library runs an attention, by name.

    **Arguments:**

    - `spec`, `layout`: of the attention.

    **Returns:** an attention for each lowering that accepts the spec and the layout; the decode kernel twice, with its
    sequences inline and on the grid. Kernels without a device are `interpreted`.

    **Raises:** ``ValueError`` with each lowering's reason, where none accepts.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    >>> list(across_targets(spec, PageLayout(page_size=8, num_kv_heads=2, head_dim=8, dtype=jnp.float32)))
    ['tpu-decode inline', 'tpu-decode grid', 'tpu-ragged', 'xla-blocks']
    """
    program, found, reasons = Program.from_spec(spec), {}, []
    for lowering in LOWERINGS:
        reason = lowering.refuses(program, layout)
        if reason is not None:
            reasons.append(f"{lowering.name}: {reason}")
            continue
        own = lowering.schedule(program, layout)
        forms = {lowering.name: own}
        if isinstance(own, DecodeSchedule):
            forms = {f"{lowering.name} {kind}": own.replace(sequence=kind) for kind in ("inline", "grid")}
        for name, schedule in forms.items():
            attend = lower(spec, layout, lowering.target, schedule=schedule)
            found[name] = attend if lowering.target in ("xla", jax.default_backend()) else interpreted(attend)
    if not found:
        raise ValueError(f"No lowering accepts this spec over this layout: {'; '.join(reasons)}.")
    return found
