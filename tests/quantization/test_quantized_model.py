"""A quantized model computes, bit for bit, what one computes in which fake quantization is written by hand."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_compress.nn.forward_capture import tensors_in
from lightning_compress.quantization.layers import quantizable_layers
from lightning_compress.quantization.lookup import quantized_of
from lightning_compress.quantization.quantized_model import QuantizedModel
from tests.quantization.by_hand import (
    Convolutional,
    Perceptron,
    Place,
    Tied,
    Twice,
    on_grid,
    quantized,
    randn,
    request,
    seeded,
    whole,
)

NETWORKS = {
    Perceptron: lambda seed: randn(5, 6, seed=seed),
    Convolutional: lambda seed: randn(5, 2, 9, 9, seed=seed),
    Tied: lambda seed: torch.randint(0, 7, (3, 4), generator=torch.Generator().manual_seed(seed)),
    Twice: lambda seed: randn(5, 6, seed=seed),
}
every_network = pytest.mark.parametrize(
    ("kind", "batch"), NETWORKS.items(), ids=lambda one: getattr(one, "__name__", "")
)


def gradients(model):
    return [None if one.grad is None else one.grad.clone() for one in model.parameters()]


def equal(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


# Values and gradients ---------------------------------------------------------------------------------------------


@every_network
def test_values_and_gradients_are_those_written_by_hand(kind, batch):
    ours, theirs = seeded(kind), seeded(kind)
    quantized(ours, batch(0))
    by_hand = theirs.hands()
    for seed in (0, 1):
        found, wanted = ours(batch(seed)), by_hand(batch(seed))
        assert torch.equal(found, wanted)
        found.square().sum().backward()
        wanted.square().sum().backward()
        assert equal(gradients(ours), gradients(theirs))


@every_network
def test_in_evaluation_ranges_stay_as_they_are(kind, batch):
    ours, theirs = seeded(kind), seeded(kind)
    found = quantized(ours, batch(0))
    by_hand = theirs.hands()
    ours(batch(0)), by_hand(batch(0))
    found.state.observer_enabled = False
    ours.eval(), theirs.eval()
    for place in by_hand.places:
        place.follows = False
    other = batch(1) if kind is Tied else 10 * batch(1)
    with torch.no_grad():
        assert torch.equal(ours(other), by_hand(other))


def with_weights_on_grids(module):
    """A copy whose weights of two and more dimensions are rounded for good."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.ndim > 1 and "bias" not in name:
                parameter.copy_(on_grid(parameter))
    return other


RECURRENT = {
    "lstm": lambda: nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True),
    "gru": lambda: nn.GRU(6, 5, num_layers=2, bidirectional=True),
    "projected": lambda: nn.LSTM(6, 5, proj_size=3),
    "rnn": lambda: nn.RNN(6, 5),
    "lstm cell": lambda: nn.LSTMCell(6, 5),
    "gru cell": lambda: nn.GRUCell(6, 5),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_compute_with_weights_on_grids(kind):
    ours = seeded(RECURRENT[kind])
    theirs = with_weights_on_grids(ours)
    values = randn(4, 6) if "cell" in kind else randn(3, 4, 6)
    found = quantized(ours, values)
    assert len(found.weights) == sum(one.ndim > 1 for one in ours.parameters())
    ones, others = (list(tensors_in(model(values))) for model in (ours, theirs))
    assert equal(ones, others)
    sum(one.square().sum() for one in ones).backward()
    sum(one.square().sum() for one in others).backward()
    assert equal(gradients(ours), gradients(theirs))
    if "cell" not in kind:
        assert all(weight is getattr(ours, name) for weight, name in zip(
            ours._flat_weights, ours._flat_weights_names, strict=True
        ))  # fmt: skip


ATTENTION = {
    "self": {},
    "other widths": {"kdim": 4, "vdim": 6},
    "more keys": {"add_bias_kv": True},
    "without biases": {"bias": False},
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_computes_with_inputs_and_projections_on_grids(kind, training):
    ours = seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True, **ATTENTION[kind]))
    theirs = with_weights_on_grids(ours)
    query = randn(2, 3, 8)
    key, value = (randn(2, 3, 4), randn(2, 3, 6)) if kind == "other widths" else (query, query)
    found = quantized(ours, query, key, value)
    assert "out_proj.weight" in found.weights
    assert not any("bias" in name for name in found.weights)
    ours.train(training), theirs.train(training)
    known = {id(one): Place()(one) for one in (query, key, value)}
    with torch.set_grad_enabled(training):  # without gradients, torch takes a way of its own in evaluation
        result = ours(query, key=key, value=value)[0]
        wanted = theirs(known[id(query)], known[id(key)], known[id(value)])[0]
    assert torch.equal(result, wanted) if training else torch.allclose(result, wanted, atol=1e-6)
    assert isinstance(ours.out_proj.weight, nn.Parameter)


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def encoder_by_hand(layer, places, values):
    """Post-norm, as in the paper; the second way around is what a linear layer is given, and lies on its grid."""
    other, given = with_weights_on_grids(layer), places[0](values)
    values = places[1](layer.norm1(values + other.self_attn(given, given, given, need_weights=False)[0]))
    inner = places[2](functional.linear(values, other.linear1.weight, whole(layer.linear1, places[1])).relu())
    return layer.norm2(values + functional.linear(inner, other.linear2.weight, whole(layer.linear2, places[2])))


def test_no_fast_path_of_an_encoder_goes_around_the_quantizers():
    ours = seeded(encoder)
    found = quantized(ours, randn(2, 3, 8))
    places = [Place() for _ in range(3)]
    assert torch.allclose(ours(randn(2, 3, 8)), encoder_by_hand(ours, places, randn(2, 3, 8)), atol=1e-6)
    found.state.observer_enabled = False
    for place in places:
        place.follows = False
    ours.eval()
    with torch.no_grad():
        result, wanted = ours(randn(2, 3, 8, seed=1)), encoder_by_hand(ours.eval(), places, randn(2, 3, 8, seed=1))
    assert torch.allclose(result, wanted, atol=1e-6)
    assert torch.equal(result, ours(randn(2, 3, 8, seed=1)))  # with gradients there is no fast path


def test_a_padded_batch_that_torch_makes_a_nested_one_is_quantized_too():
    ours = seeded(lambda: nn.TransformerEncoder(encoder(), 2))
    found = quantized(ours, randn(2, 3, 8))
    ours(randn(2, 3, 8))
    found.state.observer_enabled = False
    ours.eval()
    padding = torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        nested = ours(randn(2, 3, 8), src_key_padding_mask=padding)
    plain = ours(randn(2, 3, 8), src_key_padding_mask=padding)
    assert torch.allclose(nested[~padding], plain[~padding], atol=1e-6)
    assert not torch.allclose(nested[~padding], seeded(lambda: nn.TransformerEncoder(encoder(), 2)).eval()(
        randn(2, 3, 8), src_key_padding_mask=padding
    )[~padding], atol=1e-6)  # fmt: skip


def test_an_argument_by_name_is_quantized_like_one_by_place():
    ours = seeded(Perceptron)
    quantized(ours, randn(5, 6))
    layer = ours.net[0]
    wanted = layer(randn(5, 6))
    assert torch.equal(layer(input=randn(5, 6)), wanted)


def test_tensors_within_lists_do_not_shift_the_places_of_others():
    class Listing(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = Block(), nn.Linear(6, 2)

        def forward(self, values):
            return self.head(self.block([values * 2], values + 1))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, others, values):
            return self.first(values) + self.second(others[0])

    ours, values = seeded(Listing), randn(5, 6)
    found = quantized(ours, values)
    result = ours(values)
    block, (first, second, last) = ours.block, [Place() for _ in range(3)]
    inner = functional.linear(first(values + 1), on_grid(block.first.weight), block.first.bias)
    inner = inner + functional.linear(second(values * 2), on_grid(block.second.weight), block.second.bias)
    assert torch.equal(result, functional.linear(last(inner), on_grid(ours.head.weight), ours.head.bias))
    assert len(found.placement.sites) == 3


def test_what_comes_in_groups_of_nothing_is_left_as_it_is():
    ours = seeded(Perceptron)
    found = quantized(ours, randn(5, 6))
    ours(randn(5, 6))
    before = found.state_dict()["activations"]
    assert ours(torch.zeros(0, 6)).shape == (0, 3)
    assert str(found.state_dict()["activations"]) == str(before)


class InPlace(nn.Module):
    """Activations that write over what they are given, and a sum that does too."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU(inplace=True)

    def forward(self, images):
        images = self.act(self.first(images))
        inner = self.norm(self.second(images))
        inner += images
        return self.head(functional.relu(inner, inplace=True).mean((2, 3)))


METHODS = {
    "uniform": {}, "lsq": {"method": "lsq", "weights": 4, "activations": 4},
    "dorefa": {"method": "dorefa", "weight_grad_bits": 6}, "wage": {"method": "wage", "activation_grad_bits": 8},
    "fp8": {"activations": "fp8"}, "pact": {"method": {"activations": "pact"}}, "stochastic": {"method": "stochastic"},
    "binary": {"weights": "binary", "activations": "binary"}, "ternary": {"weights": "ternary", "activations": 4},
    "ttq": {"weights": "ternary", "method": "ttq"},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_networks_that_compute_in_place_train_with_every_method(method):
    ours = seeded(InPlace)
    quantized(ours, randn(5, 2, 4, 4), **METHODS[method])
    ours(randn(5, 2, 4, 4)).square().sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in ours.parameters())


# What it leaves alone -----------------------------------------------------------------------------------------------


@every_network
def test_nothing_of_the_model_is_changed(kind, batch):
    model = seeded(kind)
    parameters = dict(model.named_parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]
    quantized(model, batch(0))
    model(batch(0)).square().sum().backward()
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in parameters)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert type(model) is kind


def test_outside_of_its_phase_it_computes_in_floating_point():
    model = seeded(Perceptron)
    wanted = model(randn(5, 6))
    found = quantized(model, randn(5, 6), active=False)
    assert torch.equal(model(randn(5, 6)), wanted)
    assert len(found.uncalibrated()) == 2


def test_the_hooks_leave_the_model_as_it_was():
    model = seeded(Perceptron)
    wanted = model(randn(5, 6))
    found = QuantizedModel(
        model, quantizable_layers(model)[1], request(activations=None), quantized(model, randn(5, 6)).placement
    )
    for module in model.modules():
        module._forward_hooks.clear(), module._forward_pre_hooks.clear()
    found.begin()
    found.state.fake_quant_enabled = True
    found.install()
    assert not torch.equal(model(randn(5, 6)), wanted)
    found.remove()
    assert torch.equal(model(randn(5, 6)), wanted)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Failing(nn.Linear):
    error: type[BaseException] = ValueError

    def forward(self, values):
        if values[0, 0] > 100:
            raise self.error("too large")
        return super().forward(values)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_in_a_forward_the_weights_are_the_users_again(error):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.rnn = Failing(6, 6), nn.GRU(6, 3)

        def forward(self, values):
            return self.rnn(self.layer(values))[0]

    model = seeded(Model)
    model.layer.error = error
    found = quantized(model, randn(5, 6))
    for module in model.modules():
        module._forward_hooks.clear(), module._forward_pre_hooks.clear()
    found.install()
    with pytest.raises(error):
        model(torch.full((5, 6), 1000.0))
    found.remove()
    assert "weight" not in vars(model.layer)
    assert isinstance(model.layer.weight, nn.Parameter)


def test_an_error_within_a_recurrent_layer_leaves_it_whole():
    model = seeded(lambda: nn.LSTM(6, 3))
    quantized(model, randn(5, 6))
    with pytest.raises(RuntimeError):
        model(randn(5, 4))
    assert all(one is getattr(model, name) for one, name in zip(
        model._flat_weights, model._flat_weights_names, strict=True
    ))  # fmt: skip


# Copies -------------------------------------------------------------------------------------------------------------


def test_a_copy_computes_the_same_and_neither_disturbs_the_other():
    model = seeded(Perceptron)
    found = quantized(model, randn(5, 6))
    model(randn(5, 6))
    other = copy.deepcopy(model)
    state = str(found.state_dict())
    found.state.observer_enabled = False
    wanted = model(randn(5, 6, seed=1))
    other(100 * randn(5, 6))
    assert str(found.state_dict()["activations"]) == str({**found.state_dict(), "frozen": False}["activations"])
    assert state == str(found.state_dict())
    assert torch.equal(model(randn(5, 6, seed=1)), wanted)
    assert quantized_of(other) is not found
    assert quantized_of(other).state_dict().keys() == found.state_dict().keys()


def test_a_copy_goes_on_with_the_grids_that_it_was_copied_with():
    model = seeded(Perceptron)
    found = quantized(model, randn(5, 6))
    model(randn(5, 6))
    found.state.observer_enabled = False
    wanted = model(randn(5, 6, seed=1))
    other = copy.deepcopy(model)
    found.state.observer_enabled = True
    model(100 * randn(5, 6))
    assert torch.equal(other(randn(5, 6, seed=1)), wanted)


def test_a_quantized_model_can_be_sent_to_another_process():
    model = seeded(Perceptron)
    found = quantized(model, randn(5, 6))
    model(randn(5, 6))
    found.state.observer_enabled = False
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other(randn(5, 6, seed=1)), model(randn(5, 6, seed=1)))


# What is computed twice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "other"])
@pytest.mark.parametrize("method", ["moving_average", "stochastic", "lsq", "pact"])
def test_a_checkpointed_forward_gives_the_same_values_ranges_and_gradients(method, reentrant):
    def run(checkpointed):
        model = seeded(Perceptron)
        named = {"activations": method} if method == "pact" else method
        found = quantized(model, randn(5, 6), method=named, weights=4, activations=4)
        values = randn(5, 6).requires_grad_()
        result = checkpoint(model, values, use_reentrant=reentrant) if checkpointed else model(values)
        result.square().sum().backward()
        learned = [one.grad for one in found.learned().values()]
        return [result, values.grad, *gradients(model), *learned], str(found.state_dict())

    (ones, state), (others, other) = run(checkpointed=True), run(checkpointed=False)
    assert equal(ones, others)
    assert state == other


def test_what_is_drawn_depends_on_the_seed_and_the_number_of_the_batch_alone():
    def drawn(seed, number):
        model = seeded(Perceptron)
        found = quantized(model, randn(5, 6), method="stochastic", weights=4, activations=4)
        for place, one in enumerate(found.quantizers()):
            one.seed = seed + place
        found.set_step(number)
        return model(randn(5, 6))

    state = torch.get_rng_state()
    assert torch.equal(drawn(0, 3), drawn(0, 3))
    assert not torch.equal(drawn(0, 3), drawn(0, 4))
    assert not torch.equal(drawn(0, 3), drawn(1, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_errors_that_flow_back_lie_on_their_grid_and_gradients_of_weights_follow_from_those():
    model = seeded(Perceptron)
    quantized(model, randn(5, 6), method="wage", activation_grad_bits=4, weights=4)
    seen = []
    model.net[1].register_full_backward_hook(lambda _module, given, taken: seen.append((given[0], taken[0])))
    result = model(randn(5, 6))
    result.square().sum().backward()
    # What comes out of the last layer's backward pass comes from an error in multiples of 1/8, within (-1, 1).
    eighths = (model.net[2].bias.grad / (1 / 8)).round()
    assert torch.equal(model.net[2].bias.grad, eighths / 8)
    assert len(seen) == 1


# Refusals -----------------------------------------------------------------------------------------------------------


class Reading(nn.Module):
    """Its head reads the embedding's weight itself."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(7, 6), nn.Linear(6, 6)

    def forward(self, tokens):
        hidden = self.inner(self.embedding(tokens))
        return self.head(hidden)

    def head(self, hidden):
        return hidden @ self.embedding.weight.t()


def test_a_weight_that_is_read_outside_of_its_layer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'embedding.weight' is also used by .*matmul.*ignore=\['embedding.weight'\]"):
        quantized(Reading(), torch.randint(0, 7, (3, 4)))


def test_a_penalty_on_a_weight_is_no_such_use():
    class Penalized(Perceptron):
        def forward(self, values):
            return self.net(values) + self.net[0].weight.abs().sum() + self.net[2].weight.square().mean()

    assert len(quantized(Penalized(), randn(5, 6)).weights) == 2


def test_a_state_of_other_settings_is_refused_by_the_layers_name():
    model = seeded(Perceptron)
    state = quantized(model, randn(5, 6)).state_dict()
    other = quantized(seeded(Perceptron), randn(5, 6), weights=4)
    with pytest.raises(ValueError, match=r"'net.0' was quantized with weights='8', .* but now weights='4'"):
        other.load_state_dict(state)
    third = quantized(seeded(Perceptron), randn(5, 6), symmetric=False)
    with pytest.raises(ValueError, match="symmetric=True when this was saved, but now symmetric=False"):
        third.load_state_dict(state)


@pytest.mark.parametrize("settings", [{}, {"method": "lsq", "weights": 4}, {"symmetric": False}], ids=str)
def test_a_state_brings_back_what_was_learned_and_seen(settings):
    model, other = seeded(Perceptron), seeded(Perceptron)
    found = quantized(model, randn(5, 6), **settings)
    for seed in range(3):
        model(randn(5, 6, seed=seed))
    found.state.observer_enabled = False
    again = quantized(other, randn(5, 6), **settings)
    again.load_state_dict(found.state_dict())
    again.state.observer_enabled = False
    assert torch.equal(other(randn(5, 6, seed=7)), model(randn(5, 6, seed=7)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_refused_with_the_place(bad):
    model = seeded(Perceptron)
    found = quantized(model, randn(5, 6))
    model(torch.full((5, 6), bad))
    with pytest.raises(ValueError, match=r"'net.0 input 0' \(input of net.0\) are not finite.*ignore=\['net.0'\]"):
        found.check_ranges(early=True)


def test_activations_of_zeros_alone_are_refused_unless_it_is_early():
    model = seeded(Perceptron)
    found = quantized(model, randn(5, 6))
    model(torch.zeros(5, 6))
    found.check_ranges(early=True)
    with pytest.raises(ValueError, match="'net.0 input 0' .*are all zero"):
        found.check_ranges()


def test_weights_that_are_not_finite_are_refused_by_name():
    model = seeded(Perceptron)
    found = quantized(model, randn(5, 6))
    with torch.no_grad():
        model.net[2].weight[0, 0] = torch.nan
    model(randn(5, 6))
    with pytest.raises(ValueError, match=r"The numbers of 'net.2.weight' are not all finite"):
        found.check_ranges()


# What it says -------------------------------------------------------------------------------------------------------


def test_it_says_how_many_bits_and_how_far_above_the_error_each_weight_stands():
    model = seeded(Perceptron)
    found = quantized(model, randn(5, 6), overrides={"net.2": {"weights": 4, "method": "min_max"}})
    metrics = found.metrics()
    assert metrics["bits"] == pytest.approx((48 * 8 + 24 * 4) / 72)
    weight = model.net[2].weight.detach()
    error = (on_grid(weight, quant_max=7) - weight).square().sum()
    assert metrics["sqnr_db/net.2.weight"] == pytest.approx(
        10 * float((weight.square().sum() / error).log10()), abs=1e-4
    )


def test_freezing_fits_the_weights_grids_once_more_and_then_no_more():
    model = seeded(Perceptron)
    found = quantized(model, randn(5, 6))
    model(randn(5, 6))
    with torch.no_grad():
        model.net[0].weight.mul_(2)
    found.freeze_observers()
    scale = model.net[0].weight.detach().abs().amax(1, keepdim=True) / 127
    assert torch.equal(found.weights["net.0.weight"].scale, scale)
    before = str(found.state_dict())
    with torch.no_grad():
        model.net[0].weight.mul_(3)
    model(100 * randn(5, 6))
    found.freeze_observers()
    assert str(found.state_dict()) == before
