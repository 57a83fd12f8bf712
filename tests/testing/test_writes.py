"""`check_write` and `check_case` name what is wrong with a write and with one case."""

import jax.numpy as jnp
import pytest

import paged
from paged.spec import AttentionSpec, PageLayout
from paged.testing import Case, CheckFailure, check_case, check_write

INT8 = PageLayout(page_size=8, num_kv_heads=2, head_dim=8, dtype=jnp.int8, order="split", scales="token")


def test_the_librarys_write_passes():
    check_write(paged.write)
    check_write(paged.write, layouts=[INT8], batches=["mixed", "neighbours"])


def test_a_wrong_write_is_named():
    def twice_the_keys(k, v, pages, batch):
        return paged.write(2 * k, v, pages, batch)

    with pytest.raises(CheckFailure, match=r'writes: in array 0 of the pages, .* \(page, offset\) = .* batch "mixed"'):
        check_write(twice_the_keys)


def test_a_wrong_case_is_named():
    case = Case(spec=AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8), phase="decode", rows=3)
    attend = paged.lower(case.spec.replace(window=2), case.layout)
    with pytest.raises(CheckFailure, match=r"(?s)equals the reference: .* error .*with the corner 'mixed': lengths"):
        check_case(attend, case)
