"""Find out which kind of data set lies in a folder, and which splits it has."""

from __future__ import annotations

from fastvim_jax.data.multichannel import find_channel_files
from fastvim_jax.data.sources import data_folder, expand_path
from fastvim_jax.data.sources.channel_files import split_pattern
from fastvim_jax.data.sources.hugging_face import parquet_splits
from fastvim_jax.data.sources.image_folder import WHOLE, folders_in, has_no_splits
from fastvim_jax.data.sources.jump_cp import SHARES
from fastvim_jax.data.sources.manifest import SOURCES_BY_FORMAT, prepared_splits
from fastvim_jax.data.sources.plate_index import INDEX, LOAD_DATA
from fastvim_jax.data.sources.tfds import tfds_splits
from fastvim_jax.data.sources.webdataset import shard_splits
from fastvim_jax.errors import UserError

# Files by which a layout is recognised. The first layout that matches counts, because later patterns match more.
_LAYOUTS = {
    "tfds": ("dataset_info.json", "*/dataset_info.json", "*/*/dataset_info.json"),
    "hugging_face": ("*.parquet", "*/*.parquet"),
    "webdataset": ("*.tar",),
    "packed_npz": ("*.npz",),
    "image_folder": ("*/*/*",),
}


def guess_source(path: str) -> str:
    """Guess the kind of data set that lies in a folder.

    `digits` needs no folder: for it, return "digits". A path with `{channel}` in it is a naming pattern of
    channel_files, and a table's file or URL is the index of a plate.

    Raises:
        UserError: the folder does not exist, or has no known layout.
    """
    if path == "digits":
        return path
    if "{channel}" in path:
        return "channel_files"
    root = expand_path(path)
    if path.endswith(LOAD_DATA) and ("://" in path or root.is_file()):
        return "jump_cp"
    if not root.is_dir():
        raise UserError(f"The data folder {str(root)!r} does not exist.")
    for name in SOURCES_BY_FORMAT.values():
        if prepared_splits(root, name):
            return name
    if any((root / name).is_file() for name in INDEX):
        return "jump_cp"
    for name, patterns in _LAYOUTS.items():
        if any(next(root.glob(pattern), None) is not None for pattern in patterns):
            return name
    if has_no_splits(root):
        return "image_folder"
    raise UserError(
        f"{str(root)!r} is of no known layout; expected one folder per split with one folder per class in it "
        "(train/cat/1.jpg), one folder per class (cat/1.jpg), or shards (*.tar, *.parquet, *.npz, *.array_record with "
        "their manifest). For images with masks or a COCO file in other places, `fastvim data check-masks` and "
        "`check-coco` take patterns."
    )


def list_splits(name: str, path: str) -> list[str]:
    """List the splits that `open_source(name, ..., path=path)` would find, in alphabetical order."""
    if name == "digits":
        return ["test", "train"]
    if name == "jump_cp":
        return list(SHARES)
    if name == "channel_files":
        return _pattern_splits(path)
    root = expand_path(path)
    if name == "tfds":
        return tfds_splits(str(root))
    if not root.is_dir():
        raise UserError(f"The data folder {str(root)!r} does not exist.")
    if name in SOURCES_BY_FORMAT.values():
        return prepared_splits(root, name)
    if name == "webdataset":
        return shard_splits(root)
    if name == "packed_npz":
        return sorted(file.stem for file in root.glob("*.npz"))
    if name == "hugging_face" and parquet_splits(root):
        return sorted(parquet_splits(root))
    if name == "image_folder" and has_no_splits(root):
        return [WHOLE]
    return folders_in(root)


def _pattern_splits(path: str) -> list[str]:
    pattern = split_pattern(path)[1]
    if "{split}" not in pattern:
        return ["all"]
    return sorted({dict(key)["split"] for key in find_channel_files(data_folder(path), pattern)})
