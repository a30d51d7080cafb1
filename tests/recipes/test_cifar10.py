import pickle

import numpy
import pytest
import torch

from lightning_compress._lightning import Trainer
from lightning_compress.recipes import cifar10
from lightning_compress.recipes.cifar10 import CIFAR10, ResNet, moved, read_batches


class Touch:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def folder(tmp_path):
    """Noise in the form of the published files."""
    chance = numpy.random.default_rng(0)
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in (*cifar10.TRAIN_FILES, *cifar10.TEST_FILES):
        pixels = chance.integers(0, 256, (24, 3072), dtype=numpy.uint8)
        write(tmp_path, name, {b"data": pixels, b"labels": [place % 10 for place in range(24)]})
    return tmp_path


def write(folder, name, content):
    (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize(("depth", "expected"), [(1, 75_290), (3, 269_722)])
def test_sizes_are_those_of_resnet_8_and_20(depth, expected):
    # By hand: 3x3 convolutions and two numbers of batch norm for each of their channels; the head.
    steps = [(3, 16)]
    for before, after in ((16, 16), (16, 32), (32, 64)):
        steps += [(before, after), *[(after, after)] * (2 * depth - 1)]
    assert sum(9 * before * after + 2 * after for before, after in steps) + 64 * 10 + 10 == expected
    module = ResNet(depth)
    assert sum(parameter.numel() for parameter in module.parameters()) == expected
    assert len(steps) + 1 == 6 * depth + 2


def test_stages_halve_the_image_and_double_the_channels():
    module, features, shapes = ResNet(1).eval(), torch.zeros(2, 16, 32, 32), []
    for stage in module.stages:
        features = stage(features)
        shapes.append(tuple(features.shape))
    assert shapes == [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
    assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_what_is_moved_is_a_window_of_the_padded_image_or_of_its_mirror():
    torch.manual_seed(0)
    images = torch.rand(12, 3, 8, 8)
    found = moved(images, pixels=2)
    padded = torch.nn.functional.pad(images, (2,) * 4)
    places = set()
    for one, whole in zip(found, padded, strict=True):
        windows = {(y, x, m): whole[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5) for m in (0, 1)}
        windows = {place: window.flip(2) if place[2] else window for place, window in windows.items()}
        (place,) = (place for place, window in windows.items() if torch.equal(one, window))
        places.add(place)
    assert len(places) > 6
    assert {place[2] for place in places} == {0, 1}


def test_splits_are_disjoint_and_as_large_as_asked(folder):
    data, again = (CIFAR10(folder, batch_size=16, validation=30) for _ in range(2))
    data.setup()
    again.setup()
    assert {name: len(labels) for name, (_, labels) in data.splits.items()} == {
        "train": 90,
        "validation": 30,
        "test": 24,
    }
    both = torch.cat([data.splits[name][0] for name in ("train", "validation")]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 120
    assert torch.equal(data.splits["train"][0], again.splits["train"][0])
    with pytest.raises(ValueError, match="below 120, but is 120"):
        CIFAR10(folder, validation=120).setup()


def test_only_training_images_are_moved_and_all_are_normalised(folder, tmp_path):
    data, seen = CIFAR10(folder, batch_size=16, validation=30), {}

    class Watched(ResNet):
        def training_step(self, batch, batch_idx):
            seen.setdefault("train", batch[0])
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            seen.setdefault("validation", batch[0])
            return super().validation_step(batch, batch_idx)

    module = Watched(depth=1)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    images, labels = data.splits["validation"]
    mean, deviation = (torch.tensor(one).view(3, 1, 1) for one in (cifar10.MEAN, cifar10.STANDARD_DEVIATION))
    assert torch.allclose(seen["validation"], (images / 255 - mean) / deviation, atol=1e-6)
    assert seen["train"].shape == (16, 3, 32, 32)
    assert (seen["train"] == 0).any()  # what comes in at the edges
    module.eval()
    wrong = (module(seen["validation"]).argmax(1) != labels).float().mean().item()
    assert trainer.callback_metrics["val_error"].item() == pytest.approx(wrong, abs=1e-6)


def test_files_that_are_missing_or_hold_something_else_are_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="data_dir"):
        CIFAR10(tmp_path / "nowhere").setup()
    write(folder, "test_batch", {b"data": numpy.zeros((2, 3), numpy.uint8), b"labels": [0, 1]})
    with pytest.raises(ValueError, match=r"2 rows of 3,072 bytes, but holds \(2, 3\)"):
        read_batches(folder / "cifar-10-batches-py", cifar10.TEST_FILES)


def test_a_file_cannot_run_anything(folder, tmp_path):
    write(folder, "test_batch", {b"data": Touch(tmp_path / "touched"), b"labels": []})
    with pytest.raises(ValueError, match="not to be trusted"):
        read_batches(folder / "cifar-10-batches-py", cifar10.TEST_FILES)
    assert not (tmp_path / "touched").exists()
