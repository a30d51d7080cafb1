"""A trained model on grids after a few batches: ranges as others find them, and nothing else changed."""

from collections import UserDict
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import QuantizationAwareTraining
from lightning_compress import quantize as quantize_aloud
from lightning_compress.quantization.lookup import quantized_of
from lightning_compress.quantization.restore import restore_quantization


def quantize(model, loader, **arguments):
    return quantize_aloud(model, loader, **{"progress": False, **arguments})


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def batches(count=3, shape=(16, 4)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def activations(model):
    return quantized_of(model).activations


# Ranges --------------------------------------------------------------------------------------------------------------


def test_min_max_is_what_the_observers_of_torch_find():
    model, given = small(), batches()
    found = quantize(model, given, method="min_max", reduce_range=False)
    observers = {"0 input 0": MinMaxObserver(dtype=torch.quint8), "1 output": MinMaxObserver(dtype=torch.quint8)}
    for batch in given:
        observers["0 input 0"](batch), observers["1 output"](model[:2](batch).detach())
    assert activations(found).keys() == observers.keys()
    for place, observer in observers.items():
        scale, zero_point = observer.calculate_qparams()
        assert activations(found)[place].scale == pytest.approx(float(scale), rel=1e-6)
        assert int(activations(found)[place].zero_point) == int(zero_point)
    observer = PerChannelMinMaxObserver(0, torch.qint8, torch.per_channel_symmetric, quant_min=-127, quant_max=127)
    observer(model[0].weight.detach())
    scale = quantized_of(found).weights["0.weight"].scale.flatten()
    assert torch.allclose(scale, observer.calculate_qparams()[0])


def test_the_output_is_that_of_a_network_quantized_by_hand():
    model, given = small(), batches()
    found = quantize(model, given, method="min_max", granularity="tensor", reduce_range=False)
    seen = torch.cat(given)
    quant_min, quant_max = min(float(seen.min()), 0.0), float(seen.max())
    step = torch.tensor((quant_max - quant_min) / 255)
    inputs = torch.fake_quantize_per_tensor_affine(given[0], float(step), round(-quant_min / float(step)), 0, 255)
    # Biases are whole numbers of steps too.
    biases = [layer.bias.detach().double() for layer in (model[0], model[2])]
    steps = [float(one.weight.detach().abs().max()) / 127 for one in (model[0], model[2])]
    bias = (biases[0] / (step * steps[0])).round() * (step * steps[0])
    hidden = nn.functional.linear(inputs, on_grid(model[0].weight), bias.float()).relu()
    highest = float(model[0](seen).relu().max())
    hidden = torch.fake_quantize_per_tensor_affine(hidden, highest / 255, 0, 0, 255)
    bias = (biases[1] / (highest / 255 * steps[1])).round() * (highest / 255 * steps[1])
    expected = nn.functional.linear(hidden, on_grid(model[2].weight), bias.float())
    assert torch.allclose(found(given[0]), expected, atol=1e-6)
    assert not torch.allclose(found(given[0]), model(given[0]), atol=1e-4)


def on_grid(weight):
    step = float(weight.detach().abs().max()) / 127
    return (weight.detach() / step).round().clamp(-127, 127) * step


def test_moving_average_is_the_mean_over_batches_however_few():
    given = [torch.tensor([[-1.0, 2.0]]), torch.tensor([[-3.0, 6.0]]), torch.tensor([[-2.0, 1.0]])]
    found = quantize(nn.Sequential(nn.Linear(2, 2)), given, method="moving_average")
    (only,) = activations(found).values()
    assert (only.minimum.item(), only.maximum.item()) == (pytest.approx(-2.0), pytest.approx(3.0))


def test_the_calls_of_a_layer_in_one_batch_count_once_in_the_mean():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, values):
            return self.layer(values) + self.layer(2 * values)

    found = quantize(Twice(), [torch.tensor([[2.0]]), torch.tensor([[6.0]])], method="moving_average")
    assert activations(found)["layer input 0"].maximum.item() == pytest.approx((4 + 12) / 2)


def test_what_is_not_trained_gets_no_learned_step():
    found = quantize(small(), batches(), weights=4, activations=4, first="same", last="same")
    used = {one.function.__name__ for one in quantized_of(found).quantizers()}
    assert used == {"uniform"}
    assert quantized_of(found).learned() == {}
    asked = quantize(small(), batches(), weights=4, method={"weights": "lsq"}, first="same", last="same")
    assert "step" in dict(quantized_of(asked).weights["0.weight"].named_parameters())


# What stays ----------------------------------------------------------------------------------------------------------


def test_the_state_dict_has_the_keys_of_the_original_and_weights_on_grids():
    model = small().train()
    found = quantize(model, batches())
    assert list(found.state_dict()) == list(model.state_dict())
    on_grid = quantized_of(found).describe().values()
    for name, value in found.state_dict().items():
        assert torch.equal(value, on_grid.get(name, model.state_dict()[name]))
        assert name not in on_grid or not torch.equal(value, model.state_dict()[name])
    assert type(found) is type(model)
    assert not any(module.training for module in found.modules())


@pytest.mark.parametrize(
    "extras", [{}, {"adaround": 3, "bias_correction": True, "equalize": True}], ids=["plain", "all"]
)
def test_the_original_is_untouched(extras):
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Flatten()
    )
    model.train()[1].eval()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    before, modes = deepcopy(model.state_dict()), [module.training for module in model.modules()]
    quantize(model, batches(2, (4, 1, 4, 4)), **extras)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == [
        0,
        1,
        0,
        0,
        0,
        0,
    ]
    assert quantized_of(model) is None


def test_the_random_stream_is_untouched_although_the_loader_shuffles():
    loader = DataLoader(TensorDataset(torch.cat(batches())), batch_size=16, shuffle=True)
    model = small()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quantize(model, loader, adaround=2, weights=4, bias_correction=True)
    assert torch.equal(torch.rand(3), expected)


def test_a_batch_that_the_model_writes_into_stays():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, values):
            return self.layer(values.mul_(2))

    given = batches(1)
    before = given[0].clone()
    found = quantize(Writing(), given, method="min_max")
    assert torch.equal(given[0], before)
    assert activations(found)["layer input 0"].maximum == 2 * before.max()


def test_a_copy_of_the_result_computes_on_the_same_grids_with_its_own_weights():
    model, inputs = small(), batches()[0]
    found = quantize(model, batches())
    copy = deepcopy(found)
    assert torch.equal(copy(inputs), found(inputs))
    assert not torch.equal(copy(inputs), model(inputs))
    before = found(inputs)
    with torch.no_grad():
        copy[2].weight.zero_(), copy[2].bias.zero_()
    assert not copy(inputs).any()
    assert torch.equal(found(inputs), before)


def test_its_state_makes_another_module_compute_the_same():
    model, inputs = small(), batches()[0]
    found = quantize(model, batches(), weights=4)
    other = small()
    restore_quantization(other, quantized_of(found).state_dict())
    assert torch.equal(other(inputs), found(inputs))


def test_its_weights_can_be_loaded_into_the_plain_model():
    found = quantize(small(), batches(), weights=3, adaround=5)
    small().load_state_dict(found.state_dict())


# How the model is called ----------------------------------------------------------------------------------------------


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Words(nn.Module):
    """Called as models of Hugging Face are: keywords in, an object out."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.embedding(input_ids).mean(1))
        return Output(logits, None if labels is None else nn.functional.cross_entropy(logits, labels))


class Encoding(UserDict):
    """What a tokenizer gives."""

    def to(self, device):
        return Encoding({name: value.to(device) for name, value in self.items()})


def test_keywords_as_hugging_face_has_them():
    ids, labels = torch.randint(0, 10, (6, 5)), torch.randint(0, 3, (6,))
    model = Words()
    plain = quantize(model, [{"input_ids": ids, "labels": labels}])
    other = quantize(model, [Encoding(input_ids=ids, attention_mask=torch.ones(6, 5))])
    assert torch.equal(plain(ids).logits, other(ids).logits)
    assert not torch.equal(plain(ids).logits, model(ids).logits)


KINDS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, torch.zeros(16)),
    "list": lambda x: [x],
    "dict": lambda x: {"input": x},
    "dict and labels": lambda x: ({"input": x}, torch.zeros(16)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_many_kinds(kind):
    found = quantize(small(), [KINDS[kind](batch) for batch in batches()])
    assert torch.equal(found(batches()[0]), quantize(small(), batches())(batches()[0]))


def test_a_function_says_how_the_model_is_called():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = small()

    found = quantize(Net(), [{"a": x} for x in batches()], forward=lambda model, batch: model.encoder(batch["a"]))
    assert torch.equal(found.encoder(batches()[0]), quantize(small(), batches())(batches()[0]))


def test_no_more_batches_are_taken_than_asked_for():
    taken = []
    given = (taken.append(1) or batch for batch in batches(5))
    found = quantize(small(), given, batches=2, method="min_max")
    assert len(taken) == 2
    assert activations(found)["0 input 0"].maximum == torch.cat(batches(2)).max()


def test_an_iterator_that_gives_its_batches_once_is_enough_for_all_that_needs_them_often():
    arguments = {"weights": 3, "adaround": 5, "bias_correction": True, "equalize": True}
    found, other = (quantize(small(), given, **arguments) for given in (iter(batches()), batches()))
    assert torch.equal(found(batches()[0]), other(batches()[0]))


def test_a_lightning_module_after_its_training(make_module, make_trainer, loader):
    module, trainer = make_module(), make_trainer(max_epochs=1)
    trainer.fit(module, loader)
    found = quantize(module, loader)
    assert module.trainer is trainer
    assert type(found) is type(module)
    inputs = next(iter(loader))[0]
    assert 0 < (found(inputs) - module.eval()(inputs)).abs().max() < 0.1


def test_a_model_that_was_trained_with_quantizers_is_quantized_anew(make_module, make_trainer, loader):
    module = make_module()
    make_trainer([QuantizationAwareTraining(begin=0)], max_epochs=1).fit(module, loader)
    plain = make_module()
    plain.load_state_dict(module.state_dict())
    inputs = next(iter(loader))[0]
    assert torch.equal(quantize(module, loader)(inputs), quantize(plain, loader)(inputs))


class Around(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, values):
        return self.net(values)


@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_a_compiled_model_is_quantized_too_though_it_was_called_before(part):
    model, inputs = small(), batches()[0]
    compiled = torch.compile(model, backend="eager")
    compiled = Around(compiled) if part else compiled
    compiled(inputs)
    found = quantize(compiled, batches())
    expected = quantize(model, batches())(inputs)
    assert list(found.state_dict()) == list(compiled.state_dict())
    assert torch.equal(found(inputs), expected)
    assert torch.equal(deepcopy(found)(inputs), expected)
    assert torch.equal(compiled(inputs), model(inputs))


def test_a_model_that_was_compiled_in_place_is_quantized_too():
    model, inputs = small(), batches()[0]
    model.compile(backend="eager")
    model(inputs)
    assert torch.equal(quantize(model, batches())(inputs), quantize(small(), batches())(inputs))


def test_frozen_weights_are_quantized_and_stay_frozen():
    model, inputs = small().requires_grad_(False), batches()[0]
    model[2].bias.requires_grad_(True)
    found = quantize(model, batches())
    assert torch.equal(found(inputs), quantize(small(), batches())(inputs))
    assert [one.requires_grad for one in found.parameters()] == [False, False, False, True]


# Weights alone --------------------------------------------------------------------------------------------------------


def test_weights_alone_need_no_data():
    arguments = {"weights": 4, "activations": None}
    found, model, inputs = quantize(small(), None, **arguments), small(), batches()[0]
    assert torch.equal(found(inputs), quantize(small(), batches(), **arguments)(inputs))
    assert not torch.equal(found(inputs), model(inputs))
    # The first and the last layer have 8 bits here too.
    assert [one.fmt.bits for one in quantized_of(found).weights.values()] == [8, 8]
    copy = deepcopy(found)
    assert torch.equal(copy(inputs), found(inputs))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "activations, which are quantized at 0, 2"),
        ({"activations": None, "overrides": {"2": {"activations": 8}}}, "activations, which are quantized at 2"),
        ({"activations": None, "equalize": True}, "equalize"),
        ({"activations": None, "adaround": 10}, "adaround"),
        ({"activations": None, "bias_correction": True}, "bias_correction"),
    ],
)
def test_what_needs_data_is_refused_without(arguments, reason):
    with pytest.raises(ValueError, match=f"loader=None, but {reason}.* cannot do without calibration data"):
        quantize(small(), None, **arguments)


# Refusals -------------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, values):
        return self.left(values) if values[0, 0] > 0 else self.right(values)


def test_a_layer_that_one_branch_alone_meets_is_refused_by_name():
    with pytest.raises(ValueError, match=r"did not call 'right'.*ignore=\['right'\]"):
        quantize(Branches(), [torch.ones(2, 4), -torch.ones(2, 4)])


def test_a_layer_that_no_batch_meets_again_is_refused_by_name():
    class Forgetful(Branches):
        calls = 0

        def forward(self, values):
            Forgetful.calls += 1
            return self.left(values) + (self.right(values.square()) if Forgetful.calls == 1 else 0)

    with pytest.raises(ValueError, match="No number has come to right input 0"):
        quantize(Forgetful(), [torch.ones(2, 4)])


@pytest.mark.parametrize("method", [None, "mse", "percentile", "lsq"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_with_the_name_of_the_layer(bad, method):
    model = small()
    with torch.no_grad():
        model[0].bias[1] = bad
    with pytest.raises(ValueError, match=r"'1 output' \(input of 2\)"):
        quantize(model, batches(), method=method)


def test_what_turns_bad_in_a_later_batch_is_refused_too():
    given = batches()
    given[2][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'0 input 0' \(input of 0\)"):
        quantize(small(), given)


def test_activations_that_are_all_zero_are_refused_with_the_name_of_the_layer():
    model = small()
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.fill_(-1)
    with pytest.raises(ValueError, match=r"'1 output' \(input of 2\) are all zero.*ignore=\['2'\]"):
        quantize(model, batches())


def test_a_weight_that_is_no_number_is_refused():
    model = small()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        quantize(model, None, activations=None)


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        ([], "There is no calibration data"),
        (iter(()), "There is no calibration data"),
        (torch.randn(8, 4), r"is a Tensor. For one batch write \[batch\]"),
        ({"input": torch.randn(8, 4)}, "is a dict. For one batch"),
        (3, "is a int. For one batch"),
        (
            [{"pixels": torch.randn(8, 4)}],
            "The keys of the batch, pixels, are not what the forward of Sequential takes",
        ),
    ],
)
def test_data_that_is_none_is_refused(loader, said):
    with pytest.raises(ValueError, match=said):
        quantize(small(), loader)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batches": 0}, "at least 1, or None for all, but is 0"),
        ({"batches": 2.5}, "but is 2.5"),
        ({"adaround": -1}, "adaround is a number of steps"),
        ({"adaround": True}, "adaround is a number of steps"),
        ({"weights": "int8"}, "Did you mean 8"),
        ({"weights": None, "activations": None}, "leave nothing to quantize"),
        ({"targets": "missing"}, "matches no"),
        ({"overrides": {"missing": 4}}, "matches no quantized layer"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        quantize(small(), batches(), **arguments)


def test_a_module_without_forward_is_refused_with_the_way_to_say_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

    with pytest.raises(ValueError, match=r"Net has no forward.*forward=lambda model, batch"):
        quantize(Net(), batches())
