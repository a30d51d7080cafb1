"""Fake quantization in plain arithmetic, against torch's own operator."""

import pytest
import torch

from lightning_compress.export.pt2.fake_quantize import (
    FAKE_QUANTIZE,
    ArithmeticFakeQuantize,
    as_python_numbers,
    fake_quantize_ops,
)
from tests.export.deployables import Step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("quant_min", "quant_max"), [(0, 255), (0, 15), (-8, 7)])
def test_it_gives_the_bits_of_torchs_operator(dtype, quant_min, quant_max):
    generator = torch.Generator().manual_seed(quant_max)
    for _ in range(40):
        size = 10 ** float(torch.empty(()).uniform_(-3, 3, generator=generator))
        values = torch.randn(500, generator=generator) * size
        scale = values.abs().max() / torch.randint(quant_max // 2 + 1, quant_max + 1, (), generator=generator)
        values[::5] = (torch.arange(100) - 50.5) * scale  # halves, which are rounded to even
        zero_point = torch.randint(quant_min, quant_max + 1, (), generator=generator, dtype=torch.int32)
        expected = FAKE_QUANTIZE(values.to(dtype), scale, zero_point, quant_min, quant_max)
        for given in ((scale, zero_point), (float(scale), int(zero_point))):
            found = fake_quantize_ops(values.to(dtype), *given, quant_min, quant_max)
            assert found.dtype == dtype
            assert torch.equal(found, expected)


def test_calls_by_position_and_by_name_are_caught_and_others_let_through():
    values, calls = torch.randn(5), []

    class Watching(ArithmeticFakeQuantize):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    with Watching():
        one = torch.fake_quantize_per_tensor_affine(values, 0.1, 3, 0, 255)
        other = torch.fake_quantize_per_tensor_affine(values, scale=0.1, zero_point=3, quant_min=0, quant_max=255)
        doubled = values * 2
    assert calls.count(FAKE_QUANTIZE) == 2
    assert torch.equal(one, FAKE_QUANTIZE(values, 0.1, 3, 0, 255))
    assert torch.equal(one, other)
    assert torch.equal(doubled, values + values)


def test_quantizers_have_numbers_for_a_while_and_their_buffers_again_after_an_error():
    step, rows = Step(zero_point=3), Step()
    rows.scale, rows.zero_point = torch.ones(2), torch.zeros(2)
    before = dict(step.named_buffers())

    def use():
        with as_python_numbers([step, rows]):
            assert step.scale == float(torch.tensor(0.05))
            assert type(step.zero_point) is int
            assert rows.scale.shape == (2,)
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert dict(step.named_buffers()) == before
    assert not {"scale", "zero_point"} & vars(step).keys()
