"""A teacher whose outputs for all samples are computed once, before the first step, and read from disk afterwards."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.distillation.batch_fields import Key, select_tensor
from lightning_compress.distillation.cache.format import parse_cache_format
from lightning_compress.distillation.cache.sample_keys import sample_keys, teacher_fingerprint
from lightning_compress.distillation.cache.store import TeacherCache, open_cache, write_cache
from lightning_compress.distillation.loss_terms import OUTPUT, Names
from lightning_compress.distillation.teachers.base import Teacher, TeacherStep
from lightning_compress.distillation.teachers.network import FunctionTeacher, NetworkTeacher
from lightning_compress.nn.forward_capture import ForwardCall
from lightning_compress.nn.isolation import preserved_random_state

PROBE = 8  # samples that are loaded twice, to find random augmentation
BATCH_SIZE = 64  # for a loader without a batch size

Prepare = Callable[[Any], Any]


class CachedTeacher(Teacher):
    """A teacher with a cache on disk, which is filled once with its outputs for the training data.

    Args:
        teacher: a `NetworkTeacher` or `FunctionTeacher`; a teacher that changes during training cannot be cached.
        path: folder of the cache. An existing cache is used if it was made for this teacher and these data.
        form: "full", "float16" or "top-20" (any number of classes).
        output: part of the teacher's output that is stored, see `batch_fields.select_tensor`.

    Raises:
        ValueError: if the teacher changes during training.

    >>> from tempfile import TemporaryDirectory
    >>> from torch.utils.data import TensorDataset
    >>> loader = DataLoader(TensorDataset(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), batch_size=2)
    >>> batch = next(iter(loader))
    >>> call = ForwardCall(args=(batch[0],), kwargs={}, output=None)
    >>> step = TeacherStep((batch, 0), {}, torch.device("cpu"), number=0)
    >>> with TemporaryDirectory() as folder, ExitStack() as undo:
    ...     teacher = CachedTeacher(FunctionTeacher(lambda inputs: inputs.sum(1)), f"{folder}/cache")
    ...     teacher.attach(None, ["output"], undo)
    ...     teacher.fill(call, step, loader, prepare=lambda batch: batch, progress=lambda done, total: None)
    ...     teacher.open(loader)
    ...     teacher.teach(call, step)["output"].tolist()
    [3.0, 7.0]
    """

    def __init__(self, teacher: Teacher, path: str | Path, form: str = "full", output: Key | None = None) -> None:
        if not isinstance(teacher, NetworkTeacher | FunctionTeacher):
            raise ValueError(
                f"cache stores one output of the teacher for each sample, but {type(teacher).__name__} changes during "
                f"training. Leave cache out, or take a teacher with fixed weights."
            )
        self.teacher, self.path, self.form, self.output = teacher, Path(path), form, output
        self.module = teacher.module
        self.cache: TeacherCache | None = None
        self._names: Names = ()

    def attach(self, model: Any, layers: Iterable[str], undo: ExitStack) -> None:
        self.cache, self._names = None, tuple(layers)
        self.teacher.attach(model, self._names, undo)

    def teach(self, call: ForwardCall, step: TeacherStep) -> dict[str, Any]:
        if self.cache is None:
            raise RuntimeError("The cache is not open yet: call open(loader) before teach.")
        rows = self.cache.rows(sample_keys((call.args, call.kwargs)))
        return dict(self.cache.read(rows, step.device))

    def fill(
        self,
        call: ForwardCall,
        step: TeacherStep,
        loader: Any,
        prepare: Prepare,
        progress: Callable[[int, int], object],
    ) -> None:
        """Compute the outputs of the whole data set, unless the cache exists.

        Args:
            call, step: the student's first call and its training step; they show which parts of a batch are the
                student's inputs.
            loader: the training loader; its data set is read once, in order.
            prepare: moves a batch to the student's device, as the Trainer does.
            progress: called with the number of finished samples and the number of all samples.
        """
        if self.path.exists():
            return
        dataset = _dataset(loader)
        inputs = matching_part(step.args[0], (call.args, call.kwargs))
        with preserved_random_state(), preserved_host_random_state():
            _refuse_random(dataset, loader, lambda batch: inputs(prepare(batch)))
            write_cache(
                self.path,
                self._outputs(sequential_loader(dataset, loader), step, lambda batch: inputs(prepare(batch))),
                count=len(dataset),
                form=self.form,
                teacher=self._fingerprint(),
                progress=lambda done: progress(done, len(dataset)),
            )

    def open(self, loader: Any) -> None:
        """Open the cache on disk for reading.

        Raises:
            ValueError: if it was made for another teacher, data set, form, or without one of the layers.
        """
        self.cache = open_cache(self.path, teacher=self._fingerprint(), count=len(_dataset(loader)))
        if missing := set(self._names) - set(self.cache.outputs):
            raise ValueError(
                f"The cache {self.path} has no outputs of {', '.join(sorted(missing))}, only of "
                f"{', '.join(self.cache.outputs)}. Choose another path, or remove the folder to have it computed again."
            )
        if self.cache.form != parse_cache_format(self.form):
            raise ValueError(
                f"The cache {self.path} was written in another form than cache_form='{self.form}': "
                f"{self.cache.form}. Name that form, choose another path, or remove the folder to have it computed "
                f"again."
            )

    def _fingerprint(self) -> str:
        teacher = self.teacher
        return teacher_fingerprint(teacher.function if isinstance(teacher, FunctionTeacher) else teacher.module)  # type: ignore[arg-type]

    def _outputs(
        self, batches: Iterable[Any], step: TeacherStep, inputs: Prepare
    ) -> Iterator[tuple[Tensor, Tensor, Mapping[str, Tensor]]]:
        first = 0
        for batch in batches:
            args, kwargs = inputs(batch)
            keys = sample_keys((args, kwargs))
            taught = self.teacher.teach(ForwardCall(args, kwargs, None), step)
            outputs = {
                name: select_tensor(taught[name], self.output if name == OUTPUT else None) for name in self._names
            }
            yield torch.arange(first, first + len(keys)), keys.cpu(), outputs
            first += len(keys)


def sequential_loader(dataset: Any, loader: Any) -> "DataLoader[Any]":
    """A loader with the same data set, batch size and collate function, without shuffling.

    >>> loader = DataLoader(range(5), batch_size=2, shuffle=True)
    >>> [batch.tolist() for batch in sequential_loader(loader.dataset, loader)]
    [[0, 1], [2, 3], [4]]
    """
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or BATCH_SIZE
    return DataLoader(dataset, size, shuffle=False, collate_fn=loader.collate_fn, num_workers=loader.num_workers)


def matching_part(batch: Any, wanted: Any) -> Callable[[Any], Any]:
    """A function that builds from another batch what `wanted` is in this one, found by the identity of objects.

    Raises:
        ValueError: if a tensor of `wanted` is not an object in the batch.

    >>> batch = {"image": torch.tensor([1.0]), "label": torch.tensor([7])}
    >>> select = matching_part(batch, (batch["image"],))
    >>> select({"image": torch.tensor([2.0]), "label": torch.tensor([8])})
    (tensor([2.]),)
    """
    path = _path(batch, wanted)
    if path is not None:
        return lambda other: _follow(other, path)
    if isinstance(wanted, tuple | list):
        parts = [matching_part(batch, one) for one in wanted]
        return lambda other: type(wanted)(part(other) for part in parts)
    if isinstance(wanted, dict):
        named = {key: matching_part(batch, one) for key, one in wanted.items()}
        return lambda other: {key: part(other) for key, part in named.items()}
    if isinstance(wanted, Tensor):
        raise ValueError(
            "cache: an input of the student is a tensor that training_step computes from the batch, so the teacher's "
            "outputs cannot be computed in advance. Move this computation into the data set or into the module's "
            "forward, or leave cache out."
        )
    return lambda _: wanted


@contextmanager
def preserved_host_random_state() -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards the random streams of Python and NumPy are restored.

    >>> state = random.getstate()
    >>> with preserved_host_random_state():
    ...     _ = random.random()
    >>> random.getstate() == state
    True
    """
    python, array = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def _dataset(loader: Any) -> Any:
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"cache needs one training DataLoader over a data set of known length, but got {type(loader).__name__}. "
            f"Leave cache out, or read the data into a map-style data set."
        )
    return dataset


def _refuse_random(dataset: Any, loader: Any, inputs: Callable[[Any], Any]) -> None:
    few = torch.utils.data.Subset(dataset, range(min(PROBE, len(dataset))))
    first, second = ([sample_keys(inputs(batch)) for batch in sequential_loader(few, loader)] for _ in range(2))
    differing = int(sum((one != other).sum() for one, other in zip(first, second, strict=True)))
    if differing:
        raise ValueError(
            f"cache: {differing} of {len(few)} samples came out differently when they were loaded twice, so the data "
            f"are augmented at random, and the teacher's output for one version of a sample is wrong for the next. "
            f"Seed the augmentation by the sample's index, augment after the forward pass, or leave cache out."
        )


def _path(value: Any, wanted: Any, depth: int = 4) -> tuple[tuple[str, Any], ...] | None:
    if value is wanted and not isinstance(wanted, str | int | float | bool | None):
        return ()
    if not depth or isinstance(value, Tensor | str):
        return None
    if isinstance(value, Mapping):
        parts = [(("item", key), one) for key, one in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(("item", place), one) for place, one in enumerate(value)]
    else:
        parts = [(("attribute", name), one) for name, one in getattr(value, "__dict__", {}).items()]
    for step, one in parts:
        rest = _path(one, wanted, depth - 1)
        if rest is not None:
            return (step, *rest)
    return None


def _follow(value: Any, path: tuple[tuple[str, Any], ...]) -> Any:
    for kind, key in path:
        value = value[key] if kind == "item" else getattr(value, key)
    return value
