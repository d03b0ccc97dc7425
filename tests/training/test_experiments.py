"""Experiment files: found by name, each building the config it claims."""

import pytest

from fastvim_jax.errors import UserError
from fastvim_jax.training import TrainConfig, experiment_docs, list_experiments, load_experiment


@pytest.mark.parametrize("name", list_experiments())
def test_every_experiment_loads_and_goes_through_json(name):
    config = load_experiment(name)
    assert TrainConfig.from_json(config.to_json()) == config
    assert config.model.image_size == config.data.height_width
    assert "%" in experiment_docs(name), "the docstring states the expected result"


def test_the_imagenet_experiment_is_the_recipe():
    config = load_experiment("imagenet/fastvim_tiny")
    assert (config.model.depth, config.model.embed_dim, config.model.drop_path) == (24, 192, 0.05)
    assert (config.data.batch_size, config.epochs, config.ema_decay) == (1024, 300, 0.9999)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.learning_rate_scaling) == (1e-3, "deit")
    assert (optimizer.warmup_epochs, optimizer.warmup_start) == (5, 1e-6)
    assert (optimizer.final_learning_rate, optimizer.weight_decay) == (1e-5, 0.05)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits/fastvim_digit", "Did you mean 'digits/fastvim_digits'"),
        ("fastvim_digits", "Did you mean 'digits/fastvim_digits'"),
        ("qqq", "Known are: digits/fastvim_digits"),
        ("no/such/file.py", "there is no experiment file no/such/file.py"),
    ],
)
def test_unknown_names_suggest_the_nearest(name, message):
    with pytest.raises(UserError) as caught:
        load_experiment(name)
    assert message in str(caught.value)


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "my own.py"
    path.write_text(
        "import dataclasses\n"
        "from fastvim_jax.training import load_experiment\n"
        "config = dataclasses.replace(load_experiment('digits/fastvim_digits'), seed=7)\n"
    )
    assert load_experiment(path).seed == 7
    path.write_text("config = 3\n")
    with pytest.raises(UserError, match="must set `config` to a TrainConfig; it holds 3"):
        load_experiment(path)
