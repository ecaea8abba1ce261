from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from unipinrec.models.config import TINY
from unipinrec.models.layers import Rotary, rotate
from unipinrec.models.model import UniPinRec


def test_a_product_of_rotated_heads_depends_on_the_distance_alone() -> None:
    rotary = Rotary(TINY)
    query, key = torch.randn((2, 1, 1, 1, 32), generator=torch.Generator().manual_seed(0))

    def product(at: int, other: int) -> float:
        turned = rotate(query, rotary(torch.tensor([[at]]))), rotate(key, rotary(torch.tensor([[other]])))
        return float((turned[0] * turned[1]).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(4, 9), abs=1e-2)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)


def test_rotation_at_position_zero_is_none_and_keeps_length_elsewhere() -> None:
    rotary = Rotary(TINY)
    heads = torch.randn((1, 2, 3, 32), generator=torch.Generator().manual_seed(0))
    turned = rotate(heads, rotary(torch.tensor([[0, 1, 900]])))
    assert torch.equal(turned[:, :, 0], heads[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1))
    assert not torch.allclose(turned[:, :, 1], heads[:, :, 1])


def test_rotation_turns_the_two_halves_against_each_other() -> None:
    heads = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    quarter_turn = torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
    assert rotate(heads, quarter_turn).tolist() == [[[[-3.0, 2.0, 1.0, 4.0]]]]


def test_a_block_projects_to_fewer_key_heads_than_query_heads(make_model: Callable[..., UniPinRec]) -> None:
    model = make_model(num_kv_heads=2)
    x = torch.randn((3, 5, 16), generator=torch.Generator().manual_seed(0))
    rotation = model.rotary(torch.arange(5)[None].expand(3, -1))
    query, key, value = model.layers()[0].project(x, rotation)
    assert (query.shape, key.shape, value.shape) == ((3, 4, 5, 4), (3, 2, 5, 4), (3, 2, 5, 4))


def test_the_sink_is_slot_zero_and_the_same_for_every_row(make_model: Callable[..., UniPinRec]) -> None:
    block = make_model(num_kv_heads=2).layers()[1]
    key, value = torch.zeros(3, 2, 5, 4), torch.ones(3, 2, 5, 4)
    with_key, with_value = block.with_prefix(key, value)
    assert block.sink is not None
    for row in range(3):
        assert torch.equal(with_key[row, :, 0], block.sink[0, :, 0])
        assert torch.equal(with_value[row, :, 0], block.sink[1, :, 0])
    assert torch.equal(with_key[:, :, 1:], key)
    assert torch.equal(with_value[:, :, 1:], value)


def test_the_self_form_has_no_prefix(make_model: Callable[..., UniPinRec]) -> None:
    block = make_model(attention="self").layers()[0]
    key, value = torch.zeros(1, 4, 2, 4), torch.ones(1, 4, 2, 4)
    assert block.sink is None
    assert block.with_prefix(key, value)[0] is key


def test_a_block_adds_to_its_input(make_model: Callable[..., UniPinRec]) -> None:
    block = make_model(dropout=0.5).layers()[0]
    x = torch.randn((2, 3, 16), generator=torch.Generator().manual_seed(0))
    attended = torch.randn((2, 4, 3, 4), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        once = block.finish(x, attended)
        assert torch.equal(once, block.finish(x, attended)), "dropout is off outside training"
        block.out.weight.zero_()
        block.down.weight.zero_()
        assert torch.equal(block.finish(x, attended), x)
    assert not torch.allclose(once, x)
