import numpy
import pytest
import torch
from torch import nn

from lightning_compress import export, quantize
from lightning_compress.export.onnx.agreement import output_agreement
from lightning_compress.export.onnx.qdq.output_agreement import OutputAgreement, compare_outputs
from lightning_compress.export.onnx.write import write_onnx
from tests.export import handmade


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    torch.manual_seed(0)
    made = handmade.deployable(handmade.Perceptron())
    path = tmp_path_factory.mktemp("agreement") / "model.onnx"
    write_onnx(made, path, torch.randn(8, 32))
    return made, path


def test_a_file_agrees_with_what_it_was_made_of(written):
    made, path = written
    batches = [torch.randn(50, 32), (torch.randn(7, 32),), {"values": torch.randn(3, 32)}]
    assert output_agreement(path, made, iter(batches)) == output_agreement(path, made.module, batches) == 1.0


class Turned(nn.Module):
    """Gives every sample whose first value is positive to the next class."""

    def __init__(self, module):
        super().__init__()
        self.module, self.dropout = module, nn.Dropout(0.9)

    def forward(self, values):
        scores = self.dropout(self.module(values))
        return torch.where(values[:, :1] > 0, scores.roll(1, dims=1), scores)


def test_the_share_is_over_all_samples_of_all_batches_and_the_module_stays_in_its_mode(written):
    made, path = written
    turned = Turned(made.module).train()
    batches = [torch.randn(30, 32), torch.randn(10, 32)]
    positive = sum(int((batch[:, 0] > 0).sum()) for batch in batches)
    assert 0 < positive < 40
    assert output_agreement(path, turned, batches) == (40 - positive) / 40
    assert turned.training
    assert turned.dropout.training


def test_nothing_to_compare_is_refused(written):
    made, path = written
    with pytest.raises(ValueError, match="no batch to compare"):
        output_agreement(path, made, [])
    with pytest.raises(ValueError, match="no tensor of scores"):
        output_agreement(path, nn.Sequential(made.module, nn.Flatten(0)), [torch.randn(2, 32)])


def test_outputs_are_compared_by_their_range_and_by_their_classes():
    expected = numpy.array([[10.0, 12.0], [11.0, 14.0], [13.0, 12.5], [10.5, 10.0]], numpy.float32)
    found = expected.copy()
    found[2] = [12.0, 12.5]  # by 1 of the range 14 - 10, and the other class
    assert compare_outputs([found], [expected], 4) == OutputAgreement(4, 0.25, equal_top1=3)
    # No classes: feature maps, one column, and rows that are not samples.
    assert compare_outputs([found.reshape(4, 2, 1)], [expected.reshape(4, 2, 1)], 4) == OutputAgreement(4, 0.25)
    assert compare_outputs([found[:, :1]], [expected[:, :1]], 4).equal_top1 is None
    assert compare_outputs([found], [expected], 2).equal_top1 is None
    assert compare_outputs([numpy.float32([3.0])], [numpy.float32([2.0])], None) == OutputAgreement(1, 0.5)


def test_a_report_says_how_the_example_agrees(tmp_path):
    torch.manual_seed(0)
    report = write_onnx(handmade.deployable(handmade.Perceptron()), tmp_path / "model.onnx", torch.randn(8, 32))
    assert report.agreement.samples == report.agreement.equal_top1 == 8
    assert 0 <= report.agreement.range_difference < 1e-3
    report = export(nn.Linear(32, 3), tmp_path / "float.onnx", torch.randn(5, 32))
    assert "over the 5 samples of the example input" in str(report)
    assert "5 of 5 top-1 are equal" in str(report)


def deep():
    """Layers with and without BatchNorm, one of whose channels it has closed."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 5))
    for norm in [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]:
        with torch.no_grad():
            norm.weight.uniform_(-2.0, 4.0), norm.bias.normal_(0, 0.5), norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.2, 0.4)
            norm.weight[0] = 0.0
    return model.eval()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_onnx_runtime_gives_the_numbers_that_the_quantized_model_gives(bits, tmp_path):
    """Biases that only one of the two rounds would move some number of every sample to another step."""
    from lightning_compress.export.onnx.qdq.runtime import make_session, run_session

    images = torch.rand(64, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    model = quantize(deep(), [images], weights=bits, activations=bits, progress=False)
    report = export(model, tmp_path / "model.onnx", images[:4])
    assert report.integer_kernels == {"QLinearConv": 5, "QGemm": 1}
    assert max(report.bias_errors.values()) < 1e-6
    with torch.no_grad():
        wanted = model(images)
    (found,) = run_session(make_session(tmp_path / "model.onnx"), images).values()
    near = (torch.from_numpy(found) - wanted).abs().amax(1) < 1e-5 * wanted.abs().max()
    assert near.float().mean() > 0.9
    assert output_agreement(tmp_path / "model.onnx", model, [images]) == 1.0
