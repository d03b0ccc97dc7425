"""Configs: exact JSON, overrides from the command line, and what they refuse, by field."""

import dataclasses
import json

import pytest
import tyro

from fastvim_jax.data import ClassificationData
from fastvim_jax.errors import UserError
from fastvim_jax.models import ViTConfig
from fastvim_jax.training import OptimizerConfig, TrainConfig, load_experiment
from tests.support import checked
from tests.training.tiny import tiny_config

VIT = ViTConfig(image_size=8, patch_size=4, channels=1, num_classes=10, embed_dim=12, depth=2)
WIDE = dataclasses.replace(tiny_config().data, image_size=(8, 12))
CONFIGS = [
    tiny_config(),
    tiny_config(
        model=dataclasses.replace(VIT, image_size=(8, 12)),
        data=WIDE,
        ema_decay=None,
        checkpoint_every_steps=None,
    ),
    tiny_config(
        optimizer=OptimizerConfig(learning_rate=1 / 3, layer_decay=0.65, warmup_epochs=1.0)
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip_is_exact(config):
    again = TrainConfig.from_json(config.to_json())
    assert again == config
    assert again.to_json() == config.to_json()
    assert type(again.model) is type(config.model)


def test_every_field_is_in_the_json():
    values = json.loads(tiny_config().to_json())
    assert set(values) == {"class"} | {f.name for f in dataclasses.fields(TrainConfig)}
    assert set(values["data"]) == {"class"} | {
        f.name for f in dataclasses.fields(ClassificationData)
    }
    assert values["model"]["class"] == "VisionMambaConfig"


def test_whole_numbers_become_floats():
    config = checked(OptimizerConfig(), warmup_epochs=5)
    assert config == OptimizerConfig(warmup_epochs=5.0)
    assert isinstance(config.warmup_epochs, float)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("epoch",), 3, "has no field 'epoch'. Did you mean 'epochs'"),
        (("optimizer", "learning_rat"), 1.0, "'learning_rat'. Did you mean 'learning_rate'"),
        (("model", "class"), "VisionMamba", "Did you mean 'VisionMambaConfig'"),
        (("epochs",), "3", "epochs: expected int, got '3'"),
        (("epochs",), True, "epochs: expected int, got True"),
        (("data", "mean"), 0.5, "data.mean: expected a list, got 0.5"),
        (("optimizer", "schedule"), "warmup_cosin", "Did you mean 'warmup_cosine'"),
        (("optimizer",), [], "optimizer: expected the fields of OptimizerConfig"),
    ],
)
def test_wrong_json_names_the_field(path, value, message):
    values = json.loads(tiny_config().to_json())
    inner = values
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(UserError) as caught:
        TrainConfig.from_json(json.dumps(values))
    assert message in str(caught.value)


def test_a_missing_field_without_default_is_named():
    values = json.loads(tiny_config().to_json())
    del values["model"]
    with pytest.raises(UserError, match="the field 'model' of TrainConfig is missing"):
        TrainConfig.from_json(json.dumps(values))
    with pytest.raises(UserError, match="not valid JSON"):
        TrainConfig.from_json(tiny_config().to_json()[:-20])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0 must be less than 1"),
        ({"ema_decay": 1.5}, "ema_decay=1.5 must be less than 1"),
        ({"log_every_steps": 0}, "log_every_steps=0 must be"),
        ({"checkpoint_every_steps": 0}, "checkpoint_every_steps=0 must be"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 2**32}, "seed=4294967296 must be less than 4294967296"),
        ({"seed": "0"}, "seed='0' must be an integer"),
        ({"epochs": 2.5}, "epochs=2.5 must be an integer"),
        ({"model": dataclasses.replace(VIT, channels=3)}, "data.channels=1: make them equal"),
        ({"data": WIDE}, "data.image_size=(8, 12): make them equal"),
        ({"model": dataclasses.replace(VIT, num_classes=0)}, "needs a classifier"),
        (
            {"optimizer": OptimizerConfig(warmup_epochs=2.0)},
            "for example --optimizer.warmup-epochs 0.25",
        ),
    ],
)
def test_impossible_runs_are_refused_by_field(changes, message):
    with pytest.raises(UserError) as caught:
        checked(tiny_config(), **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("beta2", 1.0),
        ("layer_decay", 1.5),
        ("clip_grad_norm", 0.0),
        ("schedule", "cosine"),
        ("decay_groups", "all"),
        ("warmup_epochs", float("inf")),
    ],
)
def test_impossible_optimizers_are_refused_by_field(field, value):
    with pytest.raises(UserError, match=rf"optimizer.{field}='?{value}'? (must be|is not one of)"):
        checked(OptimizerConfig(), **{field: value})


def test_the_warm_up_is_a_share_of_the_run_unless_given():
    assert (
        OptimizerConfig().warmup(40) == 2.0 and OptimizerConfig(warmup_epochs=5.0).warmup(40) == 5
    )
    digits = load_experiment("digits/fastvim_digits")
    yours = load_experiment("your_images/fastvim")
    assert (digits.optimizer.warmup(40), yours.optimizer.warmup(40)) == (2.0, 5.0)
    for config, epochs in ((digits, 1), (yours, 3)):
        assert 0 < checked(config, epochs=epochs).optimizer.warmup(epochs) < epochs


def test_the_command_line_overrides_any_field():
    arguments = (
        "--epochs 7 --model.depth 3 --ema-decay None --optimizer.clip-grad-norm 3"
        " --model.image-size 8 16 --data.image-size 8 16 --data.batch-size 64"
    )
    config = tyro.cli(
        TrainConfig,
        default=tiny_config(),
        args=arguments.split(),
        config=(tyro.conf.AvoidSubcommands,),
    )
    data = dataclasses.replace(tiny_config().data, image_size=(8, 16), batch_size=64)
    expected = tiny_config(
        epochs=7,
        ema_decay=None,
        data=data,
        model=dataclasses.replace(tiny_config().model, depth=3, image_size=(8, 16)),
        optimizer=dataclasses.replace(tiny_config().optimizer, clip_grad_norm=3.0),
    )
    assert config == expected
