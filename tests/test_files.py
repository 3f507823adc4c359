"""Files that are written whole or not at all."""

import os

import pytest

from lightning_acu.files import require_writable, write_whole


def test_a_file_is_written_and_an_old_one_replaced(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        write_whole(str(path), lambda file, text=text: file.write_text(text))
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["a.txt"]


def test_writers_see_the_same_name(tmp_path):
    """Many choose the format by it, or name files that belong to it."""
    names = []
    write_whole(tmp_path / "a.b.gif", lambda file: (names.append(file.name), file.touch()))
    assert names == ["a.b.gif"]


def test_it_may_be_read_by_whom_any_new_file_may_be_read(tmp_path):
    (tmp_path / "usual").touch()
    write_whole(tmp_path / "ours", lambda file: file.touch())
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, old, error):
    def write(file):
        file.write_text("half")
        raise error

    path = tmp_path / "a.txt"
    if old:
        path.write_text(old)
    with pytest.raises(type(error)):
        write_whole(path, write)
    assert os.listdir(tmp_path) == (["a.txt"] if old else [])
    assert not old or path.read_text() == old


def test_a_link_at_its_place_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a.txt").symlink_to(tmp_path / "victim")
    write_whole(tmp_path / "a.txt", lambda file: file.write_text("ours"))
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "a.txt").read_text() == "ours"
    assert not (tmp_path / "a.txt").is_symlink()


def test_a_folder_is_made_and_left_empty(tmp_path):
    require_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        require_writable(tmp_path / "file" / "folder")
