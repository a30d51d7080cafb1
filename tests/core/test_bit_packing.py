"""Numbers of a few bits, against strings of bits that Python wrote."""

import pytest
import torch

from lightning_compress.core.bit_packing import MOST_BITS, Packing, pack, tightest, unpack

every_width = pytest.mark.parametrize("bits", range(1, MOST_BITS + 1))


def drawn(count, bits, seed=0):
    return torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))


def as_one_number(codes, bits):
    """The stream of bits by its definition: one large number, written from its lowest byte on."""
    stream = sum(code << (place * bits) for place, code in enumerate(codes.tolist()))
    return list(stream.to_bytes(-(-len(codes) * bits // 8), "little"))


@every_width
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 64, 101])
def test_the_bytes_are_those_of_one_large_number(bits, count):
    codes = drawn(count, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == as_one_number(codes, bits)
    assert torch.equal(unpack(packed, bits, count).long(), codes)


@every_width
def test_the_lowest_and_the_highest_code_come_back(bits):
    codes = torch.tensor([0, 2**bits - 1] * 9)
    assert unpack(pack(codes, bits), bits, 18).tolist() == codes.tolist()


def test_four_bits_lie_low_half_first():
    assert pack(torch.tensor([0x1, 0x2, 0xF]), bits=4).tolist() == [0x21, 0x0F]


def test_packing_takes_the_tensor_in_its_order_and_leaves_it_alone():
    codes = drawn(12, 3).reshape(3, 4).to(torch.int8).T
    before = codes.clone()
    assert pack(codes, 3).tolist() == as_one_number(codes.flatten(), 3)
    assert torch.equal(codes, before)


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (torch.tensor([0, 8]), "reach from 0 to 8"),
        (torch.tensor([-1, 3]), "reach from -1 to 3"),
        (torch.tensor([2**40]), "reach from"),
        (torch.tensor([0.5]), "whole numbers"),
    ],
    ids=str,
)
def test_codes_that_do_not_fit_are_refused(codes, said):
    with pytest.raises(ValueError, match=said):
        pack(codes, bits=3)


@pytest.mark.parametrize("bits", [0, 17, -1, True, 2.0, "4"])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="from 1 to 16"):
        pack(torch.tensor([1]), bits)
    with pytest.raises(ValueError, match="from 1 to 16"):
        unpack(torch.zeros(1, dtype=torch.uint8), bits, 1)


@pytest.mark.parametrize("count", [-1, 0, 5, 9, 2**62])
def test_bytes_of_another_count_are_refused(count):
    with pytest.raises(ValueError, match="packed has 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, count)


@pytest.mark.parametrize("packed", [torch.zeros(3, dtype=torch.int8), torch.zeros(1, 3, dtype=torch.uint8)], ids=str)
def test_what_is_no_row_of_bytes_is_refused(packed):
    with pytest.raises(ValueError, match="row of uint8"):
        unpack(packed, 3, 8)


@pytest.mark.parametrize(
    ("codes", "bits", "offset", "step"),
    [
        ([-7, 0, 7], 4, -7, 1),
        ([-127, 0, 127], 8, -127, 1),
        ([-128, 0, 127], 8, -128, 1),
        ([-1, 0, 1], 2, -1, 1),
        ([-1, 1, -1], 1, -1, 2),  # binary weights know no zero
        ([-3, 3, 2], 3, -3, 1),
        ([0, 0], 1, 0, 1),
        ([5], 1, 5, 1),
        ([0, 128, 1], 8, 0, 1),
        ([-32767, 0, 32767], 16, -32767, 1),
    ],
    ids=str,
)
def test_the_tightest_packing_takes_the_bits_that_the_codes_need(codes, bits, offset, step):
    tensor = torch.tensor(codes, dtype=torch.int32)
    packing = tightest(tensor)
    assert packing == Packing((len(codes),), bits, offset, step)
    assert packing.unpack(packing.pack(tensor)).tolist() == codes


def test_the_tightest_packing_of_int8_does_not_overflow():
    codes = torch.tensor([[-128, 127], [3, -5]], dtype=torch.int8)
    packing = tightest(codes)
    assert packing.unpack(packing.pack(codes)).tolist() == codes.tolist()


def test_an_empty_tensor_takes_no_byte():
    packing = tightest(torch.zeros(0, 3, dtype=torch.int32))
    packed = packing.pack(torch.zeros(0, 3, dtype=torch.int32))
    assert packed.shape == (0,)
    assert packing.unpack(packed).shape == (0, 3)


def test_codes_of_more_than_sixteen_bits_are_refused():
    with pytest.raises(ValueError, match="takes 17 bits"):
        tightest(torch.tensor([0, 1, 2**16]))
