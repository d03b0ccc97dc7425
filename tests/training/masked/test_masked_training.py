"""Pre-training on the digits, killed and resumed to the same bits; then fine-tuned, probed and drawn."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

from fastvim_jax import UserError, save_pretrained, to_torch_state_dict
from fastvim_jax.data import make_train_iterator
from fastvim_jax.inference.reconstruct import reconstruct_files
from fastvim_jax.layers.pos_embed import sincos_pos_embed
from fastvim_jax.models import MaskedAutoencoderConfig, build_model, model_config
from fastvim_jax.models.parameters import named_parameters
from fastvim_jax.models.saving import Preprocessing
from fastvim_jax.training import OptimizerConfig, load_run, load_weights, read_metrics, train
from fastvim_jax.training.classification.run_scores import score_run
from fastvim_jax.training.masked.config import PRETRAINING, PROBING, PretrainConfig, ProbeConfig
from fastvim_jax.training.masked.features import FeatureBatches, Features, require_same_features
from fastvim_jax.training.masked.pretrain import require_masked
from fastvim_jax.training.masked.probe_head import make_probe_optimizer
from fastvim_jax.training.metrics import RunLog
from fastvim_jax.training.pool_scale import with_scale_of_init
from tests.training.compare_runs import assert_same_run
from tests.training.tiny import EVAL_IMAGES, STEPS_PER_EPOCH, tiny_config, tiny_model

DATA = tiny_config().data
MODEL = tiny_model(patch_size=2, drop_path=0.0)  # a grid of 4 x 4
CONFIG = PretrainConfig(
    model=MaskedAutoencoderConfig(
        encoder=dataclasses.replace(MODEL, num_classes=0), decoder_dim=8, decoder_depth=1
    ),
    data=DATA,
    optimizer=dataclasses.replace(
        PRETRAINING, learning_rate=4e-3, learning_rate_scaling="none", warmup_epochs=0.5
    ),
    epochs=2,
    ema_decay=0.5,
    accumulate=2,
    checkpoint_every_steps=4,
    log_every_steps=3,
    pictures=3,
)


def probe_config(source: Any, **changes: Any) -> ProbeConfig:
    options: dict[str, Any] = {
        "model": MODEL,
        "data": DATA,
        "init": str(source),
        "optimizer": dataclasses.replace(PROBING, warmup_epochs=1.0),
        "epochs": 20,
        "evaluate_every_epochs": 0,
        "checkpoint_every_steps": 100,
    }
    return ProbeConfig(**{**options, **changes})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return an uninterrupted run and its result."""
    folder = tmp_path_factory.mktemp("masked") / "run"
    return folder, train(CONFIG, folder, progress=False)


def test_the_loss_falls_and_the_run_is_drawn(pretrained: Any) -> None:
    folder, result = pretrained
    losses = [line["loss"] for line in read_metrics(folder, "train")]
    assert losses[-1] < losses[0]
    first, last = read_metrics(folder, "eval")
    assert last["count"] == EVAL_IMAGES and last["raw_loss"] < first["raw_loss"]
    assert f"loss {last['raw_loss']:.4f}" in result.headline and last["ema_loss"] > 0
    with Image.open(folder / "reconstructions.png") as picture:
        assert picture.size == (4 * 8 + 3 * 2, 3 * 8 + 2 * 2)
    assert (folder / "summary.png").is_file()


def test_killed_and_resumed_to_the_same_bits(pretrained: Any, tmp_path: Any) -> None:
    folder, _ = pretrained
    with pytest.MonkeyPatch.context() as patch:
        advance, count = RunLog.advance, iter(range(1, 100))

        def stop(log: RunLog) -> None:
            advance(log)
            if next(count) == STEPS_PER_EPOCH + 3:
                raise KeyboardInterrupt

        patch.setattr(RunLog, "advance", stop)
        with pytest.raises(KeyboardInterrupt):
            train(CONFIG, tmp_path / "run", progress=False)
    train(CONFIG, tmp_path / "run", progress=False)
    assert_same_run(folder, tmp_path / "run")


def test_fine_tuning_takes_backbone_positions_and_scale(pretrained: Any, tmp_path: Any) -> None:
    folder, _ = pretrained
    config = tiny_config(
        model=MODEL,
        optimizer=OptimizerConfig(
            learning_rate=4e-3,
            learning_rate_scaling="none",
            warmup_epochs=0.5,
            decay_groups="finetune",
            layer_decay=0.75,
        ),
        init=str(folder),
        epochs=1,
    )
    train(config, tmp_path / "tuned", progress=False)
    tuned = load_run(tmp_path / "tuned")
    assert tuned.config.model.pool_scale == 0.25
    report = json.loads((tmp_path / "tuned" / "init.json").read_text())["parameters"]
    assert report["blocks.0.mixer.in_proj.kernel"] == report["pos_embed"] == "taken"
    assert report["head.kernel"].startswith("drawn")
    # The source is needed no more once the run has begun.
    gone = dataclasses.replace(config, init=str(tmp_path / "gone"))
    assert with_scale_of_init(gone, tmp_path / "new").model.pool_scale == 1.0
    told = dataclasses.replace(config, scale_from_init=False)
    assert with_scale_of_init(told, tmp_path / "new").model.pool_scale == 1.0


def test_weights_are_those_of_the_encoder(pretrained: Any) -> None:
    folder, _ = pretrained
    model = build_model(MODEL, rngs=nnx.Rngs(1))
    load_weights(model, folder)
    named = named_parameters(nnx.state(model))
    source = named_parameters(nnx.state(load_run(folder).model))  # the average of both
    np.testing.assert_array_equal(
        named["blocks.0.mixer.forward.A_log"], source["encoder.blocks.0.mixer.forward.A_log"]
    )
    np.testing.assert_allclose(named["pos_embed"][0], sincos_pos_embed(8, (4, 4)))


def test_probe_with_cached_features(pretrained: Any, tmp_path: Any, capsys: Any) -> None:
    folder, _ = pretrained
    result = train(probe_config(folder), tmp_path / "cached", progress=True)
    assert result.metrics["count"] == EVAL_IMAGES
    assert result.metrics["raw_top1"] > 0.3, "far better than chance on ten digits"
    assert "computed once" in capsys.readouterr().err
    saved = json.loads((tmp_path / "cached" / "config.json").read_text())
    assert saved["model"]["pool_scale"] == 0.25
    with pytest.raises(UserError, match="linear probe, whose checkpoints hold the head"):
        load_run(tmp_path / "cached")


def test_a_probe_goes_on_with_the_features_it_began_with(tmp_path: Path) -> None:
    """One process caches them, several do not; the checkpoint was called damaged."""
    features = Features(np.zeros((4, 2), np.float32), np.zeros(4, np.int32))
    cached = FeatureBatches(features, batch_size=2, seed=0, place=dict).get_state()
    with contextlib.closing(make_train_iterator(DATA, seed=0)) as images:
        streamed = images.get_state()
    for position, is_cached, how in (
        (cached, True, "once, in one"),
        (streamed, False, "by several"),
    ):
        require_same_features(tmp_path, position, cached=is_cached)
        with pytest.raises(UserError, match=f"computed {how} process.*with as many processes"):
            require_same_features(tmp_path, position, cached=not is_cached)


@pytest.mark.drawn("trainings", one_in=6)
def test_probe_with_streamed_features(pretrained: Any, tmp_path: Any, capsys: Any) -> None:
    folder, _ = pretrained
    streamed = probe_config(folder, epochs=2, cache_gigabytes=0.0)
    result = train(streamed, tmp_path / "streamed", progress=True)
    assert result.metrics["count"] == EVAL_IMAGES
    assert "they are not cached" in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ["sgd", "lars"])
def test_two_steps_of_the_probes_optimizer(algorithm: str, rng: np.random.Generator) -> None:
    """Compare two steps with momentum.

    LARS scales a matrix's step by 0.001 of its norm over the gradient's, a bias's not.
    """
    decay, rate = 0.1, 0.5
    settings = dataclasses.replace(PROBING, weight_decay=decay)
    config = probe_config("anywhere", algorithm=algorithm, optimizer=settings)
    optimizer = make_probe_optimizer(config, lambda step: rate)
    values = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    params = {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}
    state, moved = optimizer.init(params), {name: np.zeros_like(v) for name, v in values.items()}
    for _ in range(2):
        grads = {name: rng.normal(size=value.shape) for name, value in values.items()}
        given = {name: jnp.asarray(value, jnp.float32) for name, value in grads.items()}
        updates, state = optimizer.update(given, state, params)
        params = optax.apply_updates(params, updates)
        step = dict(grads, kernel=grads["kernel"] + decay * values["kernel"])
        if algorithm == "lars":
            trust = 0.001 * np.linalg.norm(values["kernel"]) / np.linalg.norm(step["kernel"])
            step["kernel"] = step["kernel"] * trust
        for name in values:
            moved[name] = 0.9 * moved[name] + step[name]
            values[name] = values[name] - rate * moved[name]
            np.testing.assert_allclose(params[name], values[name], rtol=1e-5, atol=1e-6)


def test_pictures_of_files(pretrained: Any, tmp_path: Any, rng: np.random.Generator) -> None:
    folder, _ = pretrained
    run = load_run(folder)
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(rng.integers(0, 255, (9, 11), np.uint8)).save(good)
    bad.write_bytes(b"nothing")
    problems = reconstruct_files(run, [good, bad], tmp_path / "out.png", mask_ratio=0.5)
    assert len(problems) == 1 and "bad.png" in problems[0]
    with Image.open(tmp_path / "out.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (8, 4 * 8 + 3 * 2, 3)
    original, masked, _, pasted = (pixels[:, i * 10 : i * 10 + 8, 0] for i in range(4))
    same = (original == masked).reshape(4, 2, 4, 2).all(axis=(1, 3))
    assert same.sum() >= 8
    kept = np.repeat(np.repeat(same, 2, 0), 2, 1)
    np.testing.assert_array_equal(pasted[kept], original[kept])


def test_runs_of_another_task_are_refused_by_name(pretrained: Any, tmp_path: Any) -> None:
    folder, _ = pretrained
    supervised = tmp_path / "supervised"
    supervised.mkdir()
    (supervised / "config.json").write_text(tiny_config().to_json())
    with pytest.raises(UserError, match="run of a TrainConfig, which has no decoder"):
        train(dataclasses.replace(CONFIG, init=str(supervised)), tmp_path / "new", progress=False)
    with pytest.raises(UserError, match="run of a PretrainConfig and not of a classifier"):
        score_run(folder, DATA)
    run = load_run(folder)
    other = dataclasses.replace(run, config=tiny_config())
    with pytest.raises(UserError, match="TrainConfig, so its model reconstructs nothing"):
        reconstruct_files(other, [], tmp_path / "out.png")


def test_a_saved_masked_autoencoder_is_a_start_and_another_saved_model_is_not(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ask for the kind of model of a saved folder, as `fastvim import-weights` writes it; see the tests of `init`."""
    for name, config in (("masked", CONFIG.model), ("classifier", MODEL)):
        save_pretrained(
            build_model(config, rngs=nnx.Rngs(0)), tmp_path / name,
            preprocessing=Preprocessing((8, 8), mean=(0.0,), std=(1.0,)),
        )  # fmt: skip
    require_masked(tmp_path / "masked")
    # A masked autoencoder of the hub has a pooling scale, too.
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path / "masked"))
    require_masked("hf://owner/name")
    require_masked(tmp_path / "masked" / "model.safetensors")
    theirs = to_torch_state_dict(build_model(CONFIG.model, rngs=nnx.Rngs(0)))
    arrays = {name: np.ascontiguousarray(value) for name, value in theirs.items()}
    save_file(arrays, tmp_path / "theirs.safetensors")
    require_masked(tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match="weights of a model which has no decoder"):
        require_masked(tmp_path / "classifier" / "model.safetensors")
    tuned = tiny_config(model=MODEL, init="hf://owner/name")
    assert with_scale_of_init(tuned, tmp_path / "tuned").model.pool_scale == 0.25
    started = dataclasses.replace(CONFIG, init=str(tmp_path / "classifier"))
    with pytest.raises(UserError, match="model of a VisionMambaConfig, which has no decoder"):
        train(started, tmp_path / "new", progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": dataclasses.replace(DATA, mixup=0.8)}, "data.mixup=0.8"),
        ({"data": dataclasses.replace(DATA, image_size=16)}, "make them equal"),
        ({"pictures": -1}, "pictures"),
    ],
)
def test_bad_configs(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_config_goes_through_json() -> None:
    assert PretrainConfig.from_json(CONFIG.to_json()) == CONFIG
    config = probe_config("somewhere", algorithm="lars")
    assert ProbeConfig.from_json(config.to_json()) == config
    with pytest.raises(UserError, match="init is empty"):
        dataclasses.replace(config, init=None)


def test_patches_of_one_number_cannot_be_normalised():
    """Their variance is 0/0, and every loss would be NaN."""
    model = model_config("mae_fastvim_tiny_patch16_224", image_size=8, patch_size=1, channels=1)
    with pytest.raises(UserError, match=r"normalise_pixels=True: patches of one number"):
        dataclasses.replace(CONFIG, model=model)
    assert dataclasses.replace(CONFIG, model=model, normalise_pixels=False).model.patch == (1, 1)
