import json
import math
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrizations

from lightning_compress import export, quantize
from lightning_compress.measure.sparse_encoding import encode
from lightning_compress.reporting import LayerReport, Report, report

QUICK = {"runs": 2, "seconds": 0.1}


def lenet5():
    torch.manual_seed(3)
    net = nn.Sequential()
    net.conv1, net.pool1, net.conv2, net.pool2 = (
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
    )
    net.flat, net.fc1, net.relu, net.fc2 = nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)
    return net


IMAGES = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def before_and_after():
    model = lenet5()
    dense = report(model, IMAGES, metrics={"test/error": torch.tensor(0.9)}, **QUICK)
    with torch.no_grad():
        model.fc1.weight[:, 80:] = 0
    after = report(
        model, IMAGES, baseline=dense, metrics={"test/error": 1.0}, history={"sparsity": [(0, 0.0), (10, 0.8)]}, **QUICK
    )
    return dense, after


def test_lenet5_before_and_after(before_and_after):
    dense, after = before_and_after
    assert [layer.name for layer in after.layers] == ["conv1", "conv2", "fc1", "fc2"]
    assert [layer.type for layer in after.layers] == ["Conv2d", "Conv2d", "Linear", "Linear"]
    assert after.layers[1].shape == (50, 20, 5, 5)
    assert [layer.parameters for layer in after.layers] == [520, 25_050, 400_500, 5_010]
    assert (dense.parameters, dense.nonzero, dense.sparsity) == (431_080, 431_080, 0.0)
    assert (after.weights, after.weights_nonzero) == (430_500, 430_500 - 360_000)
    assert after.weight_sparsity == pytest.approx(360_000 / 430_500)
    assert after.layers[2].weight_sparsity == pytest.approx(0.9)
    assert after.layers[2].sparsity == pytest.approx(360_000 / 400_500)
    assert (after.macs_batch, after.macs, after.macs_nonzero) == (1, 2_293_000, 2_293_000 - 360_000)
    assert after.before == dense
    assert dense.metrics["test/error"] == pytest.approx(0.9)


def test_sizes_are_those_of_real_files(before_and_after):
    dense, after = before_and_after
    model = lenet5()
    assert dense.size_bytes == len(encode(model.state_dict(), sparse=False))
    assert 431_080 * 4 < dense.size_bytes < 431_080 * 4 + 250  # names and shapes
    assert after.size_bytes == dense.size_bytes
    assert 71_080 * 4 < after.size_bytes_sparse < 71_080 * 4 + 431_080 / 8 + 250
    assert after.size_bytes_gzip < after.size_bytes
    assert sum(layer.size_bytes_sparse for layer in after.layers) == after.size_bytes_sparse - 8
    assert after.compression_ratio == dense.size_bytes / after.size_bytes_sparse


def test_latency_is_of_batch_1_and_64(before_and_after):
    _, after = before_and_after
    assert (after.latency_batch_1.batch, after.latency_batch_64.batch) == (1, 64)
    assert after.latency_batch_64.median_ms > after.latency_batch_1.median_ms > 0
    assert after.latency_batch_1.threads == 1
    assert after.latency_batch_1.runs == 2
    assert set(after.environment) == {"cpu", "torch", "python", "system"}


def test_a_report_comes_back_from_its_file(before_and_after, tmp_path):
    for one in before_and_after:
        path = one.save(tmp_path / "deep" / "report.json")
        assert Report.load(path) == one
    totals = json.loads(path.read_text())["totals"]
    assert totals["macs"] == 2_293_000
    assert totals["parameters"] == 431_080


def test_what_is_no_finite_number_is_null_in_the_file(tmp_path):
    path = report(nn.Linear(2, 2), metrics={"loss": math.nan, "error": math.inf, "top1": 0.5}).save(tmp_path / "r.json")
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["metrics"] == {
        "loss": None,
        "error": None,
        "top1": 0.5,
    }
    assert math.isnan(Report.load(path).metrics["loss"])


def test_only_the_last_baseline_is_kept(before_and_after):
    _, after = before_and_after
    assert report(nn.Linear(2, 2), baseline=after).before.before is None


def test_without_an_input_there_are_no_macs_and_the_note_says_how():
    bare = report(nn.Linear(2, 2))
    assert (bare.macs, bare.macs_nonzero, bare.latency_batch_1, bare.layers[0].macs) == (None, None, None, None)
    assert any("Call report(model, example_input)" in note for note in bare.notes)


def test_latency_can_be_left_out():
    one = report(nn.Linear(2, 2), torch.ones(1, 2), latency=False)
    assert (one.macs, one.latency_batch_1, one.notes) == (4, None, ())


def test_a_model_that_refuses_a_batch_gives_a_reason():
    class OnlyThree(nn.Linear):
        def forward(self, x):
            if len(x) != 3:
                raise RuntimeError("only batches of 3")
            return super().forward(x)

    one = report(OnlyThree(2, 2), torch.ones(3, 2), **QUICK)
    assert (one.macs, one.macs_batch) == (3 * 4, 3)
    assert one.latency_batch_1 is None
    assert one.latency_batch_64 is None
    assert sum("only batches of 3" in note for note in one.notes) == 3


def test_an_input_without_batch_is_run_as_it_is():
    one = report(nn.LSTM(3, 4), torch.ones(7, 3), batch_dim=None, **QUICK)
    assert one.macs == 7 * 16 * 7
    assert one.latency_batch_1.runs == 2
    assert one.latency_batch_64 is None
    assert any("batch_dim=None" in note for note in one.notes)


def test_sequences_first_have_their_batch_in_dimension_1():
    assert report(nn.LSTM(3, 4), torch.ones(7, 5, 3), batch_dim=1, **QUICK).macs == 7 * 16 * 7


@pytest.mark.parametrize(
    "example", [(torch.ones(2, 3), torch.ones(2, 4)), {"input1": torch.ones(2, 3), "input2": torch.ones(2, 4)}]
)
def test_positional_and_keyword_inputs(example):
    one = report(nn.Bilinear(3, 4, 5), example, **QUICK)
    assert one.macs == 60
    assert one.latency_batch_64 is not None


def test_a_wrong_input_is_refused_with_its_shape():
    with pytest.raises(
        ValueError, match=r"does not take example_input, tensor\(4, 9\): RuntimeError.*Give what you would"
    ):
        report(nn.Linear(2, 2), torch.ones(4, 9))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "resnet"}, TypeError, "got a str"),
        ({"baseline": {}}, TypeError, "baseline is a Report.*is a dict"),
        ({"threads": 0}, ValueError, "threads is above 0, but is 0"),
        ({"runs": 0}, ValueError, "latency=False"),
        ({"batch_dim": -1}, ValueError, "batch_dim counts from 0, but is -1"),
        ({"history": {"bits": [(1, math.nan)]}}, ValueError, "'bits' holds"),
        ({"model": nn.LazyLinear(2)}, ValueError, "lazy"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments, error, message):
    with pytest.raises(error, match=message):
        report(**({"model": nn.Linear(2, 2)} | arguments))


def test_tied_weights_count_once_and_buffers_count_in_bytes():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm, self.head = nn.Embedding(10, 4), nn.BatchNorm1d(4), nn.Linear(4, 10)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.norm(self.embedding(x)))

    one = report(Tied(), torch.tensor([1, 2]), latency=False)
    by_name = {layer.name: layer for layer in one.layers}
    assert {name: layer.parameters for name, layer in by_name.items()} == {"embedding": 40, "norm": 8, "head": 10}
    assert by_name["norm"].size_bytes > 4 * (8 + 8) + 8  # weight and bias, mean and variance; the count of batches
    assert by_name["head"].size_bytes < 100
    assert by_name["head"].macs == 40
    assert by_name["head"].shape == (10, 4)
    assert one.notes == ()


def test_a_parametrized_layer_is_one_row_with_a_note():
    one = report(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))), torch.ones(1, 4), latency=False)
    (layer,) = one.layers
    assert (layer.name, layer.type, layer.parameters, layer.macs) == ("0", "Linear", 3 + 12 + 3, 12)
    assert "computed from other parameters" in one.notes[0]


def test_a_layer_that_did_nothing_is_told():
    class Lazybones(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.words = nn.Linear(2, 2), nn.Linear(2, 2), nn.Embedding(3, 2)

        def forward(self, x):
            return self.used(x)

    (note,) = report(Lazybones(), torch.ones(1, 2), latency=False).notes
    assert note.startswith("No MACs were counted for idle: ")


def test_work_outside_any_layer_has_its_row():
    class Attends(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    (layer,) = report(Attends(), torch.ones(2, 3, 5, 4), latency=False).layers
    assert (layer.name, layer.type, layer.macs) == ("", "Attends", 2 * 3 * 5 * 5 * 4)


def test_integers_and_halves_are_measured():
    model = nn.Linear(100, 100, bias=False).to(torch.bfloat16)
    model.register_buffer("codes", torch.arange(200, dtype=torch.uint8))
    one = report(model, torch.ones(1, 100, dtype=torch.bfloat16), **QUICK)
    assert one.macs == 10_000
    assert 40_200 < one.size_bytes < 40_260
    assert 20_200 < one.size_bytes_sparse < 20_260


def test_a_compiled_model_has_the_names_of_the_plain_one():
    plain, compiled = lenet5(), torch.compile(lenet5(), backend="eager")
    assert report(compiled, IMAGES, latency=False).layers == report(plain, IMAGES, latency=False).layers
    assert report(compiled, IMAGES, latency=False).name == "Sequential"


def test_a_model_without_parameters_is_measured():
    one = report(nn.ReLU(), torch.ones(1, 2), **QUICK)
    assert (one.parameters, one.sparsity, one.weight_sparsity, one.macs, one.layers) == (0, 0.0, 0.0, 0, ())


def test_the_model_stays_as_it_was_and_so_does_the_example():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU(inplace=True), nn.Dropout()).train()
    model[0].eval()
    example, random = torch.randn(4, 2), torch.get_rng_state()
    state, seen = {name: value.clone() for name, value in model.state_dict().items()}, example.clone()
    report(model, example, **QUICK)
    assert [module.training for module in model] == [False, True, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(example, seen)
    assert torch.equal(torch.get_rng_state(), random)
    assert model[0].weight.grad is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "holds no report"),
        ("[]", "holds no report"),
        ('{"format": 7}', "'format' is 7, not 1"),
        ('{"format": 1, "name": "x"}', "damaged: KeyError"),
    ],
)
def test_a_file_that_is_no_report_is_refused(text, message, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Report.load(tmp_path / "r.json")


def test_another_file_name_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"'.json' or '.html', but the path is .*report.txt"):
        report(nn.Linear(2, 2)).save(tmp_path / "new" / "report.txt")
    assert not list(tmp_path.iterdir())


def printed(one, width):
    console = Console(file=StringIO(), width=width)
    one.print(console)
    return console.file.getvalue()


def test_the_terminal_shows_before_and_after_in_80_columns(before_and_after):
    text = printed(before_and_after[1], width=80)
    assert "431,080" in text
    assert "71,080" in text
    assert "2,293,000" in text
    assert "test/error" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


def test_a_wide_terminal_shows_types_and_shapes(before_and_after):
    assert "50 x 20 x 5 x 5" in printed(before_and_after[1], width=140)


def test_markup_in_names_is_printed_as_it_is():
    layer = LayerReport("[red]x[/red]", "Linear", (1, 1), 1, 1, 1, 1, 4, 4)
    one = Report("[bold]net", (layer,), 4, 4, metrics={"[a]": 1.0}, notes=("[b] is odd",))
    text = printed(one, width=80)
    assert "[red]x[/red]" in text
    assert "[bold]net" in text
    assert "[a]" in text
    assert "[b] is odd" in text


def test_a_quantized_model_is_counted_with_its_scales_and_zero_points(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    quantized = quantize(model, [torch.rand(16, 64)], progress=False)
    told = report(quantized, torch.rand(2, 64), latency=False, baseline=report(model, latency=False))
    written = export(quantized, tmp_path / "model.safetensors").size_bytes
    assert told.size_bytes_quantized == written + 2 * 5  # two places, each a float32 and a byte
    weights = 64 * 128 + 128 * 10
    assert weights < written < weights + 4 * (128 + 10) * 2 + 1500  # a byte each, float32 scales and biases, the header
    assert told.compression_ratio == told.before.size_bytes / told.size_bytes_quantized
    assert any("138 scales of weights, 2 scales and zero points of activations" in note for note in told.notes)
    assert Report.from_dict(told.to_dict()) == told


def test_short_floating_point_has_no_scales_to_count(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    quantized = quantize(
        model, [torch.rand(16, 64)], weights="fp16", activations="bf16", first="same", last="same", progress=False
    )
    told = report(quantized, torch.rand(2, 64), latency=False)
    assert told.size_bytes_quantized == export(quantized, tmp_path / "model.safetensors").size_bytes
    assert any("0 scales of weights, 0 scales and zero points of activations" in note for note in told.notes)
