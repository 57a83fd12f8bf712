"""The field's own entry points, argument for argument: port code to `paged` by changing an import.

Each entry point uses the caller's cache in place, without a copy, and runs what `paged.lower` runs for the same spec.
The originals reject, ignore or wrongly compute some features on some of their backends: windows, soft caps, sinks,
splits, scales, empty sequences. Here every feature means the same on every target. `docs/porting.md` lists the
differences, argument by argument.

Arguments that are not arrays must be known when JAX traces. Arguments that describe a kernel (blocks, splits, cores,
memory) are hints: they are checked on every target, and change no result. On TPUs the schedule that comes nearest to
them runs, and `explain` says which; elsewhere there is no kernel, and they have no effect.

Each entry point also knows its arguments by the names that other libraries give them, and says what to write for those
that it cannot honour.

Every entry point runs on many devices:

* ``mesh``: the devices, a ``jax.sharding.Mesh``.
* ``axes``: the `paged.Axes` that divide KV heads, contexts or both.
* ``in_specs``: instead of ``axes``, a ``PartitionSpec`` for each array, as a tuple in the order of the arguments or as
  a dict by name. Block tables, lengths and other integers are whole on every device. None is ``P()``. A tuple may have
  an entry for sinks that the call does not have.
* ``out_specs``: the spec of the output; or a pair, for the output and the cache, where the cache is returned.

With fewer KV heads than devices, entry points that only read accept each head once (then the cache is copied, with
heads repeated, at every call) or already repeated. `ragged_page_attention_v3`, which writes, needs heads already
repeated. A single KV head may be whole on every device for all of them, and is not copied.
"""

from .explaining import explain as explain
from .ragged import ragged_page_attention_v2 as ragged_page_attention_v2
from .ragged import ragged_page_attention_v3 as ragged_page_attention_v3
from .split import page_attention as page_attention
from .split import prefill_page_attention as prefill_page_attention
