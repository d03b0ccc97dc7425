"""Impossible values are refused when the config is made, by the field's name."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from fastvim_jax.data import ClassificationData
from fastvim_jax.errors import UserError


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", "digitz"),
        ("channels", 2),
        ("crop", "random"),
        ("image_size", 0),
        ("image_size", (1, 2, 3)),
        ("batch_size", 0),
        ("batch_size", 2.5),
        ("eval_batch_size", 0),
        ("workers", -1),
        ("pad", -1),
        ("max_corrupt", -1),
        ("flip", 1.5),
        ("rand_augment", 11.0),
        ("rand_augment_std", -0.5),
        ("colour_jitter", -0.1),
        ("eval_crop", 0.0),
        ("crop_scale", (0.5, 0.1)),
        ("crop_aspect", (0.0, 1.0)),
        ("mean", (0.5,)),
        ("std", (0.5, 0.5, 0.0)),
        ("mean", (0.5, 0.5, float("nan"))),
        ("colour_jitter", float("inf")),
        ("rand_augment_std", float("nan")),
        ("crop_aspect", (1.0, float("inf"))),
        ("mixup", 1e30),
        ("batch_size", 2**63),
        ("batch_size", "8"),
        ("resident", 1),
        ("background", 256),
        ("mix_group", 0),
        ("std", (0.5, 0.5, 1e-300)),
    ],
)
def test_bad_values_name_their_field(field: str, value: Any) -> None:
    config = copy.copy(ClassificationData())
    # Set behind the constructor, whose annotations the test run checks before __post_init__ could.
    object.__setattr__(config, field, value)
    with pytest.raises(UserError, match=rf"data\.{field}"):
        config.__post_init__()


def test_a_folder_source_needs_its_folder() -> None:
    with pytest.raises(UserError, match=r"data.path is empty"):
        ClassificationData(source="image_folder")


def test_height_and_width() -> None:
    assert ClassificationData(image_size=32).height_width == (32, 32)
    assert ClassificationData(image_size=(32, 48)).height_width == (32, 48)


def test_json_and_back() -> None:
    from fastvim_jax import serialise

    config = ClassificationData(
        image_size=(8, 12), channels=1, mean=(0.5,), std=(0.25,), crop="pad_shift"
    )
    again = serialise.from_json(ClassificationData, serialise.to_json(config))
    assert again == config


@pytest.mark.parametrize("field", ["batch_size", "mix_group"])
@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_one_image_has_none_to_be_mixed_with(field: str, mixing: str) -> None:
    ClassificationData(source="digits", **{field: 1})
    with pytest.raises(UserError, match=f"data.{field} is 1, but must be more than 1, if mixup"):
        ClassificationData(source="digits", **{field: 1, mixing: 0.8})
