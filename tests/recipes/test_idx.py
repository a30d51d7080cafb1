import gzip

import pytest
import torch

from lightning_compress.recipes.idx import LARGEST_COUNT, read_idx

# Two images of 2 x 3 pixels, written out by hand.
IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(range(12))
LABELS = bytes([0, 0, 8, 1, 0, 0, 0, 4, 7, 2, 1, 0])


def written(folder, content):
    path = folder / "file"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzipped"])
def test_reads_bytes_made_by_hand(tmp_path, pack):
    images = read_idx(written(tmp_path, pack(IMAGES)), (2, 3))
    assert images.dtype == torch.uint8
    assert images.tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    assert read_idx(written(tmp_path, pack(LABELS)), ()).tolist() == [7, 2, 1, 0]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzipped"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "starts with 0x;"),
        (b"<html>not found</html>", "starts with 0x3c68746d"),
        (bytes([0, 0, 13, 3]) + IMAGES[4:], "starts with 0x00000d03"),  # floats
        (LABELS, "starts with 0x00000801"),  # labels in place of images
        (IMAGES[:10], "within its header, after 10 bytes"),
        (IMAGES[:-1], "should hold 12 bytes .* only 11"),
        (IMAGES + b"x", "should hold 12 bytes .* holds more"),
        (IMAGES[:7] + b"\x03" + IMAGES[8:], "should hold 18 bytes .* only 12"),
        (IMAGES[:4] + bytes(4) + IMAGES[8:16], "0 items"),
        (IMAGES[:8] + b"\xff\xff\xff\xff" + IMAGES[12:], r"shape \(4294967295, 3\)"),
        (IMAGES[:4] + b"\xff\xff\xff\xff" + IMAGES[8:], "4294967295 items"),
    ],
)
def test_refuses_what_is_not_the_file_it_claims_to_be(tmp_path, pack, content, words):
    with pytest.raises(ValueError, match=words):
        read_idx(written(tmp_path, pack(content)), (2, 3))


def test_takes_no_memory_for_what_a_header_merely_claims(tmp_path, monkeypatch):
    asked = []
    lying = bytes([0, 0, 8, 1]) + LARGEST_COUNT.to_bytes(4, "big") + b"abc"
    monkeypatch.setattr("lightning_compress.recipes.idx.CHUNK_BYTES", 16)
    monkeypatch.setattr(torch, "frombuffer", lambda data, **_: asked.append(len(data)))
    with pytest.raises(ValueError, match="should hold 1,000,000 bytes .* only 3"):
        read_idx(written(tmp_path, lying), ())
    assert asked == []


def test_refuses_damaged_gzip(tmp_path):
    packed = gzip.compress(IMAGES)
    for damaged in (packed[:-9], packed[:12] + bytes([packed[12] ^ 0xFF]) + packed[13:], packed[:2] + b"\x00" * 20):
        with pytest.raises(ValueError, match="damaged gzip file"):
            read_idx(written(tmp_path, damaged), (2, 3))
