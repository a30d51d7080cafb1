"""What weights and activations can be stored as, by hand."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from lightning_compress.quantization.functional.formats import (
    NumberFormat,
    activation_format,
    parse_format,
    read_format,
    weight_format,
)


@pytest.mark.parametrize(
    ("bits", "weights", "activations"),
    [
        (16, (-32767, 32767), (0, 65535)),
        (8, (-127, 127), (0, 255)),
        (7, (-63, 63), (0, 127)),
        (4, (-7, 7), (0, 15)),
        (3, (-3, 3), (0, 7)),
        (2, (-1, 1), (0, 3)),
    ],
)
def test_whole_numbers_of_bits_have_a_grid_around_zero_for_weights_and_from_zero_for_activations(
    bits, weights, activations
):
    assert parse_format(bits) == weight_format(bits) == NumberFormat(str(bits), bits, *weights)
    assert parse_format(bits, "activations") == activation_format(bits) == NumberFormat(str(bits), bits, *activations)
    assert parse_format(bits).kind == "integer"


@pytest.mark.parametrize("bits", range(2, 17))
def test_every_number_of_bits_has_as_many_levels_as_fit_into_it(bits):
    weights, activations = weight_format(bits), activation_format(bits)
    assert activations.quant_max - activations.quant_min + 1 == 2**bits
    assert weights.quant_max - weights.quant_min + 1 == 2**bits - 1
    assert weights.quant_min == -weights.quant_max


@pytest.mark.parametrize("what", ["weights", "activations"])
def test_ternary_and_binary_reach_from_minus_one_to_one(what):
    assert parse_format("ternary", what) == NumberFormat("ternary", 2, -1, 1)
    assert parse_format("binary", what) == NumberFormat("binary", 1, -1, 1)
    assert [parse_format(name, what).kind for name in ("ternary", "binary")] == ["ternary", "binary"]


@pytest.mark.parametrize("what", ["weights", "activations"])
@pytest.mark.parametrize(
    ("name", "bits", "dtype"),
    [
        ("fp16", 16, torch.float16),
        ("bf16", 16, torch.bfloat16),
        ("fp8", 8, torch.float8_e4m3fn),
        ("fp8_e5m2", 8, torch.float8_e5m2),
    ],
)
def test_floating_point_has_a_torch_type_and_no_grid(name, bits, dtype, what):
    assert parse_format(name, what) == NumberFormat(name, bits, 0, 0, dtype)
    assert parse_format(name, what).kind == "float"


def test_none_is_no_format():
    assert parse_format(None) is None
    assert parse_format(None, "activations") is None


@pytest.mark.parametrize("what", ["weights", "activations"])
@pytest.mark.parametrize("bits", [16, 8, 2, "ternary", "binary", "fp16", "fp8_e5m2"])
def test_a_format_is_read_back_from_its_name(bits, what):
    form = parse_format(bits, what)
    assert read_format(form.name, what) == form


def test_a_format_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        parse_format(8).quant_min = -128


@pytest.mark.parametrize("what", ["weights", "activations"])
@pytest.mark.parametrize(
    ("bits", "mend"),
    [
        (1, "Did you mean 'binary'?"),
        (32, "Did you mean None?"),
        (0, "from 2 to 16"),
        (-4, "from 2 to 16"),
        (17, "from 2 to 16"),
        (7.5, "from 2 to 16"),
        (True, "from 2 to 16"),
        (8.0, "Did you mean 8, without"),
        ("8", "Did you mean 8, without"),
        ("int8", "Did you mean 8?"),
        ("uint8", "Did you mean 8?"),
        ("INT4", "Did you mean 4?"),
        ("fp4", "Did you mean 4?"),
        ("float16", "Did you mean 'fp16'?"),
        ("torch.bfloat16", "Did you mean 'bf16'?"),
        (torch.float16, "Did you mean 'fp16'?"),
        ("fp8_e4m3", "Did you mean 'fp8'?"),
        ("float32", "Did you mean None?"),
        ("tenary", "Did you mean 'ternary'?"),
        ("Binary", "Did you mean 'binary'?"),
        ("quaternions", "'ternary', 'binary', 'fp16'"),
        ([8], "from 2 to 16"),
    ],
    ids=repr,
)
def test_what_is_no_format_is_refused_with_its_value_and_the_mend(bits, mend, what):
    with pytest.raises(ValueError, match="is no format") as refusal:
        parse_format(bits, what)
    assert repr(bits) in str(refusal.value)
    assert mend in str(refusal.value)


@pytest.mark.parametrize("bits", ["quaternions", True, 0], ids=repr)
def test_where_nothing_comes_near_nothing_is_guessed(bits):
    with pytest.raises(ValueError) as refusal:
        parse_format(bits)
    assert "Did you mean" not in str(refusal.value)


def test_only_weights_and_activations_have_formats():
    with pytest.raises(ValueError, match="'gradients'"):
        parse_format(8, "gradients")
    with pytest.raises(ValueError, match="Did you mean 'weights'"):
        parse_format(8, "weight")
