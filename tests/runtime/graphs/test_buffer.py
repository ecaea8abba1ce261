from __future__ import annotations

import numpy as np
import pytest

from unipinrec.runtime.bundle.manifest import Manifest
from unipinrec.runtime.graphs.engine import HostTensor, KvBuffer, row_of


def numbered(count: int, first: float = 1.0) -> list[np.ndarray[tuple[int, int, int], np.dtype[np.float32]]]:
    """Key and value [1, count, 2]: slot i of the key holds first + i, that of the value its negative."""
    slots = np.repeat(np.arange(count, dtype=np.float32)[:, None] + np.float32(first), 2, axis=1)
    return [slots[None], -slots[None]]


@pytest.fixture
def buffer(manifest: Manifest) -> KvBuffer:
    """Two histories of up to five slots; the model has a key and a value of one head of two."""
    buffer = KvBuffer(manifest.model, 2, 5)
    buffer.values.fill(np.nan)
    return buffer


def test_slots_lie_where_they_were_put(buffer: KvBuffer) -> None:
    buffer.put(0, 0, numbered(3))
    buffer.put(0, 3, numbered(1, first=9.0))
    buffer.put(1, 0, numbered(1))
    buffer.clear_from(0, 4)
    buffer.clear_from(1, 1)
    key, value = (tensor.numpy() for tensor in buffer.tensors())
    assert key.shape == value.shape == (2, 1, 5, 2)
    assert key[:, 0, :, 0].tolist() == [[1, 2, 3, 9, 0], [1, 0, 0, 0, 0]]
    assert key[:, 0, :, 1].tolist() == key[:, 0, :, 0].tolist()
    np.testing.assert_array_equal(value, -key)


def test_tensors_and_rows_are_views(buffer: KvBuffer) -> None:
    tensors = buffer.tensors()
    buffer.row(1)[...] = 4.0
    assert [tensor.shape for tensor in tensors] == [(2, 1, 5, 2)] * 2
    for tensor in tensors:
        assert (tensor.numpy()[1] == 4.0).all()
        assert np.isnan(tensor.numpy()[0]).all()


def test_a_beginning_is_a_copy(buffer: KvBuffer) -> None:
    buffer.put(0, 0, numbered(5))
    beginning = buffer.beginning(2)
    buffer.values.fill(7.0)
    assert [tensor.shape for tensor in beginning] == [(2, 1, 2, 2)] * 2
    assert beginning[0].numpy()[0, 0, :, 0].tolist() == [1, 2]
    assert beginning[0].numpy().flags.c_contiguous


def test_the_row_of_a_batch() -> None:
    values = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    key, value = row_of([HostTensor(values), HostTensor(-values)], 1, 2)
    np.testing.assert_array_equal(key, values[1, :, :2])
    np.testing.assert_array_equal(value, -values[1, :, :2])
    assert np.shares_memory(key, values)


def test_a_batch_of_other_tensors_is_refused(buffer: KvBuffer) -> None:
    with pytest.raises(ValueError, match="shorter"):
        buffer.put(0, 0, numbered(1)[:1])
