"""The two forms of the check of ids against a vocabulary, held against each other and against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.tokenizer.ids import id_outside, index_outside


@given(ids=st.lists(st.integers(-3, 12), max_size=8), n_vocab=st.integers(1, 10))
def test_the_first_id_outside_is_found_in_lists_and_arrays(ids: list[int], n_vocab: int) -> None:
    outside = [i for i, token in enumerate(ids) if not 0 <= token < n_vocab]
    assert index_outside(np.array(ids, np.int64), n_vocab) == (outside[0] if outside else None)
    found = id_outside(ids, n_vocab)
    assert (found is None) == (not outside)
    assert found is None or (found in ids and not 0 <= found < n_vocab)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_vocabulary_larger_than_the_dtype_holds_every_id(dtype: str) -> None:
    largest = np.iinfo(dtype).max
    assert index_outside(np.array([0, largest], dtype), int(largest) + 1) is None
    assert index_outside(np.array([0, largest], dtype), int(largest)) == 1
