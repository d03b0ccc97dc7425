"""`whole_file`: a file is replaced once all of the new one is written, or stays as it was."""

import errno

import pytest

from fastvim_jax.errors import UserError
from fastvim_jax.whole_file import whole_file


def test_the_new_file_takes_the_place_of_the_old_one_at_the_end(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("raised", "seen", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "No space left"),
        (RuntimeError("the writer stopped"), UserError, "the writer stopped"),
        (ValueError("a fault of the program"), ValueError, "a fault of the program"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_an_earlier_file_stays_if_the_new_one_fails(tmp_path, raised, seen, said):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(seen, match=said), whole_file(path, RuntimeError) as partial:
        partial.write_text("half")
        raise raised
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "a"
    with (
        pytest.raises(UserError, match="a cannot be written: Not a directory"),
        whole_file(path) as partial,
    ):
        partial.write_text("new")
