"""What every attention over pages promises, as checks with names: `LOWERING_CHECKS`."""

from collections.abc import Callable
from typing import NamedTuple

from ..cases import Phase
from .faults import check_holes, check_num_seqs_is_clamped, check_past_the_table, check_starts_that_lie
from .isolation import (
    check_bad_values_stay,
    check_order_of_sequences,
    check_other_sequences,
    check_padding,
    check_page_order,
    check_reruns,
    check_sequences_alone,
)
from .numbers import (
    check_any_shape,
    check_equals_the_reference,
    check_float32_sums,
    check_full_pages_end,
    check_hidden_first_pages,
    check_huge_scores,
    check_output_dtype,
    check_scores_of_zero,
    check_window_of_the_whole,
)
from .numbers import require_equal as require_equal
from .steps import check_chunks, check_in_place, check_one_trace, check_split_and_merge, check_update
from .subject import ROWS as ROWS
from .subject import Attention as Attention
from .subject import LeftOut as LeftOut
from .subject import LowerFn as LowerFn
from .subject import Subject as Subject

_ALL: tuple[Phase, ...] = ("decode", "ragged", "prefill")
_MANY: tuple[Phase, ...] = ("decode", "ragged")


class LoweringCheck(NamedTuple):
    """One promise.

    * ``run``: the check.
    * ``phases``: the phases that it is for.
    * ``needs``: the method of the attention that it needs, if any.
    * ``once``: whether it lowers specs of its own, so that one spec is enough.
    """

    run: Callable[[Subject, Phase], None]
    phases: tuple[Phase, ...] = _ALL
    needs: str | None = None
    once: bool = False


LOWERING_CHECKS = {
    "equals the reference": LoweringCheck(check_equals_the_reference),
    "any shape": LoweringCheck(check_any_shape, once=True),
    "scores of zero": LoweringCheck(check_scores_of_zero, needs="state"),
    "huge scores": LoweringCheck(check_huge_scores),
    "hidden first pages": LoweringCheck(check_hidden_first_pages, _MANY, once=True),
    "full pages end at the length": LoweringCheck(check_full_pages_end, _MANY, once=True),
    "a window of the whole is none": LoweringCheck(check_window_of_the_whole, once=True),
    "sums are float32": LoweringCheck(check_float32_sums, _MANY, needs="state", once=True),
    "reruns are equal": LoweringCheck(check_reruns),
    "page order is invisible": LoweringCheck(check_page_order),
    "other sequences are invisible": LoweringCheck(check_other_sequences, _MANY),
    "sequences alone are the same": LoweringCheck(check_sequences_alone, ("ragged",)),
    "the order of sequences is invisible": LoweringCheck(check_order_of_sequences, _MANY),
    "padding is nothing": LoweringCheck(check_padding),
    "bad values stay in their sequence": LoweringCheck(check_bad_values_stay, _MANY),
    "holes are invisible": LoweringCheck(check_holes),
    "past the table": LoweringCheck(check_past_the_table),
    "num_seqs is clamped": LoweringCheck(check_num_seqs_is_clamped),
    "starts that lie": LoweringCheck(check_starts_that_lie, _MANY, once=True),
    "split and merge": LoweringCheck(check_split_and_merge, _MANY, needs="state"),
    "chunks are invisible": LoweringCheck(check_chunks, ("ragged",)),
    "one trace": LoweringCheck(check_one_trace),
    "the output has the queries' dtype": LoweringCheck(check_output_dtype, _MANY, once=True),
    "update": LoweringCheck(check_update, needs="update"),
    "update in place": LoweringCheck(check_in_place, needs="update", once=True),
}
"""What every attention over pages promises, by name: `check_lowering` runs these."""
