"""Every field of every config is refused by name where its value has another type or lies outside its range."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import pytest
from annotated_types import Interval

from fastvim_jax import UserError
from fastvim_jax.config_checks import NonNegativeInt, PositiveFloat, PositiveInt, check_fields
from fastvim_jax.models import VisionMambaConfig, ViTConfig
from fastvim_jax.precision import Precision
from fastvim_jax.training.experiments import list_experiments, load_experiment
from tests.support import checked


@dataclass(frozen=True)
class Inner:
    width: PositiveInt = 1


@dataclass(frozen=True)
class Other:
    width: PositiveInt = 2


@dataclass(frozen=True)
class Config:
    count: NonNegativeInt = 0
    rate: PositiveFloat = 1.0
    decay: Annotated[float, Interval(gt=0, le=1)] | None = None
    method: Literal["mean", "max"] | None = "mean"
    flag: bool = False
    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    places: tuple[int, ...] = ()
    inner: Inner | Other = dataclasses.field(default_factory=Inner)

    def __post_init__(self):
        check_fields(self, "part.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": "4"}, "part.count='4' must be an integer."),
        ({"count": 2.5}, "part.count=2.5 must be an integer."),
        ({"count": True}, "part.count=True must be an integer."),
        ({"count": -1}, "part.count=-1 must be at least 0."),
        ({"count": 2**64}, f"part.count={2**64} must be at most 2147483647."),
        ({"rate": math.nan}, "part.rate=nan must be a finite number."),
        ({"rate": math.inf}, "part.rate=inf must be a finite number."),
        ({"rate": 0}, "part.rate=0 must be greater than 0."),
        ({"rate": None}, "part.rate=None must be a number."),
        ({"decay": 1.5}, "part.decay=1.5 must be at most 1.0, or None."),
        ({"method": "men"}, "part.method='men' is not one of mean, max. Did you mean 'mean'?"),
        ({"flag": "false"}, "part.flag='false' must be True or False."),
        ({"flag": 1}, "part.flag=1 must be True or False."),
        ({"size": (1, 0)}, "part.size=(1, 0) must be at least 1."),
        ({"size": (1, 2, 3)}, "part.size=(1, 2, 3) must have at most 2 values."),
        ({"size": "12"}, "part.size='12' must be an integer, or must be a tuple."),
        ({"places": 3}, "part.places=3 must be a tuple."),
        ({"inner": 3}, "part.inner=3 must be a Inner, or must be a Other."),
    ],
)
def test_a_bad_value_is_named_with_what_it_must_be(changes, message):
    with pytest.raises(UserError) as caught:
        checked(Config(), **changes)
    assert str(caught.value).replace(".0.", ".").replace(".0,", ".0,") == message.replace(
        ".0.", "."
    )


def test_a_model_too_large_to_be_meant_is_refused():
    with pytest.raises(UserError, match=r"depth=100000 must be at most 1024"):
        VisionMambaConfig(depth=100_000)
    with pytest.raises(UserError, match=r"embed_dim=10000000 must be at most 65536"):
        ViTConfig(embed_dim=10_000_000)
    most = {
        "state_size": 1024, "conv_width": 1024, "expand": 64, "dt_rank": 65536, "channels": 65536,
        "num_classes": 2**24, "image_size": 65536, "patch_size": 65536,
    }  # fmt: skip
    for field, value in most.items():
        with pytest.raises(UserError, match=rf"{field}=.* must be at most {value}"):
            VisionMambaConfig(**{field: 2**31 - 1})


def test_every_bad_field_is_named_at_once():
    with pytest.raises(UserError, match=r"part.count=-1 .*\npart.flag='no'"):
        checked(Config(), count=-1, flag="no")


def test_what_is_converted():
    config = checked(
        Config(),
        rate=np.float32(0.5),
        count=np.int64(3),
        size=[4, np.int32(5)],
        places=[1],
        decay=1,
    )
    assert (config.count, config.rate, config.size, config.places) == (3, 0.5, (4, 5), (1,))
    assert type(config.decay) is float and type(config.count) is int
    assert checked(config, inner=Other()).inner == Other()


ODD = ("4", 2.5, -1, 0, True, None, math.nan, math.inf, -math.inf, 1e30, 2**70, (), (0,), b"x", {})


def configs_of_experiments():
    """Return a config of every class that experiments use, with those inside."""
    found = {"Precision": Precision()}

    def add(config):
        if dataclasses.is_dataclass(config):
            found.setdefault(type(config).__name__, config)
            for field in dataclasses.fields(config):
                add(getattr(config, field.name))

    for name in list_experiments():
        add(load_experiment(name))
    return found


FIT = configs_of_experiments()


def test_every_class_of_config_is_tried():
    assert FIT.keys() >= {
        "VisionMambaConfig", "ViTConfig", "ChannelMambaConfig", "MaskedAutoencoderConfig", "UperNetConfig",
        "DetectorConfig", "ProposalConfig", "ClassificationData", "CellsData", "SegmentationData", "DetectionData",
        "TrainConfig", "PretrainConfig", "ProbeConfig", "SegmentationConfig", "DetectionConfig", "OptimizerConfig",
        "MeshConfig",
    }  # fmt: skip


@pytest.mark.parametrize("config", FIT.values(), ids=lambda c: type(c).__name__)
def test_odd_values_of_every_field_are_taken_or_refused_by_name(config):
    """Take or refuse odd values by name. Nothing else is raised, and what is taken has the annotated type."""
    for field in dataclasses.fields(config):
        kept = getattr(config, field.name)
        taken = []
        for value in ODD:
            try:
                taken.append(getattr(checked(config, **{field.name: value}), field.name))
            except UserError as error:
                assert field.name in str(error), (field.name, value, error)
        floats = [v for v in taken if isinstance(v, float)]
        assert all(map(math.isfinite, floats)), field.name
        assert not any(isinstance(v, bytes) for v in taken), field.name
        if isinstance(kept, bool):
            assert taken == [True], field.name
        elif isinstance(kept, int):
            assert all(type(v) is int or v is None for v in taken), field.name
            assert 2**70 not in taken, field.name
        elif isinstance(kept, str):
            assert not [v for v in taken if v is not None and not isinstance(v, str)], field.name
