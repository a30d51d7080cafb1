"""Read an offline W&B run's file: a log of protocol buffers in LevelDB's format (blocks of 32 KiB, framed records)."""

import struct
import time
from pathlib import Path

BLOCK = 32768
FILE_HEADER = 7  # ":W&B", a magic number, a version
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(path):
    """The bytes of each record, in order."""
    data, at, parts = Path(path).read_bytes(), FILE_HEADER, b""
    if not data:
        return  # nothing is written yet
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK  # a header does not fit: the rest of the block is padding
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind not in (FULL, FIRST, MIDDLE, LAST) or at + 7 + length > len(data):
            break  # W&B's process has not written the rest yet
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def records(folder, seconds=120):
    """All records of the one finished offline run in a folder.

    W&B's own process writes the file, and on a busy machine goes on when `finish` has returned: "exit" comes last.
    """
    until = time.monotonic() + seconds
    while True:
        found = _written(folder)
        if any(one.HasField("exit") for one in found) or time.monotonic() > until:
            return found
        time.sleep(0.2)


def _written(folder):
    from wandb.proto import wandb_internal_pb2

    (path,) = Path(folder).glob("**/run-*.wandb")
    found = []
    for payload in payloads(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        found.append(record)
    return found


def key_of(item):
    """The key of an item of a config, a summary or a history."""
    return "/".join(item.nested_key) or item.key
