import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from lightning_compress.distillation.cache.format import parse_cache_format
from lightning_compress.distillation.cache.sample_keys import sample_keys
from lightning_compress.distillation.cache.store import open_cache, write_cache

COUNT, CLASSES = 23, 40
TEACHER = "a1" * 32


@pytest.fixture
def data():
    return torch.randn(COUNT, 3, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def logits():
    return 4 * torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "cache"


def shuffled(data, outputs, size=5, seed=2):
    for rows in torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).split(size):
        yield rows, sample_keys(data[rows]), {name: output[rows] for name, output in outputs.items()}


def write(path, batches, count=COUNT, form="full", teacher=TEACHER, **others):
    write_cache(path, batches, count=count, form=form, teacher=teacher, **others)


def written(path, data, outputs, **others):
    write(path, shuffled(data, outputs), count=len(data), **others)
    return open_cache(path, teacher=TEACHER, count=len(data))


def read(cache, batch):
    return cache.read(cache.rows(sample_keys(batch)), "cpu")


def top_k_by_numpy(logits, k):
    """Log-probabilities whose k largest are those of a softmax, and whose others share what is left."""
    logits = logits.double().numpy()
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = exponentials / exponentials.sum(-1, keepdims=True)
    smallest = np.sort(probabilities, -1)[..., -k, None]
    inside = probabilities >= smallest
    share = np.where(inside, 0, probabilities).sum(-1, keepdims=True) / (logits.shape[-1] - k)
    return torch.from_numpy(np.log(np.where(inside, probabilities, share)))


def test_outputs_come_back_exactly_in_any_batch(path, data, logits):
    outputs = {
        "logits": logits,
        "layer/3 ../x": torch.randn(COUNT, 2, 3, 4, generator=torch.Generator().manual_seed(3)),
        "brain": logits.bfloat16(),
        "half": logits[:, :2].half(),
        "double": logits.double()[:, :1],
        "label": logits.argmax(1),
        "sure": logits > 2,
        "": logits[:, 0],
    }
    cache = written(path, data, outputs)
    for rows, _, expected in shuffled(data, outputs, size=7, seed=9):
        found = read(cache, data[rows])
        assert found.keys() == outputs.keys()
        for name, values in expected.items():
            assert found[name].dtype == values.dtype
            assert torch.equal(found[name], values)


def test_float16_gives_the_teachers_types_back(path, data, logits):
    outputs = {"logits": logits, "brain": logits.bfloat16(), "label": logits.argmax(1) + 100_000}
    found = read(written(path, data, outputs, form="float16"), data)
    assert {name: values.dtype for name, values in found.items()} == {
        name: values.dtype for name, values in outputs.items()
    }
    assert torch.equal(found["logits"], torch.from_numpy(logits.numpy().astype(np.float16).astype(np.float32)))
    assert torch.equal(found["label"], outputs["label"])
    torch.testing.assert_close(found["brain"], outputs["brain"], atol=1e-7, rtol=1e-2)
    sizes = [(path / file).stat().st_size for file in ("0.npy", "1.npy")]
    assert all(size < 2 * logits.numel() + 300 for size in sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("k", [1, 7, CLASSES - 1])
def test_the_top_k_are_exact_probabilities_and_the_rest_is_spread_evenly(path, data, logits, k, dtype):
    given = logits.to(dtype)
    found = read(written(path, data, {"logits": given}, form=f"top-{k}"), data)["logits"]
    assert found.dtype == dtype
    expected = top_k_by_numpy(given, k)
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=2e-3)
    torch.testing.assert_close(found.double().softmax(-1), expected.softmax(-1), atol=1e-3, rtol=1e-2)


def test_the_top_k_of_tokens_are_taken_from_the_last_dimension(path, data):
    logits = torch.randn(COUNT, 3, 11, generator=torch.Generator().manual_seed(4))
    found = read(written(path, data, {"logits": logits}, form="top-4"), data)["logits"]
    torch.testing.assert_close(found.double(), top_k_by_numpy(logits, 4), atol=1e-3, rtol=2e-3)


@pytest.mark.parametrize(("classes", "dtype"), [(32768, np.int16), (32769, np.int32)])
def test_places_are_as_small_as_the_classes_allow(path, classes, dtype):
    data = torch.arange(2)
    logits = torch.zeros(2, classes)
    logits[:, -1] = 9.0
    found = read(written(path, data, {"logits": logits}, form="top-2"), data)["logits"]
    assert found.argmax(1).tolist() == [classes - 1] * 2
    assert np.load(path / "1.npy", allow_pickle=False).dtype == dtype


@pytest.mark.parametrize("form", ["top-0", "top-x", "top-", "top--3", "top-3 ", "int4", "", None, 16])
def test_other_forms_are_refused(path, data, logits, form):
    with pytest.raises(ValueError, match=f'form is {form!r}. Write "full", "float16", or "top-20"'):
        parse_cache_format(form)
    with pytest.raises(ValueError, match="form is"):
        write(path, shuffled(data, {"logits": logits}), form=form)
    assert not path.parent.exists()


@pytest.mark.parametrize(
    "output", [torch.zeros(COUNT, 5), torch.zeros(COUNT), torch.zeros(COUNT, 9, dtype=torch.int64)]
)
def test_the_top_k_of_too_few_classes_or_of_integers_are_refused(path, data, output):
    with pytest.raises(ValueError, match=r"'features'.*Take a smaller number"):
        write(path, shuffled(data, {"features": output}), form="top-5")
    assert nothing_left(path)


def test_equal_samples_are_found_at_the_first_of_them(path, data, logits):
    data[7], logits[7] = data[4], logits[4]
    cache = written(path, data, {"logits": logits})
    assert cache.rows(sample_keys(data[[7, 4, 8]])).tolist() == [4, 4, 8]
    assert torch.equal(read(cache, data)["logits"], logits)


def test_augmented_samples_are_refused(path, data, logits):
    cache = written(path, data, {"logits": logits})
    batch = data[:6].clone()
    batch[[1, 3]] = batch[[1, 3]].flip(-1)
    with pytest.raises(ValueError, match=r"2 of 6 samples are not in the cache .*seed it by its index.*remove"):
        cache.rows(sample_keys(batch))
    largest, smallest = torch.tensor([2**63 - 1]), torch.tensor([-(2**63)])
    for key in (largest, smallest):
        with pytest.raises(ValueError, match="1 of 1"):
            cache.rows(key)


def test_the_data_fingerprint_depends_on_the_order_of_the_data_set_alone(tmp_path, data, logits):
    cache = written(tmp_path / "one", data, {"logits": logits})
    write(tmp_path / "other", shuffled(data, {"logits": logits * 2}, size=11, seed=8), teacher="b2")
    assert open_cache(tmp_path / "other", teacher="b2", count=None).data_fingerprint == cache.data_fingerprint
    assert written(tmp_path / "third", data.flip(0), {"logits": logits}).data_fingerprint != cache.data_fingerprint
    assert len(cache.data_fingerprint) == 64


def test_progress_counts_rows(path, data, logits):
    counts = []
    write(path, shuffled(data, {"logits": logits}, size=10), progress=counts.append)
    assert counts == [10, 20, 23]


def test_another_teacher_or_number_of_samples_is_refused(path, data, logits):
    written(path, data, {"logits": logits})
    with pytest.raises(
        ValueError, match=r"of the teacher a1a1a1a1a1a1\.\.\., but yours is b2b2b2b2b2b2\.\.\.\. Choose"
    ):
        open_cache(path, teacher="b2" * 32, count=COUNT)
    with pytest.raises(ValueError, match="of 23 samples, but your data set has 24. Choose"):
        open_cache(path, teacher=TEACHER, count=24)
    open_cache(path, teacher=TEACHER, count=None)


def test_a_missing_cache_is_refused(path):
    with pytest.raises(ValueError, match="is not there"):
        open_cache(path, teacher=TEACHER, count=COUNT)
    path.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has no header\.json"):
        open_cache(path, teacher=TEACHER, count=COUNT)


@pytest.mark.parametrize("file", ["keys.npy", "0.npy"])
@pytest.mark.parametrize("damage", ["cut", "longer", "emptied", "removed", "garbage", "retyped"])
def test_a_damaged_file_is_refused(path, data, logits, file, damage):
    written(path, data, {"logits": logits})
    content = (path / file).read_bytes()
    if damage == "removed":
        (path / file).unlink()
    else:
        changed = {
            "cut": content[:-1],
            "longer": content + b"\0",
            "emptied": b"",
            "garbage": content[:10] + b"(" * 118 + content[128:],
            "retyped": content.replace(b"<f4", b"<i4").replace(b"<i8", b"<f8"),
        }
        (path / file).write_bytes(changed[damage])
    with pytest.raises(ValueError, match=f"is damaged: {file}.*Remove the folder"):
        open_cache(path, teacher=TEACHER, count=COUNT)


def test_keys_that_changed_on_disk_are_refused(path, data, logits):
    written(path, data, {"logits": logits})
    content = bytearray((path / "keys.npy").read_bytes())
    content[-1] ^= 1
    (path / "keys.npy").write_bytes(content)
    with pytest.raises(ValueError, match="its keys are not those"):
        open_cache(path, teacher=TEACHER, count=COUNT)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[:-9],
        lambda header: "[" * 100_000,
        lambda header: "[1]",
        lambda header: " " * (1 << 20) + header,
        lambda header: edited(header, version=2),
        lambda header: edited(header, count=True),
        lambda header: edited(header, count=-1),
        lambda header: edited(header, teacher=None),
        lambda header: edited(header, form="top-99"),
        lambda header: edited(header, outputs={}),
        lambda header: edited(header, outputs=[{"name": "logits", "dtype": "object", "shape": [CLASSES]}]),
        lambda header: edited(header, outputs=[{"name": "logits", "dtype": "float32", "shape": [-1]}]),
        lambda header: edited(header, outputs=[{"name": "logits", "dtype": "float32", "shape": [10**30]}]),
        lambda header: edited(header, outputs=[{"name": "logits", "dtype": "float32", "shape": [CLASSES + 1]}]),
        lambda header: edited(header, outputs=[3]),
    ],
)
def test_a_damaged_header_is_refused(path, data, logits, change):
    written(path, data, {"logits": logits})
    header = path / "header.json"
    header.write_text(change(header.read_text()))
    with pytest.raises(ValueError, match=r"is damaged: .*Remove the folder to have it computed again\."):
        open_cache(path, teacher=TEACHER, count=None)


def edited(header, **changes):
    return json.dumps({**json.loads(header), **changes})


def nothing_left(path):
    return list(path.parent.iterdir()) == []


def test_an_exception_on_the_way_leaves_nothing_behind(path, data, logits):
    def interrupted():
        yield from list(shuffled(data, {"logits": logits}))[:2]
        assert [one.name.startswith("cache.part-") for one in path.parent.iterdir()] == [True]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, interrupted())
    assert nothing_left(path)


def test_the_remains_of_a_killed_process_are_removed_and_those_of_a_living_one_are_not(path, data, logits):
    def killed():
        yield from list(shuffled(data, {"logits": logits}))[:2]
        (part,) = path.parent.iterdir()
        names.extend(part.name.replace(f"part-{os.getpid()}-", f"part-{pid}-") for pid in (ended, os.getppid()))
        names.append(names[0] + "_of_another_computer")
        for name in names:
            shutil.copytree(part, path.with_name(name))
        raise KeyboardInterrupt

    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended, names = process.pid, []
    process.wait()
    with pytest.raises(KeyboardInterrupt):
        write(path, killed())
    with pytest.raises(ValueError, match="is not there"):
        open_cache(path, teacher=TEACHER, count=COUNT)
    with pytest.raises(ValueError, match=r"has no header\.json"):
        open_cache(path.with_name(names[0]), teacher=TEACHER, count=COUNT)
    assert torch.equal(read(written(path, data, {"logits": logits}), data)["logits"], logits)
    assert {one.name for one in path.parent.iterdir()} == {"cache", *names[1:]}


def test_remains_with_our_own_process_number_are_removed(path, data, logits):
    def again():
        yield from shuffled(data, {"logits": logits})
        (part,) = path.parent.iterdir()
        shutil.copytree(part, path.parents[1] / part.name)

    write(path, again())
    shutil.rmtree(path)
    (left,) = path.parents[1].glob("cache.part-*")
    left.rename(path.parent / left.name)
    written(path, data, {"logits": logits})
    assert list(path.parent.iterdir()) == [path]


def test_a_cache_is_never_overwritten(path, data, logits):
    before = written(path, data, {"logits": logits})
    with pytest.raises(ValueError, match="is there already, and is never overwritten"):
        write(path, shuffled(data, {"logits": logits + 1}))
    assert torch.equal(read(before, data)["logits"], logits)


def test_of_two_writers_the_faster_one_stays(path, data, logits):
    def overtaken():
        yield from shuffled(data, {"logits": logits})
        os.rename(made, path)

    made = path.with_name("made by another")
    written(made, data, {"logits": logits + 1})
    with pytest.raises(ValueError, match="never overwritten"):
        write(path, overtaken())
    assert list(path.parent.iterdir()) == [path]
    assert torch.equal(read(open_cache(path, teacher=TEACHER, count=COUNT), data)["logits"], logits + 1)


def test_a_full_disk_is_noticed_before_writing(path, data, logits, monkeypatch):
    usage = shutil.disk_usage(path.parents[1])
    needed = COUNT * (8 + 4 * CLASSES)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(ValueError, match=rf"needs {needed} bytes, but .* has {needed - 1} free.*smaller form"):
        write(path, shuffled(data, {"logits": logits}))
    assert nothing_left(path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=needed))
    write(path, shuffled(data, {"logits": logits}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", ["full", "float16", "top-3"])
def test_outputs_that_are_not_finite_are_refused_with_their_row(path, data, logits, value, form):
    logits[17, 3] = value
    with pytest.raises(ValueError, match="Output 'logits' of row 17 is not finite. Leave"):
        write(path, shuffled(data, {"logits": logits}), form=form)
    assert nothing_left(path)


def test_outputs_beyond_float16_are_refused(path, data, logits):
    logits[11, 0] = 70_000.0
    with pytest.raises(ValueError, match="row 11 is not finite. It is beyond float16"):
        write(path, shuffled(data, {"logits": logits}), form="float16")


def batch_of(rows, **outputs):
    rows = torch.tensor(rows)
    return rows, rows * 3, outputs or {"logits": torch.zeros(len(rows), 4)}


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "4 of 4 rows are missing, row 0 first"),
        ([batch_of([0, 1, 3])], "1 of 4 rows are missing, row 2 first"),
        ([batch_of([0, 1]), batch_of([2, 1])], "Row 1 comes twice"),
        ([batch_of([2, 2])], "Row 2 comes twice"),
        ([batch_of([0, 4])], "Row 4 is outside of the 4 samples"),
        ([batch_of([0, -1])], "Row -1 is outside"),
        ([batch_of([0]), batch_of([1], logits=torch.zeros(1, 5))], "Outputs of one batch are"),
        ([batch_of([0]), batch_of([1], logits=torch.zeros(1, 4).double())], "Outputs of one batch are"),
        ([batch_of([0, 1], logits=torch.zeros(3, 4))], "Give one of each for every sample"),
        ([batch_of([0, 1], loss=torch.zeros(()))], "Give one of each for every sample"),
        ([(torch.arange(2), torch.arange(2), {})], "Give one of each for every sample"),
        ([(torch.arange(2) > 0, torch.arange(2), {"logits": torch.zeros(2, 4)})], "rows of torch.bool"),
        ([batch_of([0], wave=torch.zeros(1, 4, dtype=torch.complex64))], "Types to be kept"),
        ([batch_of([0], none=torch.zeros(1, 0))], "Types to be kept"),
    ],
)
def test_batches_that_are_not_the_data_set_are_refused(path, batches, words):
    with pytest.raises(ValueError, match=words):
        write(path, iter(batches), count=4)
    assert nothing_left(path)


@pytest.mark.parametrize("count", [0, -1, True, 2.0, None])
def test_a_count_that_is_none_is_refused(path, count):
    with pytest.raises(ValueError, match=f"at least 1, but is {count}"):
        write(path, [], count=count)


def test_a_teacher_that_is_no_fingerprint_is_refused_before_the_work(path):
    with pytest.raises(ValueError, match="teacher is the fingerprint"):
        write(path, [], teacher=None)


def test_nothing_is_pickled_and_what_was_read_can_be_written_to(path, data, logits):
    cache = written(path, data, {"logits": logits})
    for file in path.glob("*.npy"):
        np.load(file, allow_pickle=False)
    assert sorted(file.name for file in path.iterdir()) == ["0.npy", "header.json", "keys.npy"]
    read(cache, data)["logits"].zero_()
    assert torch.equal(read(cache, data)["logits"], logits)


def test_no_random_stream_is_touched(path, data, logits):
    before = torch.get_rng_state()
    read(written(path, data, {"logits": logits}, form="top-5"), data)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", ["full", "float16", "top-7"])
def test_a_cache_made_on_a_gpu_is_read_on_both(path, data, logits, form):
    cache = written(path, data.cuda(), {"logits": logits.cuda()}, form=form)
    rows = cache.rows(sample_keys(data[5:].cuda()))
    found = cache.read(rows, "cuda")["logits"]
    assert rows.is_cuda
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), read(cache, data[5:])["logits"])
