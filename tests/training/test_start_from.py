"""Starting from weights: what is taken, resized, drawn and left, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from fastvim_jax.data import make_eval_iterator
from fastvim_jax.errors import UserError
from fastvim_jax.interop import to_torch_state_dict
from fastvim_jax.layers.pos_embed import resize_pos_embed
from fastvim_jax.models import UperNetConfig, ViTConfig, build_model
from fastvim_jax.models.mae import backbone_parameters
from fastvim_jax.models.mae_config import MaskedAutoencoderConfig
from fastvim_jax.models.parameters import named_parameters, parameter_infos
from fastvim_jax.models.saving import Preprocessing, save_pretrained
from fastvim_jax.training import evaluate, load_run, train
from fastvim_jax.training.start_from import fit, load_weights, resize_positions
from fastvim_jax.training.weights_source import Source
from tests.training.tiny import tiny_config, tiny_model

MODEL = tiny_model(depth=2)
run = nnx.jit(lambda model, images: model(images))  # compiled once for all models of one config


def build(config=MODEL, seed=0):
    return build_model(config, rngs=nnx.Rngs(seed))


def arrays_of(model):
    return {k: np.asarray(v) for k, v in named_parameters(nnx.state(model)).items()}


def shapes_of(config):
    params = nnx.state(nnx.eval_shape(lambda: build(config)))
    return {n: info.shape for info in parameter_infos(params) for n in info.unstacked_names()}


@pytest.fixture(scope="module")
def arrays():
    return arrays_of(build())


@pytest.fixture(scope="module")
def source_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "source"
    train(tiny_config(model=MODEL, epochs=1, checkpoint_every_steps=None), folder, progress=False)
    return folder


def given(arrays, config=MODEL, **changes):
    return Source("the source", {**arrays, **changes}, config)


def test_equal_models_take_everything(arrays):
    found, report = fit(given(arrays), shapes_of(MODEL), config=MODEL)
    assert found.keys() == arrays.keys() == set(report.names("taken"))
    assert report.notes == ()


def test_a_head_of_other_classes_is_drawn_and_one_of_the_same_is_kept(arrays):
    other = tiny_model(depth=2, num_classes=3)
    found, report = fit(given(arrays), shapes_of(other), config=other)
    assert set(report.names("drawn")) == {"head.kernel", "head.bias"}
    assert "head.bias" not in found and "norm.scale" in found
    named = Source("a", arrays, MODEL, class_names=tuple("abcdefghij"))
    for names, drawn in ((tuple("abcdefghij"), 0), (tuple("0123456789"), 2), ((), 0)):
        _, report = fit(named, shapes_of(MODEL), config=MODEL, class_names=names)
        assert len(report.names("drawn")) == drawn
    assert (
        "other classes"
        in fit(named, shapes_of(MODEL), config=MODEL, class_names=tuple("0123456789"))[1].in_words()
    )


@pytest.mark.parametrize("token", ["none", "middle", "head"])
def test_positions_are_resampled_and_the_class_token_s_row_moves(rng, token):
    there = tiny_model(class_token=token, image_size=(12, 16))
    here = tiny_model(class_token=token, image_size=(24, 8))
    table = rng.normal(size=(1, 12 + (token != "none"), 8)).astype(np.float32)
    place = {"none": None, "middle": 6, "head": 0}[token]
    grid = table if place is None else np.delete(table, place, axis=1)
    resized = resize_positions(table, there, here)
    expected = np.asarray(resize_pos_embed(jnp.asarray(grid), (3, 4), (6, 2)))
    if place is not None:
        np.testing.assert_array_equal(resized[:, place], table[:, place])
        resized = np.delete(resized, place, axis=1)
    np.testing.assert_allclose(resized, expected, rtol=1e-6)
    # As many positions in another shape are no reason to take the table as it is.
    model = build(there)
    shapes = shapes_of(here)
    assert shapes["pos_embed"] == table.shape
    _, report = fit(Source("s", arrays_of(model), there), shapes, config=here)
    assert report.names("resized") == ["pos_embed"] and "3 x 4 to 6 x 2" in report.in_words()


@pytest.mark.parametrize("size", [(12, 16), (24, 8)])
def test_positions_keep_their_places_in_another_token_order(rng, size):
    """A table by columns is transposed. Taken as it is, it would give places the embeddings of others."""
    there = tiny_model(token_order="column", class_token="middle", image_size=(12, 16))
    here = tiny_model(token_order="row", class_token="middle", image_size=size)
    table = rng.normal(size=(1, 13, 8)).astype(np.float32)
    by_rows = np.delete(table, 6, axis=1).reshape(1, 4, 3, 8).swapaxes(1, 2).reshape(1, 12, 8)
    by_rows = np.insert(by_rows, 6, table[:, 6], axis=1)
    same_order = dataclasses.replace(there, token_order="row")
    expected = resize_positions(by_rows, same_order, here)
    arrays = arrays_of(build(there)) | {"pos_embed": table}
    found, report = fit(Source("s", arrays, there), shapes_of(here), config=here)
    assert report.names("resized") == ["pos_embed"] and "token_order" in report.in_words()
    np.testing.assert_array_equal(found["pos_embed"], expected)


def test_positions_with_a_class_token_s_row_are_none_without(rng):
    """Refuse them also if 12 + 1 places are as many as 13."""
    there = tiny_model(class_token="head", image_size=(12, 16))
    here = tiny_model(image_size=(52, 4))
    source = Source("s", arrays_of(build(there)), there)
    assert shapes_of(here)["pos_embed"] == source.arrays["pos_embed"].shape
    with pytest.raises(UserError, match="pos_embed: with a class token in one"):
        fit(source, shapes_of(here), config=here, allow=("class_token",))
    found, _ = fit(source, shapes_of(here), config=here, allow=("class_token", "pos_embed"))
    assert "pos_embed" not in found


def test_a_backbone_leaves_a_larger_model_and_enters_one(arrays):
    larger = {f"backbone.{name}": value for name, value in arrays.items()}
    larger["decode_head.kernel"] = np.zeros(3)
    found, report = fit(Source("a segmentor", larger), shapes_of(MODEL), config=MODEL)
    assert found.keys() == arrays.keys() and report.names("left") == ["decode_head.kernel"]
    shapes = {f"backbone.{name}": shape for name, shape in shapes_of(MODEL).items()}
    shapes = {
        n: s for n, s in shapes.items() if not n.startswith(("backbone.head", "backbone.norm."))
    }
    shapes |= {"backbone.out_norms.0.scale": (8,), "rpn.kernel": (4, 4)}
    found, report = fit(given(arrays), shapes)
    assert set(report.names("drawn")) == {"backbone.out_norms.0.scale", "rpn.kernel"}
    assert set(report.names("left")) == {"head.kernel", "head.bias", "norm.scale"}
    np.testing.assert_array_equal(found["backbone.blocks.1.mixer.in_proj.kernel"],
                                  arrays["blocks.1.mixer.in_proj.kernel"])  # fmt: skip


@pytest.mark.drawn("commands", one_in=6)
def test_a_segmentor_gets_a_classifier_s_backbone_gives_it_back_and_changes_its_classes():
    """Pass weights between the models themselves: shapes alone, nothing is drawn."""
    config = tiny_model(depth=4, image_size=16)
    dense = dataclasses.replace(config, image_size=8, num_classes=0, out_indices=(0, 1, 2, 3))
    segmentor = UperNetConfig(
        backbone=dense, num_classes=3, channels=4, auxiliary_channels=4, pool_scales=(1, 2)
    )

    def zeros(each):
        return {name: np.zeros(shape, np.float32) for name, shape in shapes_of(each).items()}

    _, report = fit(Source("c", zeros(config), config), shapes_of(segmentor), config=segmentor)
    assert report.names("resized") == ["backbone.pos_embed"]
    assert set(report.names("left")) == {"head.kernel", "head.bias", "norm.scale"}
    drawn = report.names("drawn")
    assert drawn and not any(n.startswith(("backbone.blocks", "backbone.patch")) for n in drawn)
    assert "backbone.out_norms.*" in report.in_words()

    source = Source("s", zeros(segmentor), segmentor, class_names=("sky", "sea", "sand"))
    _, report = fit(source, shapes_of(config), config=config)
    assert set(report.names("drawn")) == {"head.kernel", "head.bias", "norm.scale"}
    other = dataclasses.replace(segmentor, num_classes=5)
    names = ("sea", "sky", "sand")
    for model, classes in ((other, tuple("abcde")), (segmentor, names)):
        _, report = fit(source, shapes_of(model), config=model, class_names=classes)
        assert {name.split(".")[0] for name in report.names("drawn")} == {
            "decode_head", "auxiliary_head",
        }  # fmt: skip
        assert all("classifier" in name for name in report.names("drawn")) and not report.names(
            "left"
        )


def test_a_misfit_is_an_error_unless_allowed_by_name(arrays):
    deeper = tiny_model(depth=3, channels=3)
    with pytest.raises(UserError) as caught:
        fit(given(arrays), shapes_of(deeper), config=deeper)
    message = str(caught.value)
    assert "blocks.2.mixer.D: not in the source" in message or "and " in message
    assert "depth is 2 there, 3 here" in message and "channels is 1 there, 3 here" in message
    assert "--init-allow" in message
    allow = ("blocks.2.*", "patch_embed.*")
    found, report = fit(given(arrays), shapes_of(deeper), config=deeper, allow=allow)
    assert not any(name.startswith("blocks.2.") for name in found)
    assert "patch_embed.proj.kernel" in report.names("drawn")
    with pytest.raises(UserError, match="blocks.1.mixer"):
        fit(given(arrays), shapes_of(tiny_model(depth=1)), config=tiny_model(depth=1))
    with pytest.raises(UserError, match="the model is a VisionMambaConfig there, a ViTConfig here"):
        vit = ViTConfig(image_size=8, patch_size=4, channels=1, embed_dim=12, depth=2, num_heads=2)
        fit(given(arrays), shapes_of(vit), config=vit)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full(10, np.nan), "head.bias holds NaN or infinite numbers"),
        (np.full(10, np.inf), "head.bias holds NaN or infinite numbers"),
        (np.zeros(10, complex), "head.bias is complex"),
        (np.asarray(None), "head.bias holds no numbers"),
    ],
)
def test_what_no_training_gives_is_refused(arrays, value, message):
    with pytest.raises(UserError, match=message):
        fit(given(arrays, **{"head.bias": value}), shapes_of(MODEL), config=MODEL)


def test_differences_that_fit_are_noted(arrays):
    other = tiny_model(depth=2, pooling="max", drop_path=0.0)
    _, report = fit(given(arrays), shapes_of(other), config=other)
    assert report.notes == ("pooling is 'mean' there, 'max' here",)


@pytest.mark.drawn("commands", one_in=6)
def test_hand_written_code_loads_runs_and_files(source_run, tmp_path, rng):
    trained = load_run(source_run, weights="raw").model
    images = jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32)
    model = build(seed=5)
    report = load_weights(model, source_run, weights="raw")
    assert len(report.names("taken")) == len(arrays_of(model)) and "raw weights" in report.source
    np.testing.assert_array_equal(run(model, images), run(trained, images))
    # Another head stays as it was drawn; a plain nnx.update would have put ten classes into this model of three.
    small = build(tiny_model(depth=2, num_classes=3), seed=6)
    head = np.asarray(small.head.kernel[...])
    load_weights(small, source_run)
    np.testing.assert_array_equal(small.head.kernel[...], head)
    assert run(small, images).shape == (2, 3)
    # A file under the authors' names, and one under ours.
    for name, state in (("a", to_torch_state_dict(trained)), ("b", arrays_of(trained))):
        save_file(
            {k: np.ascontiguousarray(v) for k, v in state.items()}, tmp_path / f"{name}.safetensors"
        )
        model = build(seed=7)
        load_weights(model, tmp_path / f"{name}.safetensors")
        np.testing.assert_array_equal(run(model, images), run(trained, images))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, "there is no run folder, saved model or weights file nowhere"),
        (".", {}, "is no run folder: it has no config.json"),
        ("README.md", {}, "is no weights file"),
        (
            "README.md",
            {"weights": "ema"},
            "holds one set of weights: only run folders take weights and step",
        ),
    ],
)
def test_what_is_no_source_is_named(source, options, message):
    with pytest.raises(UserError, match=message):
        load_weights(build(), source, **options)


@pytest.mark.drawn("commands", one_in=6)
def test_a_run_starts_from_another(source_run, tmp_path):
    """Start a run from another: its first step begins with those weights, the average too.

    The table is in the folder, and the run resumes by itself.
    """
    slow = {"learning_rate": 1e-9, "final_learning_rate": 0.0, "warmup_start": 0.0}
    config = tiny_config(
        model=MODEL,
        init=str(source_run),
        init_weights="raw",
        epochs=1,
        checkpoint_every_steps=None,
        optimizer=dataclasses.replace(tiny_config().optimizer, layer_decay=0.9, **slow),
    )
    folder = tmp_path / "run"
    lacking = {n: a for n, a in arrays_of(build()).items() if not n.startswith("blocks.1.")}
    save_file(lacking, tmp_path / "lacking.safetensors")
    wrong = dataclasses.replace(
        config, init=str(tmp_path / "lacking.safetensors"), init_weights=None
    )
    with pytest.raises(UserError, match="blocks.1.mixer"):
        train(wrong, folder, progress=False)
    # What has saved nothing yet may begin anew with another config.
    result = train(config, folder, progress=False)
    batches = make_eval_iterator(config.data, batch_size=100)
    before = evaluate(load_run(source_run, weights="raw").model, batches)
    for weights in ("raw", "ema"):
        assert result.metrics[f"{weights}_loss"] == pytest.approx(before["loss"], rel=1e-3)
    table = json.loads((folder / "init.json").read_text())
    assert table["parameters"]["head.bias"] == "taken" and "raw weights" in table["source"]
    assert train(config, folder, progress=False).metrics == result.metrics
    with pytest.raises(UserError, match=r"(?s)init: None there.*--init .*source --run-dir NEW"):
        train(dataclasses.replace(config, init_weights=None), source_run, progress=False)


def test_init_options_without_init_are_refused():
    with pytest.raises(UserError, match="say how to use init"):
        tiny_config(init_allow=("head.*",))


def test_leaves_of_which_some_blocks_are_given_keep_the_others(source_run):
    deeper = build(tiny_model(depth=3), seed=3)
    before = arrays_of(deeper)
    load_weights(deeper, source_run, allow=("blocks.2.*",))
    after, trained = arrays_of(deeper), arrays_of(load_run(source_run).model)
    name = "mixer.in_proj.kernel"
    np.testing.assert_array_equal(after[f"blocks.2.{name}"], before[f"blocks.2.{name}"])
    np.testing.assert_array_equal(after[f"blocks.1.{name}"], trained[f"blocks.1.{name}"])
    assert jax.tree.leaves(nnx.state(deeper))[0].dtype == np.float32


def test_a_classifier_starts_from_a_masked_autoencoder_and_from_a_saved_model(tmp_path):
    """Start a classifier: the encoder enters, and its fixed positions become the learned ones' first values.

    The decoder is left out.
    """
    classifier = build(seed=2)
    encoder = dataclasses.replace(MODEL, num_classes=0, drop_path=0.0)
    masked = build_model(
        MaskedAutoencoderConfig(encoder=encoder, decoder_dim=8, decoder_depth=1), rngs=nnx.Rngs(4)
    )
    save_pretrained(masked, tmp_path / "masked", preprocessing=Preprocessing((8, 8)))
    report = load_weights(classifier, tmp_path / "masked")
    assert set(report.names("drawn")) == {"head.kernel", "head.bias"}
    assert all(name.startswith("decoder.") for name in report.names("left"))
    for name, value in backbone_parameters(masked).items():
        np.testing.assert_array_equal(arrays_of(classifier)[name], value)

    save_pretrained(classifier, tmp_path / "saved", preprocessing=Preprocessing((8, 8)))
    other = build(tiny_model(depth=2, image_size=16), seed=9)
    assert load_weights(other, tmp_path / "saved").names("resized") == ["pos_embed"]
