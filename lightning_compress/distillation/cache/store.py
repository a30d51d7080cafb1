"""Outputs of a teacher for each sample of a data set: written once, then found by what a sample contains."""

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_compress.distillation.cache.format import (
    DTYPES,
    KEYS,
    CacheFormat,
    Output,
    Part,
    StoredArray,
    cache_arrays,
    damaged_cache_error,
    dtype_name,
    parse_cache_format,
    storage_dtype,
)

VERSION = 1
HEADER_LIMIT_BYTES = 1 << 20


def write_cache(
    path: str | Path,
    batches: Iterable[tuple[Tensor, Tensor, Mapping[str, Tensor]]],
    *,
    count: int,
    form: str,
    teacher: str,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write a folder that `open_cache` reads. It appears once it is complete; of one that fails nothing stays.

    Args:
        path: the folder, not there yet.
        batches: gives `(rows, keys, outputs)`: int64 indices in the data set, `sample_keys` of these samples, and the
            teacher's outputs for them by name, `(batch, ...)`. Every row comes once, in any order.
        count: number of samples in the data set.
        form: see `parse_cache_format` and `CacheFormat`.
        teacher: its `fingerprint`.
        progress: called with the number of rows so far, after each batch.

    Raises:
        ValueError: if `path` exists, the disk is too full, rows are missing or come twice, or outputs are not finite.
    """
    folder, parsed = Path(path), parse_cache_format(form)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count is the number of samples in the data set, at least 1, but is {count!r}.")
    if not isinstance(teacher, str):
        raise ValueError(f"teacher is the fingerprint of a teacher, a string, but is {teacher!r}.")
    _refuse_existing(folder)
    part = _new_part(folder)
    try:
        writer = _Writer(part, count, parsed)
        for batch in batches:
            writer.add(*batch)
            if progress is not None:
                progress(int(writer.filled.sum()))
        writer.finish(form, teacher)
        _refuse_existing(folder)  # another process may have been faster
        os.replace(part, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def open_cache(path: str | Path, *, teacher: str, count: int | None) -> "TeacherCache":
    """Open what `write_cache` wrote.

    Args:
        path: the folder.
        teacher: `fingerprint` of the teacher that is asked for.
        count: number of samples in the data set, if it is known.

    Raises:
        ValueError: if there is no cache, it is damaged, or it is of another teacher or number of samples.
    """
    folder = Path(path)
    header = _header(folder)
    again = "Choose another path, or remove the folder to have it computed again."
    if header["teacher"] != teacher:
        raise ValueError(
            f"The cache {folder} is of the teacher {header['teacher'][:12]}..., but yours is {teacher[:12]}.... {again}"
        )
    if count is not None and header["count"] != count:
        raise ValueError(f"The cache {folder} is of {header['count']} samples, but your data set has {count}. {again}")
    form, outputs, planned = _planned(folder, header)
    files = {part: (array.open(folder), array.dtype) for part, array in planned.items()}
    if _sha256(files[KEYS][0]) != header["data"]:
        raise damaged_cache_error(folder, "its keys are not those that were written.")
    return TeacherCache(folder, form, outputs, files, header["data"])


@dataclass(frozen=True, eq=False)
class TeacherCache:
    """Outputs of a teacher on disk; `data_fingerprint` is SHA-256 of all samples' keys in the order of the data set."""

    folder: Path
    form: CacheFormat
    outputs: dict[str, Output]
    files: dict[Part, tuple[np.ndarray[Any, Any], torch.dtype]] = field(repr=False)
    data_fingerprint: str
    ordered: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def rows(self, keys: Tensor) -> Tensor:
        """Where samples of these `sample_keys` lie, `(batch,)`; of equal samples, the first.

        Raises:
            ValueError: if the cache has no such sample.
        """
        ordered, order = self._ordered(keys.device)
        found = torch.searchsorted(ordered, keys.contiguous()).clamp_(max=len(ordered) - 1)
        there = ordered.index_select(0, found)
        if not torch.equal(there, keys):
            missing = int((there != keys).sum())
            raise ValueError(
                f"{missing} of {len(keys)} samples are not in the cache {self.folder}. If they are augmented at "
                "random, make that a function of the sample: seed it by its index, so that it comes out alike always. "
                "If data or preparation changed since the cache was made, choose another path, or remove the folder "
                "to have it computed again."
            )
        return order.index_select(0, found)

    def read(self, rows: Tensor, device: torch.device | str) -> dict[str, Tensor]:
        """The outputs of these rows by name, in the types that the teacher gave them."""
        places = rows.cpu().numpy()
        stored: dict[str, dict[str, Tensor]] = {name: {} for name in self.outputs}
        for (name, part), (file, dtype) in self.files.items():
            if (name, part) != KEYS:
                stored[name][part] = torch.from_numpy(file[places]).view(dtype).to(device)
        return {name: self.form.decode(parts, self.outputs[name]) for name, parts in stored.items()}

    def _ordered(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self.ordered:
            ordered, order = torch.from_numpy(self.files[KEYS][0].copy()).sort(stable=True)
            self.ordered[device] = ordered.to(device), order.to(device)
        return self.ordered[device]


class _Writer:
    """A cache in the making, and which of its rows are filled."""

    def __init__(self, folder: Path, count: int, form: CacheFormat) -> None:
        self.folder, self.count, self.form = folder, count, form
        self.filled = np.zeros(count, dtype=bool)
        self.outputs: dict[str, Output] = {}
        self.files: dict[Part, np.memmap[Any, Any]] = {}

    def add(self, rows: Tensor, keys: Tensor, outputs: Mapping[str, Tensor]) -> None:
        rows, outputs = rows.cpu(), {name: output.detach() for name, output in outputs.items()}
        described = {name: (output.dtype, tuple(output.shape[1:])) for name, output in outputs.items()}
        _check_lengths(rows, keys, outputs)
        if not self.files:
            self._create(described)
        self._check(rows, described)
        parts = {KEYS: keys}
        for name, output in outputs.items():
            _check_finite(name, rows, output, "Leave that sample out, or mend the teacher.")
            for part, values in self.form.encode(name, output).items():
                _check_finite(name, rows, values, 'It is beyond float16, which ends at 65504: write "full".')
                parts[name, part] = values
        for place, values in parts.items():
            self.files[place][rows.numpy()] = values.view(storage_dtype(values.dtype)).cpu().numpy()
        self.filled[rows.numpy()] = True

    def finish(self, form: str, teacher: str) -> None:
        if not self.filled.all():
            raise ValueError(
                f"{int((~self.filled).sum())} of {self.count} rows are missing, row {int(self.filled.argmin())} first. "
                f"Go through the whole data set once, with no sample dropped."
            )
        described = [
            {"name": n, "dtype": dtype_name(dtype), "shape": shape} for n, (dtype, shape) in self.outputs.items()
        ]
        header = {"version": VERSION, "count": self.count, "form": form, "teacher": teacher}
        header |= {"data": _sha256(self.files[KEYS]), "outputs": described}
        for file in self.files.values():
            file.flush()
        self.files.clear()
        (self.folder / "header.json").write_text(json.dumps(header, indent=1), encoding="utf-8")
        for path in (*self.folder.iterdir(), self.folder):
            _sync(path)

    def _create(self, outputs: dict[str, Output]) -> None:
        for name, (dtype, shape) in outputs.items():
            if dtype not in DTYPES.values() or 0 in shape:
                raise ValueError(
                    f"Output {name!r} is {dtype} of shape {shape} a sample. Types to be kept are {[*DTYPES]}."
                )
        planned = cache_arrays(self.count, self.form, outputs)
        needed, free = sum(array.size_bytes for array in planned.values()), shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"The cache needs {needed} bytes, but {self.folder.parent} has {free} free. Choose another disk, or a "
                f'smaller form: "float16" or "top-20".'
            )
        self.outputs, self.files = outputs, {part: array.create(self.folder) for part, array in planned.items()}

    def _check(self, rows: Tensor, outputs: dict[str, Output]) -> None:
        if outputs != self.outputs:
            raise ValueError(f"Outputs of one batch are {outputs}, of the first {self.outputs}. Give all in one shape.")
        outside = rows[(rows < 0) | (rows >= self.count)]
        if len(outside):
            raise ValueError(f"Row {int(outside[0])} is outside of the {self.count} samples that were announced.")
        places, times = np.unique(rows.numpy(), return_counts=True)
        again = places[(times > 1) | self.filled[places]]
        if len(again):
            raise ValueError(
                f"Row {int(again[0])} comes twice. Go through the data set once, without repeating samples."
            )


def _header(folder: Path) -> dict[str, Any]:
    """Read the header, and check all of it but what only the files can tell."""
    try:
        with (folder / "header.json").open("rb") as file:
            text = file.read(HEADER_LIMIT_BYTES + 1)
    except OSError as error:
        why = "has no header.json that can be read" if folder.is_dir() else "is not there"
        raise ValueError(f"The cache {folder} {why}. Choose the path of a cache, or have it computed.") from error
    try:
        header = json.loads(text) if len(text) <= HEADER_LIMIT_BYTES else None
    except (ValueError, RecursionError) as error:
        raise damaged_cache_error(folder, "header.json is not JSON.") from error
    if not isinstance(header, dict) or header.get("version") != VERSION:
        version = header.get("version") if isinstance(header, dict) else None
        raise damaged_cache_error(folder, f"header.json has the version {version!r}, and {VERSION} can be read.")
    types = {"count": int, "form": str, "teacher": str, "data": str, "outputs": list}
    wrong = [name for name, kind in types.items() if type(header.get(name)) is not kind]
    if wrong:
        raise damaged_cache_error(folder, f"header.json has no valid {' nor '.join(wrong)}.")
    return header


def _planned(folder: Path, header: dict[str, Any]) -> tuple[CacheFormat, dict[str, Output], dict[Part, StoredArray]]:
    """What the files of a cache should be, by its header."""
    try:
        form = parse_cache_format(header["form"])
        outputs = {str(one["name"]): (DTYPES[one["dtype"]], tuple(one["shape"])) for one in header["outputs"]}
        return form, outputs, cache_arrays(header["count"], form, outputs)
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        raise damaged_cache_error(folder, f"header.json describes outputs that cannot be ({error!r}).") from error


def _refuse_existing(folder: Path) -> None:
    if os.path.lexists(folder):
        raise ValueError(f"{folder} is there already, and is never overwritten. Remove it, or choose another path.")


def _new_part(folder: Path) -> Path:
    """Make a folder for what is not complete yet; its name has the computer too, whose process numbers are its own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"\W", "_", socket.gethostname())
    ours = re.compile(re.escape(f"{folder.name}.part-") + r"([0-9]{1,9})-" + re.escape(host))
    for left in folder.parent.iterdir():
        match = ours.fullmatch(left.name)
        if match and _has_ended(int(match[1])):
            shutil.rmtree(left, ignore_errors=True)
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}-{host}")
    part.mkdir()
    return part


def _has_ended(process: int) -> bool:
    if os.name != "posix":  # Windows would end the process instead of asking for it
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it lives, and is not ours
        return False
    return process == os.getpid()  # a number can come back, and we have just begun


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, where the system offers that for both."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_lengths(rows: Tensor, keys: Tensor, outputs: Mapping[str, Tensor]) -> None:
    lengths = {"rows": tuple(rows.shape), "keys": tuple(keys.shape)}
    lengths |= {name: tuple(output.shape[:1]) for name, output in outputs.items()}
    if len(set(lengths.values())) > 1 or not outputs or {rows.dtype, keys.dtype} != {torch.int64}:
        raise ValueError(
            f"A batch is rows and keys, int64 (batch,), and outputs (batch, ...), but has {lengths}, rows of "
            f"{rows.dtype} and keys of {keys.dtype}. Give one of each for every sample."
        )


def _check_finite(name: str, rows: Tensor, values: Tensor, mend: str) -> None:
    bad = rows[~values.unsqueeze(-1).flatten(1).isfinite().all(1).cpu()]
    if len(bad):
        raise ValueError(f"Output {name!r} of row {int(bad[0])} is not finite. {mend}")


def _sha256(keys: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(keys).data).hexdigest()
