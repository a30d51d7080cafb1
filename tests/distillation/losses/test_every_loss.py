"""What holds for every loss, whichever file it is written in."""

import pytest
import torch

from lightning_compress.core.registry import call_with_supported_args, registered, required_args
from lightning_compress.distillation import losses
from lightning_compress.distillation.losses import features, language, learned, logits

LEARNED = registered(learned)
EVERY = {name: loss for module in (logits, language, features, learned) for name, loss in registered(module).items()}
every_loss = pytest.mark.parametrize("name", EVERY)

MAP = (4, 6, 5, 5)
SHAPES = {  # of student and teacher alike; a list for a loss over several layers
    **dict.fromkeys(registered(logits), (4, 6)),
    **dict.fromkeys(registered(language), (4, 3, 6)),
    **dict.fromkeys([*registered(features), *LEARNED], MAP),
    "per_pixel_kl": MAP,
    "fsp": [MAP, (4, 7, 3, 3)],
    "review_kd": [MAP, (4, 7, 3, 3)],
}
ELEMENT_BY_ELEMENT = [*registered(logits), *registered(language), "hint"]
LEAST_IF_EQUAL = [name for name in EVERY if name not in {*LEARNED, "bounded_regression"}]


def drawn(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    if isinstance(shape, list):
        return [torch.randn(one, generator=generator).to(dtype) for one in shape]
    return torch.randn(shape, generator=generator).to(dtype)


def offered(name, dtype=torch.float32):
    shape = SHAPES[name]
    real = name == "bounded_regression"
    return {
        "student": drawn(shape, 0, dtype),
        "teacher": drawn(shape, 1, dtype),
        "temperature": 3.0,
        "target": drawn(shape, 2, dtype) if real else torch.tensor([0, 5, 2, 2]),
        "mask": torch.tensor([[True, True, False]] * 4),
    }


def ready(name):
    """The loss as something to call, made if it is a class."""
    if name not in LEARNED:
        return EVERY[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EVERY[name](SHAPES[name], SHAPES[name])


def call(loss, given):
    return call_with_supported_args(loss.forward if isinstance(loss, torch.nn.Module) else loss, **given)


def tensors(given, *names):
    for name in names:
        yield from given[name] if isinstance(given[name], list) else [given[name]]


def test_there_are_losses_of_every_kind_and_no_name_twice():
    modules = (logits, language, features, learned)
    assert all(registered(module) for module in modules)
    assert sum(len(registered(module)) for module in modules) == len(EVERY)
    assert {member.__name__ for member in EVERY.values()} == set(losses.__all__) - {"OFFERED", "RENAMED"}
    assert {"kl_divergence", "generalised_jsd", "rkd_angle", "projected_hint", "vid", "review_kd", "crd"} <= set(EVERY)


@every_loss
def test_every_loss_asks_only_for_what_is_offered(name):
    asked = required_args(ready(name).forward if name in LEARNED else EVERY[name])
    assert {"student", "teacher"} <= asked <= set(losses.OFFERED)
    if name in LEARNED:
        assert required_args(EVERY[name]) == {"student_shape", "teacher_shape"}


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_loss_is_a_finite_scalar_that_teaches_the_student(name, dtype):
    given = offered(name, dtype)
    for tensor in tensors(given, "student"):
        tensor.requires_grad_()
    loss = call(ready(name), given)
    assert loss.shape == ()
    assert loss.isfinite()
    assert loss.dtype in (torch.float32, torch.float64)
    loss.backward()
    for tensor in tensors(given, "student"):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_loss_of_half_precision_is_that_of_the_same_numbers_in_float32(name, dtype):
    given = offered(name, dtype)
    wide = {
        key: [one.float() for one in value]
        if isinstance(value, list)
        else value.float()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for key, value in given.items()
    }
    assert torch.equal(call(ready(name), given), call(ready(name), wide))


@every_loss
def test_every_loss_is_as_large_for_numbers_that_half_precision_cannot_square(name):
    given = offered(name, torch.float16)
    for tensor in tensors(given, "student", "teacher"):
        tensor.mul_(1000)
    assert call(ready(name), given).isfinite()


@every_loss
def test_every_loss_leaves_its_inputs_and_the_random_stream_as_they_are(name):
    given, before = offered(name), offered(name)
    loss = ready(name)
    state = torch.get_rng_state()
    call(loss, given)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(
        *(tensors(both, "student", "teacher", "target", "mask") for both in (given, before)), strict=True
    ):
        assert torch.equal(one, other)


@every_loss
def test_every_loss_gives_the_same_again_from_the_same_state(name):
    assert torch.equal(*(call(ready(name), offered(name)) for _ in range(2)))


@every_loss
def test_every_loss_refuses_a_teacher_of_another_batch(name):
    given = offered(name)
    loss = ready(name)
    smaller = [one[:3] for one in tensors(given, "teacher")]
    given["teacher"] = smaller if isinstance(given["teacher"], list) else smaller[0]
    with pytest.raises(ValueError, match=r"student has shape \(4, .* teacher (has )?\(3, "):
        call(loss, given)


@pytest.mark.parametrize("name", ELEMENT_BY_ELEMENT)
def test_a_loss_that_compares_element_by_element_refuses_another_shape(name):
    given = offered(name)
    given["teacher"] = given["teacher"][:, :-1]
    with pytest.raises(ValueError, match=r"student has shape \(.*\) and teacher \(.*\)") as refused:
        call(ready(name), given)
    assert str(tuple(given["student"].shape)) in str(refused.value)
    assert str(tuple(given["teacher"].shape)) in str(refused.value)


@pytest.mark.parametrize("name", LEAST_IF_EQUAL)
def test_a_loss_without_parameters_is_zero_if_the_two_agree_and_above_if_not(name):
    given = offered(name, torch.float64)
    assert call(ready(name), given).item() > 1e-4
    given["student"] = given["teacher"]
    for tensor in tensors(given, "student"):
        tensor.requires_grad_()
    loss = call(ready(name), given)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", LEAST_IF_EQUAL)
def test_the_student_stays_where_it_agrees(name):
    given = offered(name, torch.float64)
    student = [one.clone().requires_grad_() for one in tensors(given, "teacher")]
    given["student"] = student if isinstance(given["student"], list) else student[0]
    call(ready(name), given).backward()
    for tensor in student:
        assert tensor.grad.abs().max() < 1e-9


@every_loss
def test_every_loss_is_untouched_by_autocast_or_nearly(name):
    expected = call(ready(name), offered(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = call(ready(name), offered(name))
    tolerance = 0.05 if name in LEARNED else 1e-6  # a map with parameters is computed as the run's other layers are
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance, abs=1e-6)
