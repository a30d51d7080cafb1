"""One function writes every kind of file of a model that was quantized in training, and says what it refuses."""

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationAwareTraining, export, load_compressed, quantize
from lightning_compress.export.onnx.qdq.cpu import may_saturate
from lightning_compress.export.packed.write import load_packed


class Wide(nn.Module):
    """Of enough weights that integers pay."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 128), nn.Linear(128, 3)

    def forward(self, numbers):
        return self.head(self.hidden(numbers).relu())


@pytest.fixture
def trained(make_module, make_trainer, loader, tmp_path):
    module = make_module(net=Wide)
    trainer = make_trainer([QuantizationAwareTraining(begin=2)], max_epochs=3)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return module.eval()


def test_every_kind_of_file_comes_out_of_a_trained_module(trained, make_module, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    numbers = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    reloaded = load_compressed(type(trained), tmp_path / "last.ckpt", net=Wide).eval()
    with torch.no_grad():
        wanted = reloaded(numbers)
    told = export(trained, tmp_path / "model.onnx", numbers)
    assert told.size_bytes == (tmp_path / "model.onnx").stat().st_size
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: numbers.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0.02, atol=0.02)
    export(trained, tmp_path / "model.pt2", numbers)
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(numbers), wanted, rtol=0.02, atol=0.02)
    export(trained, tmp_path / "model.safetensors")
    again = load_packed(make_module(net=Wide), tmp_path / "model.safetensors")
    assert list(again.state_dict()) == list(trained.state_dict())


@pytest.mark.parametrize(
    ("name", "example", "words"),
    [
        ("model.onn", torch.zeros(1, 8), r"should end in one of .*Did you mean '.onnx'"),
        ("model.onnx", None, r"\.onnx needs an example_input"),
        ("model.pt2", None, r"\.pt2 needs an example_input"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is_there(trained, tmp_path, name, example, words):
    with pytest.raises(ValueError, match=words):
        export(trained, tmp_path / name, example)
    assert not (tmp_path / name).exists()


def test_a_float_module_is_refused(make_module, tmp_path):
    with pytest.raises(ValueError, match="was never quantized"):
        export(make_module(), tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("wanted", "types"), [("auto", ("int8", "uint8")), ("int8", ("int8",)), ("uint8", ("uint8",))], ids=str
)
def test_the_type_of_weights_in_an_onnx_file_can_be_chosen(trained, tmp_path, wanted, types):
    onnx = pytest.importorskip("onnx")
    if wanted == "int8" and may_saturate():
        pytest.skip("on this CPU such a file may be refused")
    export(trained, tmp_path / "model.onnx", torch.randn(5, 8), weight_type=wanted)
    graph = onnx.load(tmp_path / "model.onnx").graph
    zero_points = [one for one in graph.initializer if one.name.endswith("weight.zero_point")]
    assert len(zero_points) == 2
    assert {onnx.helper.tensor_dtype_to_np_dtype(one.data_type).name for one in zero_points} <= {*types}


@pytest.mark.parametrize("name", ["model.pt2", "model.safetensors"])
def test_the_type_of_weights_is_refused_for_files_without_integer_kernels(trained, tmp_path, name):
    with pytest.raises(ValueError, match="weight_type='int8' is about integer kernels"):
        export(trained, tmp_path / name, torch.zeros(2, 8), weight_type="int8")
    with pytest.raises(ValueError, match="weight_type='int8' is about integer kernels"):
        export(nn.Linear(8, 8), tmp_path / "model.onnx", torch.zeros(2, 8), weight_type="int8")
    assert not (tmp_path / name).exists()


def test_a_part_that_holds_all_quantized_layers_is_exported_on_its_grids(trained, tmp_path):
    numbers = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    whole, part = (export(one, tmp_path / f"{place}.safetensors") for place, one in enumerate((trained, trained.net)))
    assert part.size_bytes < whole.size_bytes + 100
    export(trained, tmp_path / "whole.pt2", numbers)
    export(trained.net, tmp_path / "part.pt2", numbers)
    programs = [torch.export.load(tmp_path / f"{name}.pt2").module() for name in ("whole", "part")]
    assert torch.equal(*(program(numbers) for program in programs))
    with pytest.raises(
        ValueError, match="'net.head' is quantized too, but it lies outside of 'net.hidden': take the whole"
    ):
        export(trained.net.hidden, tmp_path / "part.pt2", numbers)


def test_a_part_beside_what_is_quantized_is_a_float_one(make_module, make_trainer, loader, tmp_path):
    pytest.importorskip("onnxruntime")
    module = make_module(net=Wide)
    make_trainer([QuantizationAwareTraining(begin=2, targets="net.head")], max_epochs=1).fit(module, loader)
    export(module.net.hidden.eval(), tmp_path / "model.onnx", numbers := torch.randn(5, 8))
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: numbers.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module.net.hidden(numbers).detach())


def test_what_compiles_a_model_is_not_in_the_way(trained, tmp_path):
    numbers = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    export(trained, tmp_path / "plain.pt2", numbers)
    export(torch.compile(trained, backend="eager"), tmp_path / "compiled.pt2", numbers)
    programs = [torch.export.load(tmp_path / f"{name}.pt2").module() for name in ("plain", "compiled")]
    assert torch.equal(*(program(numbers) for program in programs))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".safetensors"])
def test_a_model_whose_quantized_phase_was_not_reached_is_refused(suffix, make_module, make_trainer, loader, tmp_path):
    module = make_module(net=Wide)
    trainer = make_trainer([QuantizationAwareTraining(begin=20)], max_epochs=5)
    step = module.training_step

    def stop(batch, batch_idx):
        trainer.should_stop = True
        return step(batch, batch_idx)

    module.training_step = stop
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = load_compressed(type(module), tmp_path / "last.ckpt", net=Wide)
    for one in (module, module.net, again):
        with pytest.raises(ValueError, match=r"quantized phase of this (Classifier|Wide) was not reached"):
            export(one, tmp_path / f"model{suffix}", torch.zeros(2, 8))


def test_short_floats_are_short_in_a_program_and_refused_where_only_whole_numbers_are_stored(tmp_path):
    torch.manual_seed(0)
    net, numbers = Wide().eval(), torch.randn(5, 8)
    quantized = quantize(net, [numbers], weights="fp8", activations=None, first="same", last="same", progress=False)
    report = export(quantized, tmp_path / "model.pt2", numbers)
    assert report.weights == 8 * 128 + 128 * 3
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(numbers), quantized(numbers))
    pytest.importorskip("onnxruntime")
    mixed = quantize(net, [numbers], weights="fp8", activations=8, first="same", last="same", progress=False)
    for one in (quantized, mixed):
        with pytest.raises(ValueError, match=r"No weight lies on whole numbers.*fp8 go to \.pt2 or \.safetensors"):
            export(one, tmp_path / "model.onnx", numbers)


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_model_of_another_dtype_is_to_be_made_float32(tmp_path, name, dtype):
    torch.manual_seed(0)
    numbers = torch.randn(5, 8, dtype=dtype)
    quantized = quantize(Wide().eval().to(dtype), [numbers], progress=False)
    with pytest.raises(ValueError, match=rf"is {dtype}, .*\.float\(\) the module first"):
        export(quantized, tmp_path / name, numbers)
    if name == "model.pt2":
        assert export(quantized.float(), tmp_path / name, numbers.float()).weights


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_an_example_that_is_no_tensor_is_refused_with_what_is_wanted(trained, tmp_path, name):
    for example in (torch.zeros(5, 8).numpy(), "five rows"):
        with pytest.raises(ValueError, match=f"a tensor, a tuple .*this {type(example).__name__} holds no tensor"):
            export(trained, tmp_path / name, example)
    with pytest.raises(ValueError, match="this ndarray holds no tensor"):
        export(Wide(), tmp_path / "model.onnx", torch.zeros(5, 8).numpy())


def shifted(net):
    """All weights far from zero, so that a grid around zero would waste half of its numbers."""
    for layer in net.modules():
        if hasattr(layer, "weight"):
            layer.weight.data += layer.weight.data.std() * torch.rand(len(layer.weight), *[1] * (layer.weight.ndim - 1))
    return net.eval()


@pytest.mark.parametrize(("bits", "activations"), [(4, None), (8, None), (8, 8)], ids=str)
def test_grids_that_are_not_symmetric_take_no_more_bits(tmp_path, bits, activations):
    torch.manual_seed(0)
    numbers, sizes = torch.randn(32, 8), {}
    for symmetric in (True, False):
        net = shifted(nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 3)))
        settings = {"weights": bits, "activations": activations, "first": "same", "last": "same", "reduce_range": False}
        quantized = quantize(net, [numbers], symmetric=symmetric, progress=False, **settings)
        packed = export(quantized, tmp_path / "model.safetensors")
        program = export(quantized, tmp_path / "model.pt2", numbers)
        sizes[symmetric] = packed.codes, program.weights
        assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(numbers), quantized(numbers))
        if activations is None:
            assert torch.equal(load_packed(net, tmp_path / "model.safetensors")(numbers), quantized(numbers))
    assert sizes[False] == (sizes[True][0], sizes[True][1] + 2 * (256 + 3))  # a zero point of two bytes for each row
    assert sizes[True][0] == (8 * 256 + 256 * 3) * bits // 8


@pytest.mark.parametrize(
    ("granularity", "kernels"), [("channel", {"QGemm": 1}), ("tensor", {"QLinearConv": 2, "QGemm": 1})]
)
def test_integer_kernels_take_zero_points_where_they_can(tmp_path, granularity, kernels):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 10)
    )
    images = torch.randn(16, 3, 8, 8)
    quantized = quantize(shifted(net), [images], symmetric=False, granularity=granularity, progress=False)
    report = export(quantized, tmp_path / "model.onnx", images[:4])
    assert {name: count for name, count in report.integer_kernels.items() if name in kernels} == kernels
    assert len(report.float_layers) == 3 - sum(kernels.values())
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), quantized(images), rtol=0.0, atol=1e-3)


def test_embeddings_take_their_zero_points_row_by_row(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    net, words = shifted(nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 8))), torch.randint(50, (4, 9))
    quantized = quantize(net, [words], symmetric=False, activations=None, progress=False)
    export(quantized, tmp_path / "model.onnx", words)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: words.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), quantized(words), rtol=1e-5, atol=1e-5)
