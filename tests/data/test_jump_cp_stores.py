"""Files of a plate in object stores: asked for again, kept for one user, and read anew once they changed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fastvim_jax.data import DecodeError, open_source
from fastvim_jax.data.multichannel import read_channels
from fastvim_jax.data.prepare.shards import prepare
from fastvim_jax.data.sources import object_store, plate_images
from fastvim_jax.data.sources.jump_cp import JumpCpSource
from fastvim_jax.data.sources.plate_files import RemoteFiles
from fastvim_jax.errors import UserError


def test_an_object_store_is_asked_again_and_its_answer_kept(
    tables: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fsspec = pytest.importorskip("fsspec")
    store, asked = fsspec.filesystem("memory"), []
    (tables / "load_data.csv").write_text("Metadata_Well,URL_OrigDNA\nA02,memory://plate/dna.npy\n")
    np.save(tmp_path / "dna.npy", np.full((4, 4), 257 * 9, np.uint16))
    store.pipe("/plate/dna.npy", (tmp_path / "dna.npy").read_bytes())
    opened = fsspec.open

    def unsteady(url: str, mode: str) -> object:
        asked.append(url)
        if len(asked) < 3:
            raise ConnectionError("try again")
        return opened(url, mode)

    monkeypatch.setattr(fsspec, "open", unsteady)
    monkeypatch.setattr(object_store.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(plate_images.tempfile, "gettempdir", lambda: str(tmp_path))
    source = open_source("jump_cp", "all", path=str(tables))
    for _ in range(2):
        assert (source[0].image == 9).all()
    assert len(asked) == 3


def test_files_named_by_paths_lie_below_the_url_of_their_table(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Find relative paths, other machines' paths by name and folder, and say which files are not there."""
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    monkeypatch.setattr(plate_images.tempfile, "gettempdir", lambda: str(tmp_path))
    url = "memory://shelf/plates/load_data.csv"
    header = "Metadata_Well,PathName_OrigDNA,FileName_OrigDNA,FileName_IllumDNA"
    for value, plate in enumerate(("P1", "P2"), 1):
        np.save(tmp_path / "dna.npy", np.full((4, 4), 257 * value, np.uint16))
        store.pipe(f"/shelf/plates/{plate}/Images/dna.npy", (tmp_path / "dna.npy").read_bytes())

    def index(*rows: str) -> JumpCpSource:
        store.pipe("/shelf/plates/load_data.csv", "\n".join((header, *rows)).encode())
        return JumpCpSource(url, "all", tables=tables)

    elsewhere = "memory://shelf/plates/P2/Images"
    source = index(
        "A02,P1/Images,dna.npy,", "A02,/other/P2/Images,dna.npy,", f"A02,{elsewhere},dna.npy,", "A02,P1,no.npy,"
    )  # fmt: skip
    assert [int(source[i].image[0, 0, 0]) for i in range(3)] == [1, 2, 2]
    with pytest.raises(DecodeError, match="the channel DNA is missing"):
        source[3]
    assert any("pixels are not corrected" in n for n in index("A02,P1/Images,dna.npy,i.npy").notes)
    with pytest.raises(UserError, match="lies in several folders below 'memory://shelf/plates'"):
        index("A02,/other,dna.npy,")
    with pytest.raises(UserError, match="of which none lies below 'memory://shelf/plates'"):
        index("A02,P1,no.npy,", "A02,,,")
    monkeypatch.setattr(type(store), "find", lambda *_: (_ for _ in ()).throw(PermissionError()))
    source = index("A02,P1/Images,dna.npy,", "A02,/other,no.npy,")  # taken to lie there
    assert int(source[0].image[0, 0, 0]) == 1
    with pytest.raises(DecodeError, match=r"memory://shelf/plates/no\.npy"):
        source[1]
    web = RemoteFiles("https://there.org/a/load_data.csv?key=b/c")
    row = {"PathName_OrigDNA": "Images 1", "FileName_OrigDNA": "dna.tif"}
    assert web.find(row, "Orig", "DNA") == "https://there.org/a/Images%201/dna.tif"


def test_a_changed_file_of_an_object_store_is_read_again(
    tables: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Ask once a process whether a file changed, and use the kept one where the store does not answer."""
    fsspec = pytest.importorskip("fsspec")
    store, asked = fsspec.filesystem("memory"), []
    (tables / "load_data.csv").write_text("Metadata_Well,URL_OrigDNA\nA02,memory://new/dna.npy\n")
    monkeypatch.setattr(plate_images.tempfile, "gettempdir", lambda: str(tmp_path))
    info = type(store).info

    def counted(self: object, path: str, **options: object) -> object:
        asked.append(path)
        return info(self, path, **options)

    def pixel() -> int:
        """Read as a new process does."""
        return int(open_source("jump_cp", "all", path=str(tables))[0].image[0, 0, 0])

    def put(value: int) -> None:
        np.save(tmp_path / "dna.npy", np.full((4, 4), 257 * value, np.uint16))
        store.pipe("/new/dna.npy", (tmp_path / "dna.npy").read_bytes())

    monkeypatch.setattr(type(store), "info", counted)
    opened, fetched = fsspec.open, []
    monkeypatch.setattr(fsspec, "open", lambda url, mode: fetched.append(url) or opened(url, mode))
    put(1)
    assert pixel() == 1 and pixel() == 1 and len(fetched) == 1
    put(2)  # of the same size
    asked.clear()
    source = open_source("jump_cp", "all", path=str(tables))
    assert {int(source[0].image[0, 0, 0]) for _ in range(3)} == {2}
    assert len(asked) == 1
    (kept,) = tmp_path.rglob("version-*")  # The old file is gone.
    kept.unlink()
    assert int(source[0].image[0, 0, 0]) == 2

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(type(store), "info", offline)
    monkeypatch.setattr(fsspec, "open", offline)
    assert pixel() == 2
    assert "dna.npy: whether it changed is not known (no network)" in caplog.text


def test_shards_of_changed_remote_files_are_written_again(
    tables: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Keep a shard while the store says that its files are the same, and when the store does not answer."""
    fsspec = pytest.importorskip("fsspec")
    store, folder = fsspec.filesystem("memory"), tmp_path_factory.mktemp("kept")
    monkeypatch.setattr(plate_images.tempfile, "gettempdir", lambda: str(folder))
    monkeypatch.setattr(object_store.time, "sleep", lambda seconds: None)
    (tables / "load_data.csv").write_text(
        "Metadata_Well,URL_OrigER,URL_OrigDNA\nA02,memory://shard/er.npy,memory://shard/dna.npy\n"
    )

    def put(name: str, value: int) -> None:
        np.save(folder / "pixels.npy", np.full((4, 4), 257 * value, np.uint16))
        store.pipe(f"/shard/{name}.npy", (folder / "pixels.npy").read_bytes())

    def prepared() -> tuple[int, int, list[int]]:
        done = prepare(open_source("jump_cp", "all", path=str(tables)), folder / "shards", "all")
        shards = open_source("array_record", "all", path=str(folder / "shards"))
        pixels = read_channels(shards[0].image, "a").pixels[0, 0]
        return done.kept, done.changed, pixels.tolist()

    put("er", 1), put("dna", 2)
    assert [prepared(), prepared()] == [(0, 0, [1, 2]), (1, 0, [1, 2])]
    put("dna", 3)  # of the same size
    assert prepared() == (0, 1, [1, 3])

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "info", offline)
        with pytest.raises(UserError, match="no answer in 4 attempts"):
            prepared()
    assert prepared() == (1, 0, [1, 3])

    def silent(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(type(store), "info", silent)
    assert [prepared()[:2], prepared()[:2]] == [(0, 1), (1, 0)]


def test_kept_files_are_the_users_own(
    tables: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Keep files where no other user of the machine writes: one folder of all was closed to the second user."""
    store = pytest.importorskip("fsspec").filesystem("memory")
    monkeypatch.setattr(plate_images.tempfile, "gettempdir", lambda: str(tmp_path))
    (tables / "load_data.csv").write_text("Metadata_Well,URL_OrigDNA\nA02,memory://own/dna.npy\n")
    np.save(tmp_path / "dna.npy", np.zeros((4, 4), np.uint16))
    store.pipe("/own/dna.npy", (tmp_path / "dna.npy").read_bytes())
    assert open_source("jump_cp", "all", path=str(tables))[0].image.shape == (4, 4, 1)
    (own,) = tmp_path.glob("fastvim-jump-cp*")
    assert own.name.endswith(f"-{os.getuid()}") and own.stat().st_mode & 0o777 == 0o700
    other = os.getuid() + 1
    (tmp_path / f"fastvim-jump-cp-{other}").mkdir()
    monkeypatch.setattr(plate_images.os, "getuid", lambda: other)
    with pytest.raises(UserError, match="belongs to another user: name another folder .* TMPDIR"):
        open_source("jump_cp", "all", path=str(tables))[0]
