"""The list of planted bugs, each killed by a named check of `paged.testing` alone: ``python -m tests.mutants``.

A row says what it breaks, how it is planted, on which trial it is tried, and which check must kill it. A mutant that
survives, or that dies by another check, says that a check lost its teeth.

* `planting`: how a bug is put into the library, and taken out again without a trace.
* `base`: a row, and what came of it.
* `trials`: the checks, each on a fixed shape, that rows name; without a bug every trial passes.
* `terms`, `xla`, `runtime`, `decode`, `prefill`, `writing`: the rows.
"""
