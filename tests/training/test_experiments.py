"""Experiment files: found by name, each building the model it claims and stepping once, shape-reduced."""

import functools
import math
import os
import re
from dataclasses import fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fastvim_jax.analysis.flops import gmacs
from fastvim_jax.data.device_transforms import make_augment
from fastvim_jax.errors import UserError
from fastvim_jax.models import ViTConfig, build_model
from fastvim_jax.serialise import to_dict
from fastvim_jax.training import TrainConfig, experiment_docs, list_experiments, load_experiment
from fastvim_jax.training.classification.train import make_draw, make_loss
from fastvim_jax.training.experiments import experiment_claims
from fastvim_jax.training.masked.config import PretrainConfig, ProbeConfig
from fastvim_jax.training.optimizer import learning_rate_schedule, make_optimizer
from fastvim_jax.training.start_from import backbone_of
from fastvim_jax.training.steps import init_state, make_train_step
from fastvim_jax.training.tasks import config_from_json

ALL = list_experiments()
JUMPCP = [name for name in ALL if name.startswith("jumpcp/")]  # tests/training/test_jumpcp.py
MASKED = [name for name in ALL if name.startswith("mae")]  # tests/training/masked
EXPERIMENTS = [
    n for n in ALL if n not in JUMPCP + MASKED and isinstance(load_experiment(n), TrainConfig)
]

STARTED = [name for name in MASKED if getattr(load_experiment(name), "init", None)]

# What each experiment changes of another, by name, and nothing else but that.
CHANGES = {
    "imagenet/fastvim_small": ("imagenet/fastvim_tiny", {"embed_dim": 384}),
    "imagenet/fastvim_base": ("imagenet/fastvim_tiny", {"embed_dim": 768, "drop_path": 0.4}),
    **{
        f"imagenet/vim_{size}": (
            f"imagenet/fastvim_{size}",
            {"pooling": "none", "class_token": "middle", "post_norm": "none"},
        )
        for size in ("tiny", "small", "base")
    },
    **{
        f"imagenet/vim_{size}_post_norm": (f"imagenet/vim_{size}", {"post_norm": "layer"})
        for size in ("tiny", "small", "base")
    },
    **{
        f"imagenet/fastvim_small_{name}": ("imagenet/fastvim_small", change)
        for name, change in {
            "only_columns": {"pool_axes": "columns"},
            "only_rows": {"pool_axes": "rows"},
            "no_conv": {"conv_width": 0},
            "class_token": {"class_token": "middle"},
            "rms_rms": {"post_norm": "rms"},
            "ln_ln": {"norm": "layer"},
            "unpool_after_skip": {"unpool": "after_skip"},
        }.items()
    },
    "imagenet/vit_small_pooled": ("imagenet/vit_small", {"pooling": "mean"}),
    "imagenet/vit_small_pooled_conv": ("imagenet/vit_small_pooled", {"conv_width": 4}),
    "cifar10/only_columns": ("cifar10/fastvim", {"pool_axes": "columns"}),
    "cifar10/only_rows": ("cifar10/fastvim", {"pool_axes": "rows"}),
    "cifar10/no_conv": ("cifar10/fastvim", {"conv_width": 0}),
    "cifar10/vim": ("cifar10/fastvim", {"pooling": "none"}),
    "cifar10/vit_pooled": ("cifar10/vit", {"pooling": "mean"}),
    "cifar10/vit_pooled_conv": ("cifar10/vit_pooled", {"conv_width": 4}),
    "tiny_imagenet/vim": ("tiny_imagenet/fastvim", {"pooling": "none"}),
    "tiny_imagenet/only_columns": ("tiny_imagenet/fastvim", {"pool_axes": "columns"}),
    "tiny_imagenet/only_rows": ("tiny_imagenet/fastvim", {"pool_axes": "rows"}),
}


@pytest.mark.parametrize("name", ALL)
def test_every_experiment_loads_and_goes_through_json(name):
    config = load_experiment(name)
    assert config_from_json(config.to_json()) == config
    assert config.model.image_size == config.data.height_width


@pytest.mark.drawn
@pytest.mark.parametrize("name", ALL)
def test_every_experiment_builds_what_it_claims(name):
    config, claims = load_experiment(name), experiment_claims(name)
    assert claims.keys() == {"classes", "parameters"}
    model = nnx.eval_shape(lambda: build_model(config.model, rngs=nnx.Rngs(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == claims["parameters"]
    assert config.model.num_classes == claims["classes"]
    docs = experiment_docs(name)
    command = re.search(rf"^ *(?:\S+=\S+ )?fastvim train {name}( .*)?$", docs, re.MULTILINE)
    assert command, "the docstring says how to run it"
    starts = re.findall(r"--init runs/(\S+)", command[0])
    assert set(starts) <= set(ALL), "it starts from the run of another experiment"
    if name.startswith("mae/") or (name.startswith("imagenet/") and "parameters" in docs):
        assert f"{claims['parameters']:,} parameters" in docs
        cost = gmacs(config.model)
        # A multiply-add is two operations, and gradients cost twice the forward pass. A probe computes features once.
        probe = isinstance(config, ProbeConfig)
        factor, epochs = (2, 1) if probe else (6, config.epochs)
        flops = f"{factor * 1e9 * cost * epochs * 1_281_167:.1e}".replace("e+", "e")
        said = f"Cost: {flops} FLOPs ({factor} × {cost:.2f} GMACs per image)"
        assert said in " ".join(docs.split())
        pretraining = not config.model.num_classes
        assert pretraining or "% top-1" in docs or "No result of the paper" in docs


def _leaves(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize("name", CHANGES)
def test_an_ablation_changes_what_it_names_and_nothing_else(name):
    base, change = CHANGES[name]
    before, after = (dict(_leaves(to_dict(load_experiment(n)))) for n in (base, name))
    assert before.keys() == after.keys()
    changed = {key: after[key] for key in after if after[key] != before[key]}
    assert changed == {f"model.{field}": value for field, value in change.items()}


@pytest.mark.parametrize("name", STARTED)
def test_what_starts_from_masked_pre_training_has_its_encoder(name):
    """Compare the model with the encoder of the experiment whose run `init` names."""
    config = load_experiment(name)
    source = load_experiment(config.init.removeprefix("runs/"))
    assert isinstance(source, PretrainConfig)
    here, there = backbone_of(config.model), backbone_of(source.model)
    free = {
        "image_size", "num_classes", "drop_path", "head_std", "residual_in_fp32", "blocks", "remat",
    }  # fmt: skip
    assert type(here) is type(there)
    for field in fields(here):
        assert field.name in free or getattr(here, field.name) == getattr(there, field.name)


@pytest.mark.parametrize("name", [name for name in MASKED if name.startswith("mae/")])
def test_recipes_of_masked_autoencoders_are_those_of_the_paper(name):
    """Compare pre-training, fine-tuning and probes with the paper's tables of hyperparameters."""
    config, base = load_experiment(name), "base" in name
    optimizer, data = config.optimizer, config.data
    assert optimizer.learning_rate_scaling == "linear" and config.ema_decay is None
    warmup = optimizer.warmup_epochs or optimizer.warmup_share * config.epochs
    got = (data.batch_size, config.epochs, optimizer.learning_rate, warmup, optimizer.weight_decay)
    if name.endswith("pretrain"):
        assert got == (4096, 1600, 1.5e-4, 40, 0.05)
        assert (optimizer.beta2, optimizer.final_learning_rate) == (0.95, 0.0)
        assert config.model.mask_ratio == 0.75 and config.normalise_pixels
        depth = 8 if "vit_" in name else 2
        assert (config.model.decoder_depth, config.model.decoder_dim) == (depth, 512)
        assert config.model.divisor == ("count" if "true_mean" in name else "row_length")
        assert data.crop_scale == (0.2, 1.0) and data.rand_augment is None
        return
    assert config.scale_from_init == ("unscaled" not in name)
    if name.endswith("probe"):
        assert got == (4096, 90, 0.1, 10, 0.0)
        assert config.algorithm == "sgd" and optimizer.final_learning_rate == 0.0
        return
    assert got == (1024, 100 if base else 50, 5e-4 if base else 1e-3, 5, 0.05)
    assert optimizer.final_learning_rate == 1e-5 and optimizer.decay_groups == "finetune"
    assert optimizer.layer_decay == (0.65 if base else 0.75)
    assert optimizer.layer_rule == ("blocks" if "every_block" in name else "pairs")
    assert optimizer.clip_grad_norm == (3.0 if "448" in name else None)
    assert config.model.drop_path == 0.3 and config.label_smoothing == 0.1
    assert config.model.head_std == (2e-5 if "448" in name else 0.02)
    assert config.model.image_size == ((448, 448) if "448" in name else (224, 224))
    assert (data.rand_augment, data.random_erasing, data.mixup, data.cutmix) == (9, 0.25, 0.8, 1)


def test_every_ablation_is_held_to_its_base():
    stand_alone = {
        "digits/fastvim_digits", "imagenet/fastvim_tiny", "imagenet/vit_small", "imagenet/deit_tiny",
        "imagenet/deit_small", "imagenet/deit_base", "cifar10/fastvim", "cifar10/vit",
        "cifar10/fastvim_fine", "tiny_imagenet/fastvim", "tiny_imagenet/vit", "your_images/fastvim",
    }  # fmt: skip
    assert stand_alone | CHANGES.keys() == set(EXPERIMENTS)
    for name in stand_alone:
        vit = name.split("/")[1].startswith(("vit", "deit"))
        assert isinstance(load_experiment(name).model, ViTConfig) == vit


def _reduced(config):
    """Shrink the config: 2 blocks, 12 wide, 3 x 3 patches of 4 pixels, 6 classes, a batch of 4."""
    model = {"embed_dim": 12, "depth": 2, "num_classes": 6, "image_size": 12, "patch_size": 4}
    if isinstance(config.model, ViTConfig):
        model["num_heads"] = 3
    return replace(
        config,
        model=replace(config.model, **model, drop_path=0.1),
        data=replace(config.data, image_size=12, batch_size=4, eval_batch_size=None),
        ema_decay=None if config.ema_decay is None else 0.999,
    )


@functools.cache
def _augment(data, label_smoothing):
    return jax.jit(make_augment(data, 6, label_smoothing=label_smoothing))


@functools.cache
def _step(model, label_smoothing, ema_decay):
    """Return the step of a model, compiled once for all that train it, and the state it starts from."""
    graphdef, params = nnx.split(build_model(model, rngs=nnx.Rngs(0)))
    optimizer = optax.adamw(1e-3)
    step = make_train_step(
        make_loss(graphdef, label_smoothing=label_smoothing),
        optimizer,
        draw=make_draw(graphdef),
        ema_decay=ema_decay,
    )
    return step, init_state(params, optimizer, ema=ema_decay is not None)


def _losses(config, key):
    """Return the losses of three steps on one batch."""
    data = config.data
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (4, 12, 12, data.channels), dtype=np.uint8),
        "label": rng.integers(0, 6, 4).astype(np.int32),
    }
    batch = _augment(data, config.label_smoothing)(key, batch)
    step, state = _step(config.model, config.label_smoothing, config.ema_decay)
    state = jax.tree.map(jnp.copy, state)  # the step uses its state up
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        assert float(metrics["update_norm"]) > 0
    return losses


@pytest.mark.drawn("trainings", one_in=6)
def test_every_fifth_model_of_the_experiments_steps(key):
    """Step every fifth model, others each run, because each model is a program to compile.

    One test runs them all, so that experiments share a program.
    """
    reduced = {name: _reduced(load_experiment(name)) for name in EXPERIMENTS}
    models = list(dict.fromkeys(config.model for config in reduced.values()))
    drawn = models[int(os.environ["FASTVIM_TEST_SEED"]) % 5 :: 5]
    for name, config in reduced.items():
        if config.model in drawn:
            losses = _losses(config, key)
            # Near chance, for six classes; the head's initial values keep it from being exact.
            assert all(abs(loss - math.log(6)) < 0.5 for loss in losses), (name, losses)


@pytest.mark.drawn("more of the models", one_in=6)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_its_schedule_and_optimizer(name):
    config = load_experiment(name)
    rate = learning_rate_schedule(
        config.optimizer,
        batch_size=config.data.batch_size,
        steps_per_epoch=10,
        epochs=config.epochs,
    )
    total = 10 * config.epochs
    rates = [float(rate(step)) for step in (0, total // 2, total - 1)]
    assert 0 < rates[2] < rates[1] and rates[0] < rates[1] < 0.01
    _, params = nnx.split(nnx.eval_shape(lambda: build_model(config.model, rngs=nnx.Rngs(0))))
    optimizer = make_optimizer(config.optimizer, params, learning_rate=rate, total_steps=total)
    jax.eval_shape(optimizer.init, params)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("imagenet/")])
def test_the_imagenet_experiments_follow_the_recipe(name):
    """Compare with the first column of the paper's recipes; DeiT has a learning rate and a drop path of its own."""
    config, deit = load_experiment(name), "/deit" in name
    depth = 12 if isinstance(config.model, ViTConfig) else 24
    width = {"tiny": 192, "small": 384, "base": 768}[name.split("_")[1]]
    assert (config.model.depth, config.model.embed_dim) == (depth, width)
    assert config.model.drop_path == (0.1 if deit else 0.4 if "_base" in name else 0.05)
    assert (config.epochs, config.ema_decay, config.label_smoothing) == (300, 0.9999, 0.1)
    data = config.data
    assert (data.batch_size, data.height_width, data.eval_crop) == (1024, (224, 224), 0.875)
    assert (data.crop, data.crop_scale, data.flip) == ("random_resized", (0.08, 1.0), 0.5)
    assert (data.rand_augment, data.rand_augment_std, data.random_erasing) == (9.0, 0.5, 0.25)
    assert (data.mixup, data.cutmix, data.mix_prob, data.mix_switch_prob) == (0.8, 1.0, 1.0, 0.5)
    optimizer = config.optimizer
    assert optimizer.learning_rate == (5e-4 if deit else 1e-3)
    assert (optimizer.learning_rate_scaling, optimizer.decay_groups) == ("deit", "supervised")
    assert (optimizer.beta1, optimizer.beta2, optimizer.clip_grad_norm) == (0.9, 0.999, None)
    assert (optimizer.warmup_epochs, optimizer.warmup_start) == (5, 1e-6)
    assert (optimizer.final_learning_rate, optimizer.weight_decay) == (1e-5, 0.05)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits/fastvim_digit", "Did you mean 'digits/fastvim_digits'"),
        ("fastvim_digits", "Did you mean 'digits/fastvim_digits'"),
        ("qqq", "Known are: "),
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
    with pytest.raises(UserError, match="must set `config` to a TrainConfig.*it holds 3"):
        load_experiment(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("config = (", ["is not valid Python", "line 1", "config = ("]),
        ("\0", ["source code string cannot contain null bytes"]),
        (
            "x = 1\nimport no_such_module",
            ["ModuleNotFoundError", "line 2", "import no_such_module"],
        ),
        ("def f():\n    return 1 / 0\n\nf()", ["ZeroDivisionError", "line 2", "return 1 / 0"]),
        ("import sys\nsys.exit('set DATA')", ["SystemExit: set DATA", "line 2", "sys.exit"]),
    ],
)
def test_an_error_of_the_file_itself_is_said_with_its_place(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    path = Path("mine.py")  # As people type it.
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_experiment(path)
    message = str(caught.value)
    assert str(path) in message and "None" not in message
    assert len(message.splitlines()) == 3 or "\0" in text
    for part in said:
        assert part in message
