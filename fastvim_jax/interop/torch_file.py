"""Read the arrays of a PyTorch checkpoint without PyTorch, and without running anything that the file holds.

A `.pth` or `.ckpt` file of PyTorch 1.6 or newer is a zip archive: `data.pkl` is a pickle that describes the tensors,
and `data/<key>` are their bytes. A pickle names functions that are called when it is read, so a hostile pickle can run
any program. Here the few functions that rebuild tensors are replaced by functions of this module. Whatever else a
pickle names (optimizers, `argparse.Namespace`, hooks) becomes an inert `Unread` and is listed, never imported.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fastvim_jax.errors import UserError, counted

_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# In bytes. The pickle only describes the tensors, which takes 1 MB for FastVim-H.
_LARGEST_PICKLE = 32 << 20
_MOST_REPEATED = 1 << 22
"""Items of tuples that a pickle uses again, those of tuples in them included, each time that it does."""


@dataclass(frozen=True)
class _Storage:
    """Hold the elements of one storage, which is a member of the archive."""

    values: np.ndarray


class Unread:
    """Stand for an object of a class that is not read, and drop whatever a pickle does to it."""

    name = "?"

    def __init__(self, *args: Any, **fields: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Drop an item of a list."""

    def extend(self, items: Any) -> None:
        """Drop items of a list."""

    def add(self, item: Any) -> None:
        """Drop an item of a set."""

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"


def read_torch_file(path: Path | str) -> dict[Any, Any]:
    """Read a checkpoint that `torch.save` wrote.

    Args:
        path: a `.pth`, `.pt` or `.ckpt` file.

    Returns:
        The saved object, nested as it was: dictionaries, lists, numbers and strings as they are, tensors as NumPy
        arrays (bfloat16 as `ml_dtypes.bfloat16`), everything else as `Unread`.

    Raises:
        UserError: the file is missing, damaged, older than PyTorch 1.6, or holds no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}.")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is not in the zip format of torch.save (PyTorch 1.6 or newer): it is damaged, of another kind, or "
            "older. Load it where it is trusted and save it again, or convert it to safetensors."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive)
    except UserError:
        raise
    except Exception as error:  # A damaged pickle raises anything.
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _read(path: Path, archive: zipfile.ZipFile) -> dict[Any, Any]:
    members = {info.filename: info for info in archive.infolist()}
    described = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(described) != 1:
        raise UserError(
            f"{path} is no PyTorch checkpoint: it has {len(described)} members data.pkl."
        )
    prefix = described[0].removesuffix("data.pkl")
    if members[described[0]].file_size > _LARGEST_PICKLE:
        raise UserError(f"{path} describes its tensors in more than {_LARGEST_PICKLE:,} bytes.")
    order = archive.read(prefix + "byteorder") if prefix + "byteorder" in members else b"little"
    if order != b"little":
        raise UserError(
            f"{path} holds big-endian numbers: save it again on a little-endian machine."
        )
    pickled = archive.read(described[0])
    _check_tuples(pickled)
    saved = _Unpickler(io.BytesIO(pickled), archive, prefix).load()
    if not isinstance(saved, Mapping):
        raise UserError(f"{path} holds {described_value(saved)}, no dictionary of tensors.")
    return dict(saved)


def _check_tuples(pickled: bytes) -> None:
    """Refuse tuples of tuples, each of the one before, twice. A few bytes describe one whose hash never ends.

    Raises:
        UserError: there are such tuples.
    """
    stack: list[int | None] = []  # items of a tuple, 1 of any other object, None of a mark
    memo: dict[int, int | None] = {}
    repeated = 0
    for operation, argument, _ in pickletools.genops(pickled):
        name = operation.name
        if name == "MARK":
            stack.append(None)
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            size = memo[int(argument or 0)] or 1
            stack.append(size)
            repeated += size - 1
            if repeated > _MOST_REPEATED:
                raise UserError("its tuples repeat one another without end.")
        else:
            items = _popped(stack, operation.stack_before)
            tuple_like = name.startswith("TUPLE") or name == "FROZENSET"
            size = 1 + sum(items) if tuple_like else 1
            stack += [size] * len(operation.stack_after)


def _popped(stack: list[int | None], before: list[pickletools.StackObject]) -> list[int]:
    """Take from the stack what an operation takes: so many objects, and all above the last mark if it wants a mark."""
    items: list[int] = []
    for wanted in reversed(before):
        if wanted is pickletools.stackslice:
            continue  # These objects lie above the mark, which comes next.
        if wanted is pickletools.markobject:
            while (top := stack.pop()) is not None:
                items.append(top)
        else:
            items.append(stack.pop() or 1)
    return items


class _Unpickler(pickle.Unpickler):
    """Read a pickle without importing anything that it names."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, prefix: str) -> None:
        super().__init__(file, encoding="utf-8")
        self._archive, self._prefix = archive, prefix
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return this module's replacement for a function that rebuilds tensors, `Unread` for any other name."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *rest: data
        return type("Unread", (Unread,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that a tensor refers to. Each storage is read once."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise UserError(
                f"a tensor has an unknown kind of storage: {getattr(dtype, 'name', type(dtype).__name__)}."
            )
        key = str(key)
        if key not in self._storages:
            member = self._archive.getinfo(f"{self._prefix}data/{key}")
            if member.compress_type != zipfile.ZIP_STORED:
                raise UserError("its tensors are compressed, which torch.save never does.")
            if member.file_size != count * dtype.itemsize:
                raise UserError(
                    f"the storage {key} has {member.file_size:,} bytes, but {count * dtype.itemsize:,} are described."
                )
            self._storages[key] = _Storage(np.frombuffer(self._archive.read(member), dtype))
        return self._storages[key]


def described_value(value: Any) -> str:
    """Describe a value of a checkpoint in a few words.

    The text of a collection is not made, because a hostile file of a few bytes describes one of 2**60 items.
    """
    if isinstance(value, np.ndarray):
        return f"array of shape {value.shape}"
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return f"{type(value).__name__} of {counted(len(value), 'entry', 'entries')}"
    if isinstance(value, type) and issubclass(value, Unread):
        value = value()
    return repr(value)[:60]


def _tensor(storage: Any, offset: int, shape: Any, strides: Any, *rest: Any) -> np.ndarray:
    """Rebuild a tensor: a strided view of its storage, checked against the storage's end, and copied."""
    shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
    flags = rest[2] if len(rest) > 2 else None  # after requires_grad and hooks
    if isinstance(flags, Mapping) and any(flags.values()):
        raise UserError(f"a tensor is stored with {', '.join(map(str, flags))} to be applied.")
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise UserError("a tensor has no storage, or not as many strides as axes.")
    if offset < 0 or min(shape + strides, default=0) < 0:
        raise UserError(
            f"a tensor has impossible numbers: shape {shape}, strides {strides}, offset {offset}."
        )
    if math.prod(shape) > storage.values.size:
        raise UserError(f"a tensor of shape {shape} is larger than its storage.")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.values.size:
        raise UserError(f"a tensor of shape {shape} reaches past the end of its storage.")
    itemsize = storage.values.itemsize
    view = np.lib.stride_tricks.as_strided(
        storage.values[offset:], shape, [step * itemsize for step in strides], writeable=False
    )
    return np.array(view)
