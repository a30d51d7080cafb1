"""What a quantizer of activations begins with: the first numbers that tell of a grid."""

import pytest
import torch
from torch import nn

from lightning_compress import QuantizationAwareTraining
from lightning_compress.quantization.describe import describe_activation
from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize, QuantState
from lightning_compress.quantization.functional.formats import parse_format
from lightning_compress.quantization.functional.ranges import RangeEstimator
from lightning_compress.quantization.methods import resolve_method
from lightning_compress.quantization.placement.sites import ActivationSite
from tests.quantization.by_hand import randn
from tests.quantization.watching import noted

SETTINGS = {"lsq": 4, "pact": 4, "moving_average": 8, "min_max": 8, "percentile": 8}


def place(name):
    """A quantizer in the middle of a batch."""
    mode, form = QuantState(), parse_format(SETTINGS[name], "activations")
    mode.fake_quant_enabled = mode.observer_enabled = True
    method = resolve_method({"activations": name}, None, form)
    return ActivationFakeQuantize(method.activations, form, mode, method.range, non_negative=False)


@pytest.mark.parametrize("name", SETTINGS)
def test_zeros_that_come_first_leave_the_beginning_to_what_comes_then(name):
    ours, other, values = place(name), place(name), randn(4, 6)
    assert not ours(torch.zeros(4, 6)).any()
    assert not ours.calibrated
    assert torch.equal(ours(values), other(values))
    assert str(ours.quantizer_state()) == str(other.quantizer_state())
    later = torch.zeros(4, 6)
    assert torch.equal(ours(later), other(later))
    assert str(ours.quantizer_state()) == str(other.quantizer_state())


def test_a_grid_that_needs_to_see_nothing_takes_zeros_from_the_first_on():
    mode, form = QuantState(), parse_format("binary", "activations")
    mode.fake_quant_enabled = mode.observer_enabled = True
    binary = ActivationFakeQuantize(
        resolve_method("bnn", None, form).activations, form, mode, RangeEstimator(), non_negative=False
    )
    assert torch.equal(binary(torch.zeros(2)), torch.ones(2))
    assert binary.invalid_reason() is None


@pytest.mark.parametrize("name", ["min_max", "lsq"])
@pytest.mark.parametrize(("non_negative", "levels"), [(True, {0.0, 1.0, 2.0}), (False, {-1.0, 0.0, 1.0})])
def test_three_levels_of_activations_lie_where_their_numbers_do(name, non_negative, levels):
    mode, form = QuantState(), parse_format("ternary", "activations")
    mode.fake_quant_enabled = mode.observer_enabled = True
    method = resolve_method({"activations": name}, None, form)
    ternary = ActivationFakeQuantize(method.activations, form, mode, method.range, non_negative=non_negative)
    values = torch.linspace(0 if non_negative else -2, 2, 41) ** 3
    on_grid = ternary(values)
    _, scale, _ = ternary.on_grid(values)
    assert set((on_grid / scale).tolist()) == levels


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_but_zeros_is_an_obstacle_in_a_resumed_run_too(name):
    ours, again = place(name), place(name)
    assert ours.invalid_reason() is None  # no batch has come here yet
    ours(torch.zeros(4, 6))
    again.load_quantizer_state(ours.quantizer_state())
    assert ours.invalid_reason() == again.invalid_reason() == "are all zero"
    assert ours.invalid_reason(zeros=False) is None


class OwnRecurrence(nn.Module):
    def __init__(self):
        super().__init__()
        self.given, self.state, self.out = nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, values):
        state = torch.zeros(len(values), 6)
        for part in values.split(2, dim=1):
            state = torch.tanh(self.given(part) + self.state(state))
        return self.out(state)


@pytest.mark.parametrize("method", ["lsq", "moving_average"])
def test_a_recurrence_that_begins_with_zeros_has_a_grid_of_its_own_size(method, pl, make_module, make_trainer, loader):
    quantization = QuantizationAwareTraining(
        begin=2, weights=None, activations=4, first="same", last="same", method=method
    )
    note = noted(pl, quantization, lambda one: one.quantized and {
        name: float(quantizer.on_grid(torch.ones(1)).scale) for name, quantizer in one.quantized.activations.items()
    })  # fmt: skip
    module = make_module(lambda parameters: torch.optim.SGD(parameters, lr=1e-12), net=OwnRecurrence)
    seen = []
    module.net.state.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    make_trainer([quantization, note], max_epochs=1).fit(module, loader)
    second = seen[2 * 4 + 1]  # of the third batch, the first that is quantized
    wanted = 2 * second.abs().mean() / 7**0.5 if method == "lsq" else (second.max() - second.min()) / 15
    # Of moving averages each further call of the batch moves the range a little.
    assert note.by_batch[2]["net.state input 0"] == pytest.approx(float(wanted), rel=0.02)


@pytest.mark.parametrize("non_negative", [True, False])
@pytest.mark.parametrize(
    ("name", "bits"),
    [("min_max", 8), ("lsq", 4), ("lsq", "ternary"), ("pact", 4), ("dorefa", 4), ("dorefa", "ternary"),
     ("dorefa", "binary"), ("wage", 4), ("stochastic", 3), ("bnn", "binary")],
)  # fmt: skip
def test_a_description_has_the_codes_that_values_get(name, bits, non_negative):
    mode, form = QuantState(), parse_format(bits, "activations")
    mode.observer_enabled = True
    method = resolve_method({"activations": name}, None, form)
    quantizer = ActivationFakeQuantize(method.activations, form, mode, method.range, non_negative=non_negative)
    quantizer.observe(torch.linspace(0 if non_negative else -1, 1, 101))
    mode.observer_enabled = False
    spec = describe_activation(quantizer, ActivationSite("layer", "input 0", non_negative), ("layer",))
    values = torch.linspace(0.0 if non_negative else -9.0, 9.0, 20_001)
    codes = (quantizer.on_grid(values).values / spec.scale + spec.zero_point).unique().round().unique().int()
    middle = (codes[1:-1] > spec.quant_min) & (codes[1:-1] < spec.quant_max)
    assert (int(codes[0]), int(codes[-1])) == (spec.zero_point if non_negative else spec.quant_min, spec.quant_max)
    assert middle.all()
    assert spec.two_level == (name == "bnn")
    assert (len(codes) == 2) == (spec.quant_max - spec.quant_min == 1 or spec.two_level)
