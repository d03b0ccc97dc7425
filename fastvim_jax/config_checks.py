"""Check the values of a config against its annotations: every field states its type and range, pydantic checks them.

A config is a frozen dataclass. It says what a field may hold where the field stands, and calls `check_fields` first:

    @dataclass(frozen=True, kw_only=True)
    class OptimizerConfig:
        learning_rate: PositiveFloat = 1e-3
        schedule: Literal["constant", "cosine"] = "cosine"
        layer_decay: Annotated[float, Interval(gt=0, le=1)] | None = None

        def __post_init__(self) -> None:
            check_fields(self, "optimizer.")
            ...  # then only what concerns several fields at once

Types are strict: "4" is no number, 2.5 no integer, 1 no flag. Numbers are finite, and integers fit into 32 bits unless
the field says otherwise. Accepted and converted: an integer for a float, a NumPy scalar for a number, a list for a
tuple. A field that holds another config is only asked for its class, since that config has checked itself.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval
from pydantic import ConfigDict, InstanceOf, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from fastvim_jax.errors import UserError, suggest

MOST = 2**31 - 1
PositiveInt = Annotated[int, Interval(ge=1, le=MOST)]
NonNegativeInt = Annotated[int, Interval(ge=0, le=MOST)]
PositiveFloat = Annotated[float, Interval(gt=0)]
NonNegativeFloat = Annotated[float, Interval(ge=0)]
Probability = Annotated[float, Interval(ge=0, le=1)]
Rate = Annotated[float, Interval(ge=0, lt=1)]

_WORDS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be True or False",
    "string_type": "must be a string",
    "tuple_type": "must be a tuple",
    "too_long": "must have at most {max_length} values",
    "missing": "has too few values",
    "is_instance_of": "must be a {class}",
}


def check_fields(config: Any, where: str = "") -> None:
    """Check every field of a frozen dataclass against its annotation, and store the values as the annotated types.

    Args:
        config: the dataclass, from its `__post_init__`.
        where: put in front of the fields' names in messages, for example "optimizer.".

    Raises:
        UserError: naming every bad field with its value and what it must be.
    """
    cls: Any = type(config)
    validator, hints = _validator(cls)
    given = {name: _plain(getattr(config, name)) for name in hints}
    try:
        checked = validator.validate_python(given)
    except ValidationError as error:
        problems = _problems(error, hints, given, where)
        raise UserError("\n".join(problems)) from None
    for name, value in checked.items():
        object.__setattr__(config, name, value)


@functools.cache
def _validator(cls: type) -> tuple[TypeAdapter, dict[str, Any]]:
    every = typing.get_type_hints(cls, include_extras=True)
    hints = {field.name: _shallow(every[field.name]) for field in dataclasses.fields(cls)}
    make: Any = TypedDict  # with fields known at run time only
    fields = make(cls.__name__, hints)
    rules = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    fields.__pydantic_config__ = rules
    return TypeAdapter(fields), hints


def _shallow(hint: Any) -> Any:
    """Return an annotation that checks dataclasses by their class alone, because they have checked their own fields."""
    if dataclasses.is_dataclass(hint):
        return Annotated[hint, InstanceOf()]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, map(_shallow, typing.get_args(hint)))
    return hint


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    return value


def _problems(
    error: ValidationError, hints: dict[str, Any], given: dict[str, Any], where: str
) -> list[str]:
    """Write one line for each bad field. Of a union, the line joins what each member says."""
    found: dict[str, list[str]] = {}
    errors = error.errors(include_url=False)
    # In a union, the error of a member that has the value's type says more than "must be a number" of another member.
    ranged = {each["loc"][0] for each in errors if not each["type"].endswith("_type")}
    for each in errors:
        if each["type"].endswith("_type") and each["loc"][0] in ranged:
            continue
        name, context = str(each["loc"][0]), each.get("ctx", {})
        if each["type"] == "literal_error":
            choices = _choices(hints[name])
            words = f"is not one of {', '.join(map(str, choices))}"
            words += f".{suggest(str(given[name]), map(str, choices))}".rstrip(".")
        else:
            words = _WORDS.get(each["type"], each["msg"]).format(**context)
        if words not in found.setdefault(name, []):
            found[name].append(words)
    lines = []
    for name, reasons in found.items():
        line = f"{where}{name}={given[name]!r} " + ", or ".join(reasons)
        if type(None) in typing.get_args(hints[name]) and not line.endswith("?"):
            line += ", or None"
        lines.append(line if line.endswith("?") else line + ".")
    return lines


def _choices(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [choice for part in typing.get_args(hint) for choice in _choices(part)]
