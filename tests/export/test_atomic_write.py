"""Files that appear whole, or not at all."""

import pytest

from lightning_compress.export.atomic_write import replace_on_success


def test_a_file_takes_its_place_when_it_is_complete(tmp_path):
    (tmp_path / "file").write_text("before")
    with replace_on_success(tmp_path / "file") as part:
        assert part.parent == tmp_path
        part.write_text("after")
        assert (tmp_path / "file").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "after"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_all_is_as_before(tmp_path, error):
    (tmp_path / "file").write_text("before")

    def write():
        with replace_on_success(tmp_path / "file") as part:
            part.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def test_the_error_of_a_writer_that_wrote_nothing_is_its_own(tmp_path):
    def write():
        with replace_on_success(tmp_path / "file"):
            raise ValueError("too early")

    with pytest.raises(ValueError, match="too early"):
        write()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere to write file into"),
        replace_on_success(tmp_path / "nowhere" / "file"),
    ):
        pass
