"""Convert frozen dataclasses to JSON and back, exactly: nothing is dropped, nothing guessed.

A dataclass is written with its class under `"class"`, so that unions of config classes can be told apart;
tuples become lists and return as tuples. Reading is strict: an unknown field, a missing one without a default
or a value of another type is an error that names the field.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from fastvim_jax.errors import UserError, counted, suggest
from fastvim_jax.json_text import parse_json

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """Convert the dataclass to JSON-able values."""
    fields = {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return {"class": type(config).__name__, **fields}


def to_json(config: Any) -> str:
    """Write the dataclass as indented JSON text."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(cls: type[Config], text: str) -> Config:
    """Read what `to_json` wrote.

    Raises:
        UserError: the text is not JSON, or does not describe `cls`; the message names the field.
    """
    try:
        values = parse_json(text)
    except ValueError as error:
        raise UserError(f"the config is not valid JSON: {error}") from error
    return from_dict(cls, values)


def from_dict(cls: type[Config], values: Any, where: str = "") -> Config:
    """Read what `to_dict` returned. `where` is the name of the field that held the values, for messages.

    Raises:
        UserError: a field is unknown, missing or of another type; the message names it.
    """
    label = where or cls.__name__
    if not isinstance(values, Mapping):
        raise UserError(f"{label}: expected the fields of {cls.__name__}, got {values!r}")
    found = values.get("class", cls.__name__)
    if found != cls.__name__:
        raise UserError(f"{label}: expected a {cls.__name__}, got a {found}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    read: dict[str, Any] = {}
    for name, value in values.items():
        if name == "class":
            continue
        if name not in fields:
            hint = suggest(name, fields)
            raise UserError(f"{label}: {cls.__name__} has no field {name!r}.{hint}")
        read[name] = _typed(hints[name], value, f"{where}.{name}" if where else name)
    for name, field in fields.items():
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if no_default and name not in read:
            raise UserError(f"{label}: the field {name!r} of {cls.__name__} is missing")
    return cls(**read)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a config cannot hold {type(value).__name__}: {value!r}")


def _typed(hint: Any, value: Any, where: str) -> Any:
    """Convert `value`, as JSON gave it, to the annotated type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _typed(args[0], value, where)
    if origin in (typing.Union, types.UnionType):
        return _typed_union(args, value, where)
    if origin is typing.Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
        choices = ", ".join(map(repr, args))
        raise UserError(f"{where}: {value!r} is not one of {choices}.{suggest(value, args)}")
    if origin is tuple:
        return _typed_tuple(args, value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or type(value) is hint or (hint is None and value is None):
        return value
    if hint is type(None) and value is None:
        return None
    raise UserError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def _typed_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: expected a list, got {value!r}")
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise UserError(f"{where}: expected {counted(len(args), 'value')}, got {len(value)}")
    return tuple(
        _typed(arg, item, f"{where}[{i}]")
        for i, (arg, item) in enumerate(zip(args, value, strict=True))
    )


def _typed_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    """Choose the union's member: the dataclass that `value` names, the exact type, or the first one that accepts it."""
    if isinstance(value, Mapping) and "class" in value:
        classes: list[Any] = [arg for arg in args if dataclasses.is_dataclass(arg)]
        by_name = {each.__name__: each for each in classes}
        name = value["class"]
        if name not in by_name:
            raise UserError(
                f"{where}: {name!r} is not one of {', '.join(by_name)}.{suggest(name, by_name)}"
            )
        return from_dict(by_name[name], value, where)
    if type(value) in args:
        return value
    errors = []
    for arg in args:
        try:
            return _typed(arg, value, where)
        except UserError as error:
            errors.append(str(error))
    raise UserError("; or ".join(dict.fromkeys(errors)))
