"""Image classification sets of TensorFlow Datasets, prepared as ArrayRecord: random access, without TensorFlow.

`path` is a prepared folder (`.../imagenet2012/5.1.0`, or `.../imagenet2012` for its newest version), or a name such
as `imagenet2012`, `cifar10:3.0.2` or `set/config`, looked up in $TFDS_DATA_DIR or ~/tensorflow_datasets.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from fastvim_jax.data.fingerprint import file_stamp
from fastvim_jax.data.records import DecodeError, Record
from fastvim_jax.data.sources.class_lists import read_class_list
from fastvim_jax.errors import UserError, counted, suggest

_VERSION = re.compile(r"\d+\.\d+\.\d+")


class TfdsSource:
    """One split. Images are handed on as the encoded bytes that the set stores."""

    def __init__(
        self, path: str, split: str, *, class_list: Path | None = None, any_label: bool = False
    ) -> None:
        self._folder = str(_find(path))
        self._split = split
        self._any_label = any_label
        self._open()
        self.class_names: tuple[str, ...]
        if class_list:
            self.class_names = read_class_list(class_list).names
        else:
            self.class_names = tuple(self._label_names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        # A negative number or one past the end would silently read another record.
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = self._records[index]
        name = f"{self._folder} {self._split}[{index}]"
        label = int(record[self._label])
        if not (self._any_label or 0 <= label < len(self.class_names)):
            raise DecodeError(
                f"{name}: the label {label} is outside the {counted(len(self.class_names), 'class', 'classes')}."
            )
        return Record(record[self._image], label, name)

    def stamp(self, index: int) -> str:
        """Return what changes with a record: any file of the set (`fingerprint.Stamped`)."""
        return f"{self._stamp} {self._split}[{index}]"

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_folder", "_split", "_any_label", "class_names")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        tfds = _import()
        builder = tfds.builder_from_directory(self._folder)
        info = builder.info
        if info.file_format.value not in ("array_record", "parquet"):
            raise UserError(_as_array_record(info, self._folder))
        if self._split not in info.splits:
            splits = list(info.splits)
            raise UserError(
                f"{self._folder} has no split {self._split!r}; splits found there: {', '.join(splits)}."
                + suggest(self._split, splits)
            )
        self._image, self._label = _image_and_label(info, tfds)
        files = sorted(file for file in Path(self._folder).iterdir() if file.is_file())
        self._stamp = "; ".join(f"{file_stamp(file)} {file.name}" for file in files)
        self._label_names = info.features[self._label].names
        decoders = {self._image: tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(self._split, decoders=decoders)


def tfds_splits(path: str) -> list[str]:
    """List the splits of a prepared set; `path` as in the module."""
    folder, tfds = _find(path), _import()
    try:
        return sorted(tfds.builder_from_directory(str(folder)).info.splits)
    except Exception as error:  # Damaged JSON raises almost anything.
        raise UserError(
            f"{str(folder)!r} cannot be read as a prepared TFDS set ({type(error).__name__}: {error})."
        ) from error


def _import() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            f"The source tfds needs the package tensorflow-datasets ({error}): "
            "pip install 'fastvim-jax[data]'. TensorFlow itself is not needed."
        ) from None
    return tensorflow_datasets


def _find(path: str) -> Path:
    """Find the folder of one version, which holds `dataset_info.json`."""
    base = Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")
    name, _, version = path.partition(":")
    folder = Path(path)
    if not folder.is_dir():
        folder = base.expanduser() / name / version
    if (folder / "dataset_info.json").is_file():
        return folder
    versions = [f.parent for f in folder.glob("*/dataset_info.json")] if folder.is_dir() else []
    if not versions and folder.is_dir():
        # One level further down, where the set has configs.
        versions = [f.parent for f in folder.glob("*/*/dataset_info.json")]
        configs = sorted({v.parent.name for v in versions})
        if len(configs) > 1:
            raise UserError(
                f"{folder} holds several configs: {', '.join(configs)}. Add one to data.path."
            )
    if not versions:
        raise UserError(
            f"No prepared TFDS set {path!r}: neither a folder with dataset_info.json, nor a name found in {base}. "
            f"Prepare it with\n  {_prepare_command(name, str(base))}"
        )
    return max(versions, key=lambda v: [int(n) for n in _VERSION.findall(v.name + ".0.0.0")[0].split(".")])  # fmt: skip


def _prepare_command(name: str, data_dir: str) -> str:
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}, data_dir={data_dir!r}, file_format='array_record').download_and_prepare()\""
    )


def _as_array_record(info: Any, folder: str) -> str:
    return (
        f"{folder} was prepared as {info.file_format.value}, which has no random access. Prepare it as ArrayRecord, "
        "in another folder, and name that one:\n  "
        + _prepare_command(info.full_name.rpartition("/")[0], f"{folder}_array_record")
    )


def _image_and_label(info: Any, tfds: Any) -> tuple[str, str]:
    """Return the names of the image and the label feature: the supervised pair, or the only ones of their kinds."""
    features = dict(info.features)
    found = tuple(
        [name for name, feature in features.items() if isinstance(feature, kind)]
        for kind in (tfds.features.Image, tfds.features.ClassLabel)
    )
    pair: tuple[Any, ...] = info.supervised_keys or ()
    if len(pair) == 2 and pair[0] in found[0] and pair[1] in found[1]:
        return pair[0], pair[1]
    if len(found[0]) == len(found[1]) == 1:
        return found[0][0], found[1][0]
    raise UserError(
        f"{info.full_name} is no image classification set: it needs one image and one class label, "
        f"and has the features {', '.join(features)}."
    )
