"""What a user names for prediction: files, folders, tar files, patterns and lists."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvim_jax.data import ClassificationData, DecodeError, load_image
from fastvim_jax.data.tar_members import read_image_file
from fastvim_jax.errors import UserError
from fastvim_jax.inference.image_files import find_images


def png(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def pack(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("away.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    return file


@pytest.fixture
def shards(tmp_path: Path, rng: np.random.Generator) -> dict[str, bytes]:
    """Write two shards; return what `find_images` should name, with the bytes."""
    expected = {}
    for shard in ("a.tar", "b.tar"):
        members = {"x/1.png": png(rng), "x/2.PNG": png(rng), "x/1.cls": b"3"}
        pack(tmp_path / shard, members)
        expected |= {f"{tmp_path}/{shard}/{n}": c for n, c in members.items() if n != "x/1.cls"}
    return expected


def test_a_tar_file_names_its_images_and_they_are_read_from_it(shards, tmp_path):
    assert find_images([f"{tmp_path}/*.tar"]) == list(shards)
    assert find_images([tmp_path / "b.tar"]) == list(shards)[2:]
    (tmp_path / "list.txt").write_text("\n".join(shards))
    assert find_images([f"@{tmp_path}/list.txt"]) == list(shards)
    config = ClassificationData(source="digits", image_size=8)
    for name, content in shards.items():
        assert read_image_file(name) == content
        (tmp_path / "same.png").write_bytes(content)
        assert np.array_equal(load_image(name, config), load_image(tmp_path / "same.png", config))


def test_patterns_and_lists_name_folders_too(tmp_path, rng):
    files = [tmp_path / "all" / name for name in ("1.png", "cat/2.jfif", "cat/deep/3.PNG")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(rng))
    (tmp_path / "all" / "none").mkdir()
    (tmp_path / "list.txt").write_text(f"{files[0]}\n{tmp_path}/all/cat\nmissing[1].png\n")
    expected = list(map(str, files))
    assert find_images([tmp_path / "all"]) == expected
    assert find_images([f"{tmp_path}/all/*"]) == expected
    assert sorted(find_images([f"{tmp_path}/all/**"])) == expected
    assert find_images([f"@{tmp_path}/list.txt"]) == [*expected, "missing[1].png"]
    with pytest.raises(UserError, match="holds no image file"):
        find_images([f"{tmp_path}/all/n*"])
    (tmp_path / "all" / "none" / "a.tar").touch()
    with pytest.raises(UserError, match=r"For the tar files in it write '.*/none/\*\.tar'"):
        find_images([f"{tmp_path}/all/none"])
    (tmp_path / "list.txt").write_text(f"\n{tmp_path}/all/none\n")
    with pytest.raises(UserError, match=r"list\.txt names no image file"):
        find_images([f"@{tmp_path}/list.txt"])


def test_linked_folders_are_listed_and_links_to_nothing_are_told(tmp_path, rng):
    folder = tmp_path / "photos"
    (folder / "cat").mkdir(parents=True)
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "2.png").write_bytes(png(rng))
    (folder / "cat" / "1.png").write_bytes(png(rng))
    (folder / "linked").symlink_to(tmp_path / "away")
    (folder / "circle").symlink_to(folder)
    (folder / "lost.png").symlink_to(tmp_path / "nothing.png")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "3.png").write_bytes(png(rng))
    names = ("cat/1.png", "linked/2.png", "lost.png")
    assert find_images([folder]) == [f"{folder}/{name}" for name in names]


def test_a_tar_file_that_changed_is_read_anew(shards, tmp_path, rng):
    name = next(iter(shards))
    assert read_image_file(name) == shards[name]
    content = png(rng)
    pack(tmp_path / "a.tar", {"x/0.png": png(rng), "x/1.png": content})
    assert read_image_file(name) == content


def test_what_cannot_be_read_of_a_tar_file_is_said(shards, tmp_path):
    with pytest.raises(DecodeError, match=r"a\.tar/none\.png: the tar file has no such member"):
        read_image_file(f"{tmp_path}/a.tar/none.png")
    with pytest.raises(DecodeError, match="no such member"):  # A link is no image.
        read_image_file(f"{tmp_path}/a.tar/away.png")
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"x/2.PNG") + 512 + 20])
    with pytest.raises(UserError, match=r"cut\.tar"):
        find_images([tmp_path / "cut.tar"])
    (tmp_path / "none.tar").write_bytes(b"this is no tar file" * 100)
    with pytest.raises(UserError, match="cannot be read as a tar file"):
        find_images([tmp_path / "none.tar"])
    pack(tmp_path / "empty.tar", {"readme.txt": b"nothing"})
    with pytest.raises(UserError, match="empty"):
        find_images([""])
    with pytest.raises(UserError, match="holds no image file"):
        find_images([tmp_path / "empty.tar"])
    with pytest.raises(DecodeError, match="No such file"):
        read_image_file(f"{tmp_path}/missing.tar/1.png")


def test_a_folder_whose_name_ends_in_tar_is_a_folder(tmp_path, rng):
    (tmp_path / "photos.tar").mkdir()
    (tmp_path / "photos.tar" / "1.png").write_bytes(png(rng))
    (name,) = find_images([tmp_path / "photos.tar"])
    assert read_image_file(name) == (tmp_path / "photos.tar" / "1.png").read_bytes()
