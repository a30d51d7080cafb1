import pytest
import torch

from lightning_compress.export.onnx.qdq.fake_quantize_calls import replaced_fake_quantize
from tests.export import handmade


def test_calls_are_told_with_their_grid_and_counted_within_each_forward():
    made = handmade.deployable(handmade.Keywords())
    told = []

    def instead(call, values):
        told.append((call.name, call.number, call.scale, call.zero_point))
        return values

    inputs = torch.randn(2, 64), 1.0, torch.ones(2, 64)
    with replaced_fake_quantize(made, instead):
        plain = made.module(*inputs)
        made.module(*inputs)
    scale, zero_point = float(made.quantizers["both"].scale), int(made.quantizers["both"].zero_point)
    once = [("both", 0, scale, zero_point), ("both (call 2)", 1, scale, zero_point)]
    assert told == once * 2
    assert not torch.equal(plain["sum"], made.module(*inputs)["sum"])
    assert len(told) == 4


def test_clips_of_fewer_bits_are_seen_and_all_is_as_before_after_an_error():
    made = handmade.deployable(handmade.LeNet(4))
    seen = {}

    def instead(call, values):
        seen[call.quantizer] = values
        if call.quantizer == "fc1":
            raise RuntimeError("stop")
        return values

    hooks = len(made.module._forward_pre_hooks)
    with pytest.raises(RuntimeError, match="stop"), replaced_fake_quantize(made, instead):
        made.module(torch.randn(2, 1, 28, 28) * 100)
    assert seen["conv1"].max().item() == pytest.approx(2.0)
    assert len(made.module._forward_pre_hooks) == hooks
    assert not any("forward" in vars(quantizer) for quantizer in made.quantizers.values())
