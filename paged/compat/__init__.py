"""The field's own entry points, argument for argument: code moves over by changing an import.

Each adopts the caller's cache as it lies, without a copy, and runs what `paged.lower` runs for the same spec. What the
originals reject, ignore or compute wrongly on some of their backends (windows, soft caps, sinks, splits, scales, empty
sequences) means the same here on every target. `docs/porting.md` lists the differences, argument by argument.

All take ``target`` and ``interpret``, those of `paged.lower`. Arguments that describe a kernel (blocks, splits, cores,
memory) are checked on every target, become the `paged.Schedule` on TPUs, and have no effect where there is no kernel.
Arguments that are not arrays must be known when JAX traces.

All run on many devices: ``mesh``, and ``axes``, a `paged.Axes` of KV heads, contexts or both, or else ``in_specs``, a
`PartitionSpec` for each array in order, or by name, from which they follow; ``out_specs`` is that of the output, or of
the output and the cache. Tables and lengths are whole on every device. Where there are fewer KV heads than devices, a
cache that is read may have each head once, and is copied at every call, or as often as devices need it; one that is
written must have them so.
"""

from .ragged import ragged_page_attention_v2 as ragged_page_attention_v2
from .ragged import ragged_page_attention_v3 as ragged_page_attention_v3
from .split import page_attention as page_attention
from .split import prefill_page_attention as prefill_page_attention
