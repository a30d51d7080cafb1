"""What holds for every quantizer, found by look-up."""

import pytest
import torch

from lightning_compress.core.registry import call_with_supported_args, registered, required_args
from lightning_compress.quantization.functional import quantizers
from lightning_compress.quantization.functional.formats import parse_format
from lightning_compress.quantization.methods import METHODS, SIDES

# Those whose grid has no zero; there is one grid for all else, but for these.
WITHOUT_ZERO = {"binary_connect", "stochastic_binary", "xnor", "bnn", "xnor_activations"}
WITHOUT_SCALE = {"ttq", "xnor_activations", "floating"}
EXAMPLES = {"integer": 4, "ternary": "ternary", "binary": "binary", "float": "fp8"}
EIGHT_BITS = {"ternary": "ternary", "integer": 8, "binary": "binary", "float": "fp16"}
PLACES = sorted(
    {
        (name, side, kind)
        for name, quantizer in registered(quantizers).items()
        for side in SIDES
        for kind in quantizer.kinds
        if any(quantizer in offer.for_format(side) for offer in METHODS.values())
    }
)
every_quantizer = pytest.mark.parametrize(("name", "side", "kind"), PLACES)
# The grids of these follow the largest values of a row.
FOLLOWING = {"twn", "ttq", "xnor", "xnor_activations"}


def every_quantizer_but(left_out):
    """Those that are not among these, which exist."""
    assert left_out <= {name for name, _, _ in PLACES}
    return pytest.mark.parametrize(("name", "side", "kind"), [place for place in PLACES if place[0] not in left_out])


def every_quantizer_of(names):
    """Those among these."""
    return every_quantizer_but({name for name, _, _ in PLACES} - names)


def drawn(side, dtype=torch.float32):
    shape = (6, 30) if side == "weights" else (4, 5, 3, 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def asked(name, side, form, values):
    """All that this quantizer may ask for."""
    quantizer = registered(quantizers)[name]
    shape = (len(values), 1) if side == "weights" else ()
    zero = torch.zeros(shape, dtype=torch.int32) + (form.quant_min + form.quant_max + 1) // 2
    offered = {"quant_min": form.quant_min, "quant_max": form.quant_max, "dtype": form.dtype, "zero_point": zero}
    offered |= {"scale": torch.full(shape, 2.5 / max(form.quant_max, 1)), "generator": torch.Generator().manual_seed(1)}
    matrix = values.detach().float().reshape(len(values) if side == "weights" else 1, -1)
    for learned, initial in getattr(quantizer, "learned", {}).items():
        offered[learned] = initial(matrix, form.quant_min, form.quant_max).reshape(shape).requires_grad_()
    return offered


def quantized(name, side, kind, values, examples=EXAMPLES):
    form = parse_format(examples[kind], side)
    offered = asked(name, side, form, values)
    found = call_with_supported_args(registered(quantizers)[name], values=values, **offered)
    return found, offered, form


def test_every_quantizer_is_part_of_a_method():
    assert {name for name, _, _ in PLACES} == set(registered(quantizers))


@pytest.mark.parametrize("quantizer", registered(quantizers).values(), ids=registered(quantizers))
def test_every_quantizer_asks_for_values_and_for_what_is_offered_or_learned(quantizer):
    learned = set(getattr(quantizer, "learned", ()))
    assert "values" in required_args(quantizer)
    assert required_args(quantizer) <= {*quantizers.OFFERED, *learned}
    assert learned <= required_args(quantizer)


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_quantizer_keeps_shape_precision_and_its_inputs(name, side, kind, dtype):
    values = drawn(side, dtype)
    form = parse_format(EXAMPLES[kind], side)
    offered = asked(name, side, form, values)
    tensors = {"values": values, **{key: one for key, one in offered.items() if isinstance(one, torch.Tensor)}}
    before = {key: one.detach().clone() for key, one in tensors.items()}
    found = call_with_supported_args(registered(quantizers)[name], values=values, **offered)
    assert found.values.shape == values.shape
    assert found.values.dtype == dtype
    assert found.values.isfinite().all()
    assert found.values.data_ptr() != values.data_ptr()
    for key, one in before.items():
        assert torch.equal(tensors[key], one), key


@every_quantizer
@pytest.mark.parametrize("examples", [EXAMPLES, EIGHT_BITS], ids=["few bits", "8 bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_quantizer_with_a_scale_puts_values_on_its_grid(name, side, kind, examples, dtype):
    found, _, form = quantized(name, side, kind, drawn(side, dtype), examples)
    if name in WITHOUT_SCALE:
        assert found.scale is None
        assert found.zero_point is None
        return
    shape = (6, 1) if side == "weights" else ()
    assert found.scale.shape == found.zero_point.shape == shape
    assert (found.scale.dtype, found.zero_point.dtype) == (torch.float32, torch.int32)
    assert (found.scale > 0).all()
    assert not found.scale.requires_grad
    places = found.values.double() / found.scale + found.zero_point
    # In half of bfloat16's eight digits a place of the grid is only nearly written down.
    tolerance = max(torch.finfo(dtype).eps, 1e-6) * form.quant_max
    assert (places - places.round()).abs().max() <= tolerance
    assert form.quant_min <= places.round().min()
    assert places.round().max() <= form.quant_max
    assert len(places.round().unique()) > 1


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zeros_stay_exact_zeros_on_every_grid_that_has_one(name, side, kind, dtype):
    values = drawn(side, dtype)
    pruned = torch.rand(values.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    found, _, _ = quantized(name, side, kind, values.masked_fill(pruned, 0.0))
    assert found.values[~pruned].count_nonzero() > 0
    if name in WITHOUT_ZERO:
        assert found.values.count_nonzero() == values.numel()
    else:
        assert found.values[pruned].count_nonzero() == 0


@every_quantizer_of(WITHOUT_ZERO - {"stochastic_binary"})
def test_zero_counts_as_positive_where_there_is_no_zero(name, side, kind):
    values = drawn(side)
    values[0, 0] = 0.0
    assert (quantized(name, side, kind, values)[0].values[0, 0] > 0).all()


@every_quantizer
def test_a_row_of_zeros_has_a_scale_and_stays_finite(name, side, kind):
    values = drawn(side)
    values[1] = 0.0
    if side == "activations":
        values.zero_()
    found, _, _ = quantized(name, side, kind, values)
    assert found.values.isfinite().all()
    if found.scale is not None:
        assert (found.scale > 0).all()
    if name not in WITHOUT_ZERO - {"xnor", "xnor_activations"}:
        assert found.values[1].count_nonzero() == 0


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_flows_to_the_values_and_to_all_that_is_learned(name, side, kind, dtype):
    values = drawn(side, dtype).requires_grad_()
    found, offered, _ = quantized(name, side, kind, values)
    found.values.backward(torch.randn(values.shape, generator=torch.Generator().manual_seed(4)).to(dtype))
    assert values.grad.dtype == dtype
    assert values.grad.isfinite().all()
    assert values.grad.count_nonzero() > values.numel() / 4
    for learned in getattr(registered(quantizers)[name], "learned", ()):
        assert offered[learned].grad.shape == offered[learned].shape
        assert (offered[learned].grad.abs() > 0).all()


@every_quantizer_but({"twn", "ttq", "dorefa_weights"})
def test_values_far_outside_get_no_gradient_that_drives_them_on(name, side, kind):
    values = (1e3 * drawn(side)).requires_grad_()
    form = parse_format(EXAMPLES[kind], side)
    offered = asked(name, side, form, values / 1e3)
    call_with_supported_args(registered(quantizers)[name], values=values, **offered).values.sum().backward()
    outside = values.detach().abs() > 500
    assert outside.any()
    # XNOR-Net's mean size, and with it all weights of a row, goes on; that is a share of one by the row's elements.
    largest = 1.0 if name == "xnor" else 0.0
    assert values.grad[outside].abs().max() <= largest


@every_quantizer
def test_what_is_no_number_is_not_hidden(name, side, kind):
    values = drawn(side)
    values[1, 2] = torch.nan
    assert quantized(name, side, kind, values)[0].values[1, 2].isnan().all()


@every_quantizer_but(FOLLOWING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_values_end_where_very_large_ones_do(name, side, kind, dtype):
    values = drawn(side, dtype)
    values[0, 0], values[1, 1] = torch.inf, -torch.inf
    large = values.nan_to_num(posinf=1e30, neginf=-1e30)
    form = parse_format(EXAMPLES[kind], side)
    infinite, finite = (
        call_with_supported_args(
            registered(quantizers)[name], values=one, **asked(name, side, form, drawn(side))
        ).values
        for one in (values, large)
    )
    assert infinite.isfinite().all()
    assert torch.equal(infinite, finite)


@every_quantizer
def test_no_quantizer_touches_the_users_random_stream(name, side, kind):
    before = torch.get_rng_state()
    quantized(name, side, kind, drawn(side))
    assert torch.equal(torch.get_rng_state(), before)


@every_quantizer
def test_the_same_generator_gives_the_same_values(name, side, kind):
    first, second = (quantized(name, side, kind, drawn(side))[0].values for _ in range(2))
    assert torch.equal(first, second)


@every_quantizer
def test_how_values_lie_in_memory_does_not_matter(name, side, kind):
    values = drawn(side)
    strided = values.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    found, expected = (quantized(name, side, kind, one)[0].values for one in (strided, values))
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)  # Sums may be taken in another order.


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, side, kind in PLACES if side == "weights"])
def test_each_row_of_weights_is_quantized_by_itself(name, kind):
    # What is drawn is the same for the first row, however many follow.
    values = drawn("weights") * torch.tensor([[3.0], [10.0], [0.1], [1.0], [0.5], [2.0]])
    rows = slice(0, 1) if "generator" in required_args(registered(quantizers)[name]) else slice(0, 6)
    together = quantized(name, "weights", kind, values)[0].values[rows]
    alone = [quantized(name, "weights", kind, row[None])[0].values for row in values[rows]]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-6, atol=0)
