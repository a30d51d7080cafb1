import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from lightning_compress.measure.metrics import CompressionRatio, NonzeroParameters, Sparsity
from lightning_compress.measure.sparse_encoding import encode

METRICS = [Sparsity, NonzeroParameters, CompressionRatio]


@pytest.fixture
def model():
    """12 weights of which 9 are zero, 4 biases of which 1 is zero, 8 of normalisation of which 4 are zero."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0, 1.0, 0]] * 3 + [[-0.0, 0, 0]]))
        model[0].bias.copy_(torch.tensor([0, 1.0, 2.0, float("nan")]))
    return model


def test_sparsity_is_zeros_over_all_parameters_and_no_buffers(model):
    assert Sparsity()(model).item() == pytest.approx((9 + 1 + 4) / (12 + 4 + 8))


def test_sparsity_can_leave_out_biases(model):
    assert Sparsity(min_dimensions=2)(model).item() == 0.75


def test_nonzero_parameters_are_counted(model):
    assert NonzeroParameters()(model).item() == 3 + 3 + 4
    assert NonzeroParameters()(model).dtype == torch.int64


def test_counts_beyond_what_float32_can_hold_are_exact():
    metric = NonzeroParameters()
    metric.update(torch.ones(2**24 + 1, dtype=torch.int8))
    assert metric.compute().item() == 2**24 + 1


def test_the_ratio_is_of_file_lengths():
    weight = torch.zeros(100, 100)
    weight[0] = torch.arange(1.0, 101.0)
    ratio = CompressionRatio()([weight]).item()
    assert ratio == pytest.approx(len(encode({"0": weight}, sparse=False)) / len(encode({"0": weight})))
    assert 40_000 / 600 < ratio < 40_000 / 400  # 100 values of 4 bytes and a little for their places


def test_a_dense_half_precision_model_is_half_of_fp32():
    weight = torch.ones(1000, 100, dtype=torch.bfloat16)
    assert CompressionRatio()([weight]).item() == pytest.approx(2.0, rel=1e-3)


def test_tied_weights_count_once():
    model = nn.ModuleList([nn.Embedding(4, 5), nn.Linear(5, 4, bias=False)])
    model[1].weight = model[0].weight
    assert NonzeroParameters()(model).item() == 20
    assert NonzeroParameters()([model[0].weight, model[1].weight]).item() == 20


@pytest.mark.parametrize("metric", METRICS)
def test_a_module_a_list_and_a_generator_are_taken(metric):
    model = nn.Linear(30, 40, bias=False)
    parameters = [parameter.detach() for parameter in model.parameters()]
    expected = metric()(model).item()
    assert metric()(parameters).item() == pytest.approx(expected, rel=0.01)  # names differ in the file
    assert metric()(model.parameters()).item() == metric()(parameters).item() == metric()(parameters[0]).item()


@pytest.mark.parametrize("metric", METRICS)
def test_the_value_is_of_the_last_update(metric, model):
    meter = metric()
    meter.update(model)
    model[0].weight.data.zero_()
    meter(model)
    assert meter.compute().item() == metric()(model).item()
    meter.reset()
    meter.update(nn.Linear(2, 2))
    assert meter.compute().item() == metric()(nn.Linear(2, 2)).item()


@pytest.mark.parametrize("metric", METRICS)
def test_ranks_with_the_same_model_give_the_value_of_one(metric, model):
    """What torchmetrics does after gathering the states of each rank."""
    meter, ranks = metric(), 3
    meter.update(model)
    expected = meter.compute().item()
    for name, reduce in meter._reductions.items():
        assert getattr(meter, name).dtype == torch.int64
        setattr(meter, name, reduce(torch.stack([getattr(meter, name)] * ranks)))
    meter._computed = None
    assert meter.compute().item() == pytest.approx(expected)


def test_they_work_in_a_collection_and_count_the_same_states_apart(model):
    collection = MetricCollection([metric() for metric in METRICS])
    values = collection(model)
    collection.update(model)
    assert values["Sparsity"].item() == pytest.approx(14 / 24)
    assert {name: value.item() for name, value in collection.compute().items()} == {
        name: value.item() for name, value in values.items()
    }


def test_the_states_are_saved_when_asked(model):
    metric = Sparsity()
    metric.update(model)
    metric.persistent(True)
    other = Sparsity()
    other.load_state_dict(metric.state_dict())
    assert other.zeros.item() == 14


def test_which_way_is_better_is_said():
    assert [metric.higher_is_better for metric in METRICS] == [True, False, True]
    assert not any(metric.is_differentiable for metric in METRICS)


@pytest.mark.parametrize("nothing", [nn.ReLU(), [], iter([])])
def test_nothing_to_count_is_refused(nothing):
    with pytest.raises(ValueError, match="generator can be walked only once"):
        Sparsity()(nothing)


def test_weights_of_no_dimension_are_refused():
    with pytest.raises(ValueError, match="no tensor of 2 or more dimensions"):
        Sparsity(min_dimensions=2)(nn.BatchNorm1d(3))


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_no_tensor_is_refused(metric):
    with pytest.raises(TypeError, match="not a str in a list"):
        metric()(["weight"])


def test_a_lazy_model_is_refused():
    with pytest.raises(ValueError, match="lazy"):
        Sparsity()(nn.LazyLinear(3))


def test_a_run_can_log_them(pl, tmp_path):
    from torch.utils.data import DataLoader

    class Logs(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 2, bias=False)
            self.net.weight.data[0] = 0
            self.metrics = MetricCollection([Sparsity(), CompressionRatio()])

        def training_step(self, batch, batch_idx):
            self.metrics.update(self.net)
            self.log_dict(dict(self.metrics.items()), on_step=False, on_epoch=True)
            return self.net(batch).sum() * 0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(
        max_epochs=2, logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Logs(), DataLoader(torch.ones(4, 4), batch_size=2))
    assert trainer.callback_metrics["Sparsity"] == 0.5
    assert 0.5 < trainer.callback_metrics["CompressionRatio"] < 2
