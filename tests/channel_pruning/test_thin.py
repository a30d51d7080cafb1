"""What becomes of a thin module afterwards: compiled, copied, saved, exported; and of one that was compiled before."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress import ChannelPruning
from lightning_compress.channel_pruning.budget import RUNTIMES
from lightning_compress.measure.latency import measure_latency
from lightning_compress.measure.onnx_latency import measure_onnx_latency


def images(count):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


# Enough for what is slow and has little to do with Lightning.
under_one_name = pytest.mark.parametrize("pl", ["pytorch_lightning"], indirect=True)


@pytest.fixture
def loader():
    data = torch.utils.data.TensorDataset(images(48), torch.arange(48) % 3)
    return torch.utils.data.DataLoader(data, batch_size=8)


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def channels(criterion="taylor_activations"):
    return ChannelPruning(sparsity=0.5, criterion=criterion, begin=1, end=4, every=1)


@pytest.fixture
def thin(make_module, make_trainer, loader):
    module = make_module(net=convolutions)
    make_trainer([channels()], max_epochs=1).fit(module, loader)
    return module.net.eval()


@under_one_name
def test_it_compiles_copies_saves_and_exports_as_any_other(thin, tmp_path):
    x = images(5)
    expected = thin(x)
    assert (thin[0].out_channels, thin[3].out_channels) == (4, 3)
    torch.compiler.reset()  # else what other tests have compiled counts against a limit
    compiled = torch.compile(thin, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert torch.equal(copy.deepcopy(thin)(x), expected)
    torch.testing.assert_close(torch.export.export(thin, (x,)).module()(x), expected)
    torch.save(thin.state_dict(), tmp_path / "weights.pt")
    torch.save(thin, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(again(x), expected)


@under_one_name
@pytest.mark.parametrize("criterion", ["taylor_activations", "thinet"])
def test_a_part_that_was_compiled_before_gets_as_thin_as_one_that_was_not(criterion, make_module, make_trainer, loader):
    plain, compiled = make_module(net=convolutions), make_module(net=convolutions)
    compiled.net = torch.compile(compiled.net, backend="eager")
    for module in (plain, compiled):
        make_trainer([channels(criterion)], max_epochs=1).fit(module, loader)
    inside = compiled.net._orig_mod
    assert (inside[0].out_channels, inside[3].out_channels) == (4, 3)
    for one, other in zip(plain.net.parameters(), inside.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(compiled.eval()(images(5)), plain.eval()(images(5)))


@under_one_name
def test_a_latency_on_a_real_clock_is_met_by_fewer_channels_or_refused_with_the_nearest(
    make_module, make_trainer, loader
):
    """Half of the least of three measurements: most of the channels could go, and some must."""

    def wide():
        return nn.Sequential(
            nn.Upsample(scale_factor=3), nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU(),
            nn.Conv2d(96, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3),
        )  # fmt: skip

    module = make_module(net=wide)
    timed = [measure_latency(module, images(2), 2, runs=30, seconds=0.3).median_ms for _ in range(3)]
    with pytest.raises(
        ValueError, match=r"latency_ms=1e-05 cannot be met: .* the nearest is latency_ms=0\.\d"
    ) as error:
        make_trainer([ChannelPruning(latency_ms=1e-5, begin=1, end=3)], max_steps=4).fit(module, loader)
    assert module.net[3].out_channels == 96
    nearest = float(re.search(r"nearest is latency_ms=([\d.]+)\.", str(error.value))[1])
    assert 0 < nearest < min(timed)
    ours = ChannelPruning(latency_ms=min(timed) / 2, begin=1, end=3, every=2)
    make_trainer([ours], max_steps=4).fit(module, loader)
    assert ours.reached
    assert all(one.out_channels < width for one, width in zip(module.net[1:6:2], (64, 96, 32), strict=True))


@under_one_name
def test_a_latency_in_onnx_runtime_is_taken_of_files_of_the_thin_module(make_module, make_trainer, loader, monkeypatch):
    """A clock that counts the weights in the file that ONNX Runtime is given, so that the answer is known."""
    import onnxruntime

    def counted(model, example, batch, **options):
        sizes = []
        opened = onnxruntime.InferenceSession

        def session(path, *given, **named):
            sizes.append(Path(path).stat().st_size)
            return opened(path, *given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(onnxruntime, "InferenceSession", session)
            found = measure_onnx_latency(model, example, batch, **options)
        assert found.median_ms > 0
        return replace(found, median_ms=sizes[0] / 1000)

    def wide():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 3))

    module = make_module(net=wide)
    monkeypatch.setitem(RUNTIMES, "onnxruntime", counted)
    monkeypatch.setattr("lightning_compress.channel_pruning.pruner.LATENCY_STEPS", 2)  # to a quarter of the channels
    ours = ChannelPruning(latency_ms=45.0, latency_in="onnxruntime", begin=1, end=2, every=1)
    make_trainer([ours], max_steps=3).fit(module, loader)
    # 68 weights of 4 bytes for each hidden unit, beside a few thousand bytes of graph: 128 units fit, and 192 do not.
    assert module.net[1].out_features == 128
