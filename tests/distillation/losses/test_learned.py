"""Losses with parameters: their formulas by loops, what learns from what, and what they remember."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_compress.distillation.losses import learned


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def made(loss, *arguments, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return loss(*arguments, **options)


def trained(module, student, teacher, steps=60):
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        module(student, teacher).backward()
        optimizer.step()
    return module(student, teacher).item()


def test_projected_hint_maps_channels_at_each_place_and_averages_the_larger_space():
    student, teacher = draw((2, 3, 4, 4), (2, 5, 2, 2))
    loss = made(learned.ProjectedHint, student.shape, teacher.shape)
    weight = loss.project.weight[:, :, 0, 0]
    guess = torch.stack([functional.avg_pool2d((weight @ one.flatten(1)).view(5, 4, 4), 2) for one in student])
    assert loss(student, teacher).item() == pytest.approx(((guess - teacher) ** 2).mean().item(), rel=1e-5)


def test_projected_hint_of_equal_channels_has_nothing_to_learn():
    student, teacher = draw((2, 5), (2, 5))
    loss = learned.ProjectedHint(student.shape, teacher.shape)
    assert not list(loss.parameters())
    assert loss(student, teacher).item() == pytest.approx(((student - teacher) ** 2).mean().item())


def test_vid_is_the_likelihood_of_a_normal_distribution_with_the_variance_of_each_channel():
    student, teacher = draw((4, 3, 2, 2), (4, 5, 2, 2))
    loss = made(learned.Vid, student.shape, teacher.shape, initial_variance=2.0)
    assert loss.variance.tolist() == pytest.approx([2.0] * 5)
    with torch.no_grad():
        loss.scale.copy_(torch.linspace(-1, 3, 5))
    mean = loss.mean(student)
    deviation = (loss.scale.exp().log1p() + 1e-5).sqrt()[:, None, None].expand_as(mean)
    density = torch.distributions.Normal(mean, deviation).log_prob(teacher)
    expected = -density.mean().item() - 0.5 * math.log(2 * math.pi)
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_vid_learns_the_variance_of_what_cannot_be_guessed():
    student, teacher = torch.zeros(400, 3), draw((400, 2))[0] * torch.tensor([0.5, 2.0])
    loss = made(learned.Vid, student.shape, teacher.shape)
    trained(loss, student, teacher, steps=400)
    assert loss.variance.tolist() == pytest.approx(teacher.square().mean(0).tolist(), rel=0.1)


def test_factor_transfer_is_reconstruction_and_the_distance_of_normalised_factors():
    student, teacher = draw((3, 4, 4, 4), (3, 6, 4, 4))
    loss = made(learned.FactorTransfer, student.shape, teacher.shape, rate=0.5)
    factor, translated = loss.paraphrase(teacher), loss.translate(student)
    assert factor.shape == translated.shape == (3, 3, 4, 4)
    rebuilt = ((loss.rebuild(factor) - teacher) ** 2).mean()
    distance = sum(
        (one / one.norm() - other / other.norm()).abs().sum() for one, other in zip(translated, factor, strict=True)
    ) / (3 * 3 * 4 * 4)
    assert loss(student, teacher).item() == pytest.approx((rebuilt + distance).item(), rel=1e-4)


def test_the_paraphraser_learns_nothing_from_the_student():
    one, other, teacher = draw((3, 4, 4, 4), (3, 4, 4, 4), (3, 6, 2, 2))
    loss = made(learned.FactorTransfer, one.shape, teacher.shape)
    gradients = []
    for student in (one, 5 * other + 1):
        loss.zero_grad()
        loss(student, teacher).backward()
        gradients.append([parameter.grad.clone() for parameter in loss.paraphrase.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert any(gradient.any() for gradient in gradients[0])


def test_review_kd_compares_at_falling_sizes_with_half_the_weight_each():
    student, teacher = draw((2, 3, 8, 8), (2, 3, 8, 8))
    loss = made(learned.ReviewKd, [student.shape], [teacher.shape])
    output, _ = loss.fusions[0](student, None, teacher.shape[2:])
    expected = sum(
        weight * functional.mse_loss(functional.avg_pool2d(output, window), functional.avg_pool2d(teacher, window))
        for weight, window in ((1, 1), (1 / 2, 2), (1 / 4, 4), (1 / 8, 8))
    ) / (1 + 1 / 2 + 1 / 4 + 1 / 8)
    assert loss([student], [teacher]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_review_kd_lets_a_stage_of_the_teacher_teach_the_deeper_stages_of_the_student():
    student = [one.requires_grad_() for one in draw((2, 3, 8, 8), (2, 4, 4, 4), (2, 5, 2, 3))]
    teacher = draw((2, 6, 8, 8), (2, 7, 8, 8), (2, 8, 4, 4), seed=1)
    loss = made(learned.ReviewKd, [one.shape for one in student], [one.shape for one in teacher])
    base = torch.autograd.grad(loss(student, teacher), student)
    for changed, reached in enumerate([{0, 1, 2}, {1, 2}, {2}]):
        other = [-2 * one if place == changed else one for place, one in enumerate(teacher)]
        gradients = torch.autograd.grad(loss(student, other), student)
        moved = {place for place in range(3) if not torch.allclose(base[place], gradients[place], atol=1e-6)}
        assert moved == reached


def contrast_by_loops(loss, student, teacher, remembered):
    ours, theirs = loss.embed_student(student.flatten(1)), loss.embed_teacher(teacher.flatten(1))
    ours, theirs = ([row / row.norm() for row in rows] for rows in (ours, theirs))
    total = 0.0
    for sample in range(len(ours)):
        for anchor, candidates in ((ours[sample], [*theirs, *remembered]), (theirs[sample], ours)):
            scores = torch.stack([anchor @ candidate for candidate in candidates]) / loss.contrast
            total -= scores.log_softmax(0)[sample].item()
    return total / len(ours), [row.detach() for row in theirs]


def test_crd_has_to_find_the_same_sample_among_the_batch_and_the_last_embeddings():
    loss = made(learned.Crd, (3, 4, 2, 2), (3, 7), features=6, memory=5, contrast=0.5)
    remembered = []
    for seed in range(4):
        student, teacher = draw((3, 4, 2, 2), (3, 7), seed=seed)
        expected, embeddings = contrast_by_loops(loss, student, teacher, remembered)
        value = loss(student, teacher)
        value.backward()
        assert value.item() == pytest.approx(expected, rel=1e-4)
        remembered = [*embeddings, *remembered][:5]
    assert torch.allclose(loss.queue, torch.stack(remembered))


def test_crd_remembers_only_while_it_trains_and_across_a_checkpoint():
    student, teacher = draw((3, 4), (3, 7))
    loss = made(learned.Crd, student.shape, teacher.shape, features=6, memory=5)
    loss(student, teacher)
    resumed = learned.Crd(student.shape, teacher.shape, features=6, memory=5)
    resumed.load_state_dict(copy.deepcopy(loss.state_dict()))
    before = loss.eval()(student, teacher)
    assert torch.equal(loss(student, teacher), before)
    assert torch.equal(resumed(student, teacher), before)
    assert resumed.filled.item() == 5


def test_crd_without_memory_is_the_choice_among_the_batch():
    student, teacher = draw((3, 4), (3, 7))
    loss = made(learned.Crd, student.shape, teacher.shape, memory=0)
    for _ in range(2):
        expected, _ = contrast_by_loops(loss, student, teacher, [])
        assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-4)


CASES = {
    "projected_hint": (learned.ProjectedHint, (4, 3, 4, 4), (4, 5, 2, 2)),
    "vid": (learned.Vid, (4, 3, 4, 4), (4, 5, 2, 2)),
    "factor_transfer": (learned.FactorTransfer, (4, 3, 4, 4), (4, 5, 2, 2)),
    "review_kd": (learned.ReviewKd, [(4, 3, 4, 4), (4, 4, 2, 2)], [(4, 5, 4, 4), (4, 6, 2, 2)]),
    "crd": (learned.Crd, (4, 3, 4, 4), (4, 5, 2, 2)),
}
every_case = pytest.mark.parametrize(("loss", "student_shape", "teacher_shape"), CASES.values(), ids=CASES)


def drawn_as(shape, seed):
    return draw(*shape, seed=seed) if isinstance(shape, list) else draw(shape, seed=seed)[0]


@every_case
def test_every_learned_loss_can_be_learned(loss, student_shape, teacher_shape):
    module = made(loss, student_shape, teacher_shape)
    student, teacher = drawn_as(student_shape, 0), drawn_as(teacher_shape, 1)
    before = copy.deepcopy(module).eval()(student, teacher).item()
    for name, parameter in module.named_parameters():
        parameter.grad = None
        module(student, teacher).backward()
        assert parameter.grad.isfinite().all(), name
    if loss is not learned.Crd:  # the same batch again and again: what it looks for is among the negatives
        assert trained(module, student, teacher) < before


@every_case
def test_every_learned_loss_runs_in_the_precision_of_its_parameters(loss, student_shape, teacher_shape):
    module = made(loss, student_shape, teacher_shape).to(torch.bfloat16)
    value = module(drawn_as(student_shape, 0), drawn_as(teacher_shape, 1))
    value.backward()
    assert value.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in module.parameters())


@every_case
def test_every_learned_loss_refuses_shapes_of_two_batches_when_it_is_made(loss, student_shape, teacher_shape):
    smaller = [(3, *one[1:]) for one in teacher_shape] if isinstance(teacher_shape, list) else (3, *teacher_shape[1:])
    with pytest.raises(ValueError, match=r"student has shape \(4, .* teacher \(3, "):
        loss(student_shape, smaller)


def test_options_out_of_their_range_are_refused():
    shapes = (2, 3, 4, 4), (2, 5, 4, 4)
    with pytest.raises(ValueError, match="least_variance < initial_variance, but they are 1e-05 and 0"):
        learned.Vid(*shapes, initial_variance=0)
    with pytest.raises(ValueError, match="above 0, but is 0"):
        learned.FactorTransfer(*shapes, rate=0)
    for options in ({"features": 0}, {"memory": -1}, {"contrast": 0.0}):
        with pytest.raises(ValueError, match="but they are"):
            learned.Crd(*shapes, **options)
    with pytest.raises(ValueError, match="student has 1 layers and teacher 2"):
        learned.ReviewKd(shapes[:1], shapes)
    with pytest.raises(ValueError, match=r"same of \[4\] dimensions"):
        learned.FactorTransfer((2, 3), (2, 5))


def test_a_learned_loss_moves_with_its_module():
    holder = nn.ModuleDict({"crd": learned.Crd((2, 3), (2, 3), memory=4)}).double()
    assert {value.dtype for value in holder.state_dict().values()} == {torch.float64, torch.int64}
    student, teacher = (one.double() for one in draw((2, 3), (2, 3)))
    assert holder["crd"](student, teacher).dtype == torch.float64
