"""All rows of the list of planted bugs."""

from . import brought, decode, prefill, runtime, terms, writing, xla
from .base import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *terms.MASKS,
    *terms.COVERAGE,
    *terms.SCORES,
    *xla.VISITS,
    *xla.AT_ONCE,
    *xla.SOFTMAX,
    *xla.BATCH,
    *xla.WRITES,
    *brought.BROUGHT,
    *runtime.POOL,
    *runtime.LAYERS,
    *decode.DECODE,
    *decode.UPDATE,
    *prefill.PREFILL,
    *writing.WRITE,
)
KINDS = tuple(dict.fromkeys(mutant.kind for mutant in MUTANTS))
