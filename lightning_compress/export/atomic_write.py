"""Write a file beside its place, and move it there once it is complete and checked."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_on_success(path: str | Path) -> Iterator[Path]:
    """Give the path of a file to write, which then takes the place of `path`; if an error comes, nothing changes.

    Raises:
        FileNotFoundError: if the folder is not there.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {target.parent} to write {target.name} into. Make it first.")
    part = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
