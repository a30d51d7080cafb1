"""Grids lie where integer kernels look for them: by hand, for the ways in which people write networks."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_compress.nn.dataflow import trace_dataflow
from lightning_compress.quantization.placement.sites import ActivationPlacement, place_fake_quantizers


def layout(model, *inputs, computing=None, joins=True, outputs=False):
    layers = [
        name for name, one in model.named_modules() if isinstance(one, nn.Conv2d | nn.Linear | nn.MultiheadAttention)
    ]
    layers = [name for name in layers if not name.endswith("out_proj")]
    with trace_dataflow(model) as flow:
        output = model(*inputs)
        (output[0] if isinstance(output, tuple) else output).square().mean()
    return place_fake_quantizers(
        flow, layers, layers if computing is None else computing, dict(model.named_modules()), joins, outputs
    )


def places(found):
    return {site.name: site.non_negative for site in found.sites}


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, images):
        images = functional.max_pool2d(functional.relu(self.conv1(images)), 2)
        images = functional.relu(self.conv2(images))
        return self.head(functional.dropout(images.flatten(1), 0.5, self.training))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.block, self.head = Block(), nn.Linear(4, 2)

    def forward(self, images):
        images = functional.relu(self.norm0(self.stem(images)))
        return self.head(self.block(images).mean((2, 3)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, images):
        inner = functional.relu(self.norm1(self.conv1(images)))
        return functional.relu(self.norm2(self.conv2(inner)) + images)


class Attention(nn.Module):
    """Pre-norm: the way around is not normalized, so it must not lie on the projections' grid."""

    def __init__(self):
        super().__init__()
        self.norm, self.query, self.key, self.value = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.out, self.up, self.act, self.down = nn.Linear(4, 4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

    def forward(self, tokens):
        normed = self.norm(tokens)
        scores = (self.query(normed) @ self.key(normed).transpose(1, 2)).softmax(-1)
        tokens = tokens + self.out(scores @ self.value(normed))
        return tokens + self.down(self.act(self.up(tokens)))


def test_a_sequence_has_its_grids_behind_the_activation_functions():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 2)
    )
    found = layout(model, torch.randn(2, 1, 6, 6))
    assert places(found) == {"0 input 0": False, "2 output": True, "4 output": False}
    assert found.inputs == {"0": "0 input 0", "3": "2 output", "5": "4 output"}
    assert found.norms == {"0": "1"}
    assert found.order == ("0", "3", "5")


def test_functions_have_their_grids_at_the_door_of_the_next_layer():
    found = layout(Functional().eval(), torch.randn(2, 1, 8, 8))
    assert places(found) == {"conv1 input 0": False, "conv2 input 0": True, "head input 0": True}


def test_a_residual_sum_has_both_parts_on_grids_and_what_comes_out_too():
    found = layout(Residual(), torch.randn(2, 1, 4, 4))
    assert places(found) == {
        "stem input 0": False,
        "block input 0": True,  # for the first convolution and the way around it
        "block.conv2 input 0": True,
        "block.norm2 output": False,  # what is added
        "block output": True,  # the sum, of which the mean is taken
        "head input 0": True,
    }
    assert found.floating == {}
    assert found.norms == {"stem": "norm0", "block.conv1": "block.norm1", "block.conv2": "block.norm2"}


class Gated(nn.Module):
    """Squeeze-and-excitation behind a SiLU."""

    def __init__(self):
        super().__init__()
        self.stem, self.act, self.gate = nn.Conv2d(1, 4, 3), nn.SiLU(), Gate()
        self.last, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, images):
        return self.head(self.last(self.gate(self.act(self.stem(images)))).mean((2, 3)))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up, self.sigmoid = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1), nn.Sigmoid()

    def forward(self, images):
        return images * self.sigmoid(self.up(self.down(images.mean((2, 3), keepdim=True)).relu()))


def test_a_gate_and_what_it_is_multiplied_with_lie_on_grids():
    assert places(layout(Gated(), torch.randn(2, 1, 6, 6))) == {
        "stem input 0": False,
        "stem output": False,
        "act gate": True,  # sigmoid of what comes
        "act output": False,  # of which the mean is taken, and which is multiplied
        "gate.down input 0": False,
        "gate.up input 0": True,
        "gate.up output": False,
        "gate.sigmoid output": True,
        "gate output": False,  # the product
        "last output": False,
        "head input 0": False,
    }


def test_sums_before_a_layer_norm_and_products_with_a_parameter_stay_in_floating_point():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.inner = nn.Conv2d(1, 4, 1), nn.LayerNorm(6), nn.Conv2d(4, 4, 1)
            self.scale, self.head = nn.Parameter(torch.ones(4, 1, 1)), nn.Linear(6, 2)

        def forward(self, images):
            images = self.stem(images)
            return self.head(self.norm(images + self.scale * self.inner(images)))

    assert places(layout(Scaled(), torch.randn(2, 1, 6, 6))).keys() == {
        "stem input 0",
        "stem output",  # for the next convolution and the sum
        "inner output",  # which kernels of convolutions want
        "norm output",
    }


def test_below_8_bits_the_sum_does_not_share_the_grid_of_the_layer():
    found = layout(Residual(), torch.randn(2, 1, 4, 4), joins=False)
    assert found.inputs["block.conv1"] == "block.conv1 input 0"


def test_projections_of_one_value_share_a_grid_and_the_way_around_the_norm_has_none():
    found = layout(Attention(), torch.randn(2, 3, 4))
    assert places(found) == {"norm output": False, "out input 0": False, "up input 0": False, "act output": False}
    assert {found.inputs[name] for name in ("query", "key", "value")} == {"norm output"}


def test_attention_that_is_given_one_tensor_three_times_has_one_grid():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

        def forward(self, tokens, others):
            return self.head(self.attention(tokens, tokens, tokens)[0] + self.attention_to(others, tokens))

        def attention_to(self, others, tokens):
            return others * 1

    found = layout(Model(), torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    assert places(found) == {"attention input 0": False, "head input 0": False}


def test_the_grid_lies_before_a_dropout_that_scales():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2))
    assert layout(model, torch.randn(2, 4)).inputs["3"] == "1 output"


def test_a_last_convolution_stays_in_floating_point_and_says_why():
    found = layout(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)), torch.randn(1, 1, 6, 6))
    assert found.floating == {"2": "its output leaves the network"}


def test_a_last_convolution_has_a_grid_at_its_end_if_that_is_asked_for():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    found = layout(model, torch.randn(1, 1, 6, 6), outputs=True)
    assert places(found) == {"0 input 0": False, "1 output": True, "2 output": False}
    assert not found.floating


def test_a_convolution_before_a_function_that_no_kernel_takes_along_has_a_grid_at_its_own_end():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    assert places(layout(model, torch.randn(1, 1, 6, 6))) == {
        "0 output": False, "0 input 0": False, "1 gate": True, "1 output": False, "4 output": True,
    }  # fmt: skip


def test_a_norm_that_others_bypass_is_not_folded():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, images):
            images = self.conv(images)
            return self.norm(images) + images

    assert layout(Model(), torch.randn(2, 1, 6, 6)).norms == {}


def test_a_layer_that_is_called_twice_has_a_grid_of_its_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, values):
            return self.head(self.layer(self.layer(values).relu()).relu())

    assert layout(Model(), torch.randn(2, 4)).inputs == {"layer": "layer input 0", "head": "head input 0"}


class Perceptron(nn.Module):
    """Two layers, with what `between` does between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second, self.between = nn.Linear(4, 4), nn.Linear(4, 2), between

    def forward(self, values):
        return self.second(self.between(self.first(values)))


def written(values):
    values = values.relu()
    values[:, 0] = -2.0
    return values


@pytest.mark.parametrize(
    ("between", "non_negative"),
    [
        (lambda values: values.relu(), True),
        (nn.ReLU6(), True),
        (nn.Hardtanh(), False),
        (lambda values: values.clamp(0, 6), True),
        (lambda values: values.clamp(min=0.0), True),
        (lambda values: values.clamp(-1, 1), False),
        (lambda values: values.clamp(max=1), False),
        (lambda values: values.relu() + 0.5, True),
        (lambda values: values.relu() + (-0.5), False),
        (lambda values: torch.add(values.relu(), values.sigmoid()), True),
        (lambda values: torch.add(values.relu(), values.sigmoid(), alpha=-1), False),
        (lambda values: functional.pad(values.relu(), (0, 0, 0, 1)), True),
        (lambda values: functional.pad(values.relu(), (0, 0, 0, 1), value=-2.0), False),
        (lambda values: torch.cat([values.relu(), values.sigmoid()], dim=-2), True),
        (written, False),
    ],
)
def test_no_number_is_taken_for_non_negative_that_is_not(between, non_negative):
    model = Perceptron(between)
    assert list(places(layout(model, torch.randn(2, 4))).values()) == [False, non_negative]


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_negative_in_one_call_of_a_layer_is_not_non_negative(turned):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, values):
            values = self.layer(values)
            both = [values, values.relu()]
            return sum(self.head(one) for one in (reversed(both) if turned else both))

    assert places(layout(Model(), torch.randn(2, 4))) == {"layer input 0": False, "head input 0": False}


@pytest.mark.parametrize("clip", [nn.ReLU6(), nn.Hardtanh(), nn.ReLU6(inplace=True)], ids=str)
def test_a_clip_goes_along_with_the_convolution(clip):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), clip, nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 2)
    )
    assert list(places(layout(model, torch.randn(2, 1, 6, 6)))) == ["0 input 0", "2 output", "4 output"]


class Siamese(nn.Module):
    """One network for two views."""

    def __init__(self):
        super().__init__()
        self.net = Residual()

    def forward(self, first, second):
        return torch.cat([self.net(first), self.net(second)])


def test_a_network_that_is_called_twice_has_its_grids_where_one_call_has_them():
    once = layout(Residual(), torch.randn(2, 1, 4, 4))
    twice = layout(Siamese(), torch.randn(2, 1, 4, 4), torch.randn(3, 1, 4, 4))
    assert places(twice) == {f"net.{name}": sign for name, sign in places(once).items()}
    assert twice.norms == {f"net.{layer}": f"net.{norm}" for layer, norm in once.norms.items()}
    assert twice.inputs == {f"net.{layer}": f"net.{name}" for layer, name in once.inputs.items()}
    assert twice.floating == {}


@pytest.mark.parametrize("criterion", [nn.MSELoss(), lambda found, wanted: (found - wanted).square().mean()])
def test_what_only_a_loss_takes_leaves_the_network_though_the_loss_is_a_module(criterion):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.criterion = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3)), criterion

        def forward(self, images):
            return self.criterion(self.net(images), torch.zeros(2, 1, 2, 2))

    found = layout(Model(), torch.randn(2, 1, 6, 6))
    assert found.floating == {"net.2": "its output leaves the network"}
    assert list(places(found)) == ["net.0 input 0", "net.1 output"]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_a_norm_over_several_processes_is_folded_too(norm):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), norm(2), nn.ReLU(), nn.Conv2d(2, 1, 3))
    assert layout(model, torch.randn(2, 1, 6, 6)).norms == {"0": "1"}


def test_a_norm_that_does_more_behind_it_is_folded_and_one_that_does_other_things_is_not():
    class NormAndReLU(nn.BatchNorm2d):
        def forward(self, images):
            return super().forward(images).relu()

    class Doubled(nn.BatchNorm2d):
        def forward(self, images):
            return super().forward(2 * images)

    class OtherWeight(nn.BatchNorm2d):
        def forward(self, images):
            return functional.batch_norm(images, self.running_mean, self.running_var, self.weight + 1, self.bias)

    for norm, expected in ((NormAndReLU, {"0": "1"}), (Doubled, {}), (OtherWeight, {})):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), norm(2), nn.Conv2d(2, 1, 3))
        assert layout(model, torch.randn(2, 1, 6, 6)).norms == expected


@pytest.mark.parametrize(("shape", "norms"), [((5, 4), {"0": "1"}), ((5, 3, 4), {}), ((5, 4, 4), {})])
def test_a_norm_along_another_axis_than_the_channels_is_not_folded(shape, norms):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(shape[1]), nn.ReLU(), nn.Linear(4, 2))
    assert layout(model, torch.randn(shape)).norms == norms


def test_query_key_and_value_are_found_however_attention_is_called():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, tokens, mask):
            return self.attention(query=tokens, attn_mask=mask, key=tokens, value=tokens)[0]

    found = layout(Model(), torch.randn(2, 3, 4), torch.zeros(3, 3))
    assert list(places(found)) == ["attention input 0"]


def test_a_layer_that_the_step_passes_by_is_refused_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.auxiliary = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, values):
            return self.used(values)

    with pytest.raises(ValueError, match=r"did not call 'auxiliary'.*ignore=\['auxiliary'\]"):
        layout(Model(), torch.randn(2, 4))


def test_a_layout_comes_back_from_plain_values():
    found = layout(Residual(), torch.randn(2, 1, 4, 4))
    assert ActivationPlacement.from_state_dict(found.state_dict()) == found
