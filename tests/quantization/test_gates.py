"""SiLU and Hardswish between two grids have their gate on a grid from 0 to 1, as integer kernels compute them."""

import copy

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_compress import QuantizationAwareTraining, export, load_compressed, quantize
from lightning_compress.quantization.lookup import quantized_of
from lightning_compress.quantization.lowering.lower import lower

FUNCTIONS = {
    "silu": (nn.SiLU, torch.sigmoid),
    "hardswish": (nn.Hardswish, functional.hardsigmoid),
}


def network(act, inplace=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), act(inplace=inplace), nn.Conv2d(16, 8, 3), nn.ReLU())
    return nn.Sequential(net, nn.Conv2d(8, 16, 1)).eval()


def images(count=8, seed=1):
    return 3 * torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_output_is_the_input_times_the_rounded_gate(name, inplace):
    act, gate = FUNCTIONS[name]
    model = quantize(network(act, inplace), [images()], progress=False)
    seen = []
    model[0][1].register_forward_hook(lambda _module, _args, output: seen.append(output.clone()))
    model[0][2].register_forward_hook(lambda _module, _args, output: seen.append(output.clone()))
    with torch.no_grad():
        model(images())
    given, made = seen
    assert len(given.unique()) <= 256
    expected = given * (gate(given) * 255).round() / 255
    end = quantized_of(model).activations["0.2 output"]
    assert torch.allclose(made, end.on_grid(expected).values, atol=float(end.scale) * 1.01)
    other = (made - end.on_grid(expected).values).abs() > 1e-6
    assert other.float().mean() < 0.001  # what lies in the middle of two codes


@pytest.mark.parametrize("name", FUNCTIONS)
def test_integer_kernels_compute_it_and_give_what_the_model_gives(name, tmp_path):
    pytest.importorskip("onnxruntime")
    from lightning_compress.export.onnx.qdq.runtime import make_session, run_session

    model = quantize(network(FUNCTIONS[name][0]), [images()], progress=False)
    kernels = export(model, tmp_path / "model.onnx", images(2)).integer_kernels
    assert kernels["QLinearMul"] == 1
    assert kernels["QLinearSigmoid" if name == "silu" else "QLinearAdd"] == 1
    with torch.no_grad():
        wanted = model(images(50, seed=2)).numpy()
    (found,) = run_session(make_session(tmp_path / "model.onnx"), images(50, seed=2)).values()
    assert numpy.abs(found - wanted).max() < 0.05 * numpy.abs(wanted).max()
    assert (numpy.abs(found - wanted) > 1e-4 * numpy.abs(wanted).max()).mean() < 0.02
    export(model, tmp_path / "model.pt2", images(2))
    assert torch.allclose(torch.export.load(tmp_path / "model.pt2").module()(images()), model(images()), atol=1e-4)


def test_below_8_bits_and_without_a_grid_on_both_sides_it_is_computed_as_it_was():
    four = {"weights": 4, "activations": 4, "first": "same", "last": "same"}
    assert "0.2 gate" not in quantized_of(quantize(network(nn.SiLU), [images()], progress=False, **four)).activations
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3))
    found = quantized_of(quantize(net, [images()], progress=False)).activations
    assert "1 gate" not in found


def test_one_function_under_two_names_is_left_alone():
    act = nn.SiLU()
    net = nn.Sequential(nn.Conv2d(2, 4, 3), act, nn.Conv2d(4, 4, 3), act, nn.Conv2d(4, 4, 1))
    model = quantize(net, [images()], progress=False)
    assert not [name for name in quantized_of(model).activations if name.endswith("gate")]
    assert torch.equal(lower(model).module(images()), model(images()))


def test_copies_compute_the_same_and_keep_nothing_of_a_batch():
    model = quantize(network(nn.SiLU, inplace=True), [images()], progress=False)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))
    hooks = [hook for hook in model[0][2]._forward_hooks.values() if getattr(hook, "gating", None)]
    assert [hook.gating.given for hook in hooks] == [None]


def test_a_training_learns_through_the_gate_and_its_checkpoint_has_it(make_module, make_trainer, loader, tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 8, 2), nn.SiLU(inplace=True), nn.Conv2d(8, 8, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(24, 3),
        )  # fmt: skip

    module = make_module(net=net)
    before = module.net[1].weight.detach().clone()
    trainer = make_trainer([QuantizationAwareTraining(begin=2)], max_epochs=1)
    trainer.fit(module, loader)
    assert not torch.equal(before, module.net[1].weight)
    assert float(quantized_of(module).activations["net.2 gate"].scale) == pytest.approx(1 / 255)
    trainer.save_checkpoint(tmp_path / "gated.ckpt")
    loaded = load_compressed(make_module, tmp_path / "gated.ckpt", net=net).eval()
    values = next(iter(loader))[0]
    quantized_of(module).install()
    assert torch.equal(loaded(values), module.eval()(values))
