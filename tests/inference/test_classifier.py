"""A classifier from Python: what goes in, in which mixture, decides nothing but the order of what comes out."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from fastvim_jax import Classifier, UserError, save_pretrained
from fastvim_jax.data import load_image
from fastvim_jax.data.augment import eval_transform
from fastvim_jax.data.device_transforms import make_preprocess
from fastvim_jax.data.stream import WorkersEnded
from fastvim_jax.inference.classifier import MAPS, OUTPUTS
from fastvim_jax.inference.decoding import decoding_workers
from fastvim_jax.inference.export import export_classifier
from fastvim_jax.inference.image_files import find_images
from fastvim_jax.inference.predict import predict_files
from fastvim_jax.models import VisionMambaConfig, build_model, shares
from fastvim_jax.models.channel_mamba import ChannelMambaConfig
from fastvim_jax.models.pretrained import Pretrained
from fastvim_jax.models.saving import Preprocessing
from tests.support import ROOT

SIZES = {"image_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_classes": 3}
PREPROCESSING = Preprocessing((8, 8), 0.9, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def model():
    return build_model(VisionMambaConfig(**SIZES), rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def classifier(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_pretrained(model, folder, preprocessing=PREPROCESSING, class_names=("a", "b", "c"))
    return Classifier.load(folder, batch_size=4)


@pytest.fixture
def files(tmp_path, rng):
    paths = []
    for i, size in enumerate([(9, 12), (20, 8), (8, 8), (31, 17), (12, 12), (10, 40)]):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(paths[-1])
    return paths


def expected(model, classifier, files):
    pixels = np.stack([load_image(file, classifier.data) for file in files])
    images = make_preprocess(classifier.data)(jnp.asarray(pixels))
    return np.asarray(model(images)), np.asarray(model.features(images))


@pytest.mark.drawn("commands", one_in=6)
def test_paths_images_and_arrays_give_the_same(model, classifier, files):
    logits, features = expected(model, classifier, files)
    mixed = [
        str(files[0]), Image.open(files[1]), np.asarray(Image.open(files[2])),
        files[3], Image.open(files[4]).convert("RGBA"), np.asarray(Image.open(files[5])),
    ]  # fmt: skip
    for images in (files, mixed):
        found = classifier(images)
        np.testing.assert_allclose(found.logits, logits, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(found.embeddings, features, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(
            found.probabilities, jax.nn.softmax(logits), rtol=2e-4, atol=2e-5
        )
        assert found.errors == {}
    assert classifier.class_names == ("a", "b", "c")


def test_one_pillow_image_may_stand_at_several_places(classifier, tmp_path, rng):
    """Decode one Pillow image at several places.

    Two threads that loaded it at the same time, for one batch or two, would read each other's parts of the file.
    """
    file = tmp_path / "large.png"
    Image.fromarray(rng.integers(0, 256, (400, 400, 3), np.uint8)).save(file)
    expected = load_image(file, classifier.data)
    for _ in range(4):
        batches = list(classifier.decoded([Image.open(file)] * 12))
        assert [start for start, _, _ in batches] == [0, 4, 8]
        for _, batch, errors in batches:
            assert errors == {}
            np.testing.assert_array_equal(batch, np.stack([expected] * 4))


@pytest.mark.drawn("commands", one_in=6)
def test_one_image_and_none(model, classifier, files):
    logits, _ = expected(model, classifier, files[:1])
    for image in (files[0], Image.open(files[0]), np.asarray(Image.open(files[0]))):
        np.testing.assert_allclose(classifier(image).logits, logits, rtol=2e-4, atol=2e-5)
    empty = classifier([])
    assert empty.logits.shape == (0, 3) and empty.embeddings.shape == (0, 8)


def test_one_path_is_one_file_and_no_list_of_letters(classifier, files):
    for file in (str(files[0]), Path(files[0])):
        (one,), (same,) = predict_files(classifier, file), predict_files(classifier, [file])
        assert one == same and one.file == str(files[0]) and one.error is None
        assert find_images(file) == [str(files[0])]


def test_one_program_serves_every_number_of_images(classifier, files):
    classifier.compile()
    for count in (1, 3, 4, 6):
        assert classifier(files[:count]).logits.shape == (count, 3)


@pytest.mark.parametrize("ahead", [False, True])
def test_the_cores_of_a_cpu_share_a_batch(model, files, monkeypatch, ahead):
    monkeypatch.setattr(shares, "local_cores", lambda: 2)
    wide = {"logits", "probabilities", "embeddings", "features"}
    classifier = Classifier(model, PREPROCESSING, batch_size=4, outputs=sorted(wide))
    sizes = []
    program = classifier._run

    def run(weights, images):
        sizes.append(len(images))
        return program(weights, images)

    if ahead:
        classifier.compile()
    else:
        classifier._run = run
    result = classifier(files)
    logits, features = expected(model, classifier, files)
    np.testing.assert_allclose(result.logits, logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.embeddings, features, rtol=1e-5, atol=1e-6)
    assert result.features.shape == (6, 2, 2, 8)
    assert sizes == ([] if ahead else [2] * 4)


@pytest.mark.drawn("commands", one_in=6)
def test_only_what_is_asked_for_is_computed(model, classifier, files):
    some = Classifier(model, PREPROCESSING, batch_size=4, outputs=["probabilities"])
    found = some(files)
    np.testing.assert_allclose(
        found.probabilities, classifier(files).probabilities, rtol=1e-5, atol=1e-6
    )
    assert found.logits.shape == found.embeddings.shape == (len(files), 0)
    assert list(some.forward(jnp.zeros((4, 8, 8, 3), jnp.uint8))) == ["probabilities"]
    for outputs in (["logit"], []):
        with pytest.raises(UserError, match="choose from logits, probabilities"):
            Classifier(model, PREPROCESSING, outputs=outputs)


def test_features_and_class_maps_of_every_patch(model, files):
    found = Classifier(model, PREPROCESSING, batch_size=2, outputs=(*OUTPUTS, *MAPS))(
        [*files[:2], "missing.png"]
    )
    assert found.features.shape == (3, 2, 2, 8) and found.class_maps.shape == (3, 2, 2, 3)
    # FastVim's head reads the mean of the tokens, and is linear.
    np.testing.assert_allclose(
        found.features.mean(axis=(1, 2))[:2], found.embeddings[:2], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        found.class_maps.mean(axis=(1, 2))[:2], found.logits[:2], rtol=1e-5, atol=1e-6
    )
    assert np.isnan(found.class_maps[2]).all() and np.isfinite(found.class_maps[:2]).all()


@pytest.mark.drawn("commands", one_in=6)
@pytest.mark.parametrize("order", ["row", "column"])
def test_a_patch_s_features_lie_where_the_patch_is(order):
    """Place a patch's features in a grid of two rows and three columns; the class token is left out."""
    model = build_model(
        VisionMambaConfig(**{**SIZES, "image_size": (8, 12)}, pooling="none", class_token="middle", token_order=order),
        rngs=nnx.Rngs(1),
    )  # fmt: skip
    images = jax.random.normal(jax.random.key(1), (2, 8, 12, 3))
    tokens = model.forward_features(images)
    maps = model.feature_maps(tokens, (8, 12))
    assert maps.shape == (2, 2, 3, 8)
    (expected,) = model.get_intermediate_layers(images, 1, reshape=True, norm=True)
    np.testing.assert_allclose(maps, expected, rtol=1e-5, atol=1e-6)
    plain = build_model(VisionMambaConfig(**{**SIZES, "num_classes": 0}), rngs=nnx.Rngs(1))
    with pytest.raises(UserError, match="class_maps needs a head"):
        plain.class_maps(maps)


@pytest.mark.drawn("commands", one_in=6)
def test_two_devices_share_a_batch(model, files, tmp_path):
    """Compare two simulated devices, in another process, with one device."""
    save_pretrained(model, tmp_path / "model", preprocessing=PREPROCESSING)
    script = f"""
import jax, numpy as np
from fastvim_jax import Classifier
classifier = Classifier.load({str(tmp_path / "model")!r}, batch_size=3).compile()
assert len(jax.local_devices()) == 2 and classifier.batch_size == 4
np.save({str(tmp_path / "logits.npy")!r}, classifier({[str(f) for f in files]!r}).logits)
"""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    two = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env={**os.environ, **two})
    one = Classifier(model, PREPROCESSING, batch_size=4)(files)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), one.logits, rtol=2e-4, atol=2e-5)


def test_a_gpu_computes_in_bfloat16_unless_told_otherwise(model, monkeypatch):
    """Choose bfloat16 on a GPU only.

    The test sees which model is built; a stand-in for the device tells its platform alone.
    """
    built = []
    monkeypatch.setattr(
        "fastvim_jax.inference.classifier.build_model",
        lambda config, rngs: built.append(config) or build_model(config, rngs=rngs),
    )
    for platform, dtype, expected in (
        ("gpu", None, "bfloat16"), ("gpu", "float32", "float32"), ("cpu", None, "float32"),
    ):  # fmt: skip
        monkeypatch.setattr("fastvim_jax.inference.classifier.platform_of", lambda _, p=platform: p)
        Classifier(model, PREPROCESSING, dtype=dtype)
        assert built[-1].dtype == expected
        assert built[-1].activations == ("compute" if expected == "bfloat16" else "wide")
        assert built[-1].blocks == ("unroll" if expected == "bfloat16" else "scan")
    monkeypatch.setattr("fastvim_jax.inference.classifier.platform_of", lambda _: "gpu")
    Classifier(model, PREPROCESSING, blocks="scan")
    assert (built[-1].dtype, built[-1].blocks) == ("bfloat16", "scan")


def test_pixels_of_the_model_s_size_are_taken_as_they_are(classifier, rng):
    size = (*classifier.data.height_width, classifier.data.channels)
    image = rng.integers(0, 256, size, dtype=np.uint8)
    uncut = copy.copy(classifier)
    uncut.data = dataclasses.replace(classifier.data, eval_crop=1.0)
    resized = eval_transform(Image.fromarray(image), uncut.data)
    ((_, batch, _),) = uncut.decoded([image])
    np.testing.assert_array_equal(batch[0], resized)
    np.testing.assert_array_equal(resized, image)


def test_models_of_cell_images_are_refused():
    config = ChannelMambaConfig(**SIZES)
    cells = build_model(config, rngs=nnx.Rngs(1))
    with pytest.raises(UserError, match="of 8 channels classifies no photographs"):
        Classifier(cells, Preprocessing((8, 8), 1.0, (0.0,) * 8, (1.0,) * 8))


def test_what_cannot_be_read_is_nan_and_named(classifier, files, tmp_path):
    (tmp_path / "no.jpg").write_text("no image")
    found = classifier([files[0], tmp_path / "no.jpg", files[1], tmp_path / "missing.png"])
    assert sorted(found.errors) == [1, 3] and "no.jpg" in found.errors[1]
    assert np.isnan(found.logits[[1, 3]]).all() and np.isfinite(found.probabilities[[0, 2]]).all()


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((2, 2)), "images have shape"),
        ([np.zeros((8, 8, 3))], "of uint8"),
        ([np.zeros((8, 8, 5), np.uint8)], "with 1 or 3 channels"),
        (3, "images cannot be int"),
    ],
)
def test_other_arrays_are_refused(classifier, images, said):
    with pytest.raises(UserError, match=said):
        classifier(images)


def test_models_without_classes_embed_and_do_no_more(model, classifier, files):
    plain = build_model(VisionMambaConfig(**{**SIZES, "num_classes": 0}), rngs=nnx.Rngs(1))
    with pytest.raises(UserError, match="without classes classifies nothing; `fastvim embed`"):
        Classifier(plain, PREPROCESSING)
    params = {k: v for k, v in nnx.state(model).items() if k != "head"}
    nnx.update(plain, nnx.State(params))
    found = Classifier(plain, PREPROCESSING, batch_size=4, outputs=["embeddings"])(files)
    assert found.logits.shape == found.probabilities.shape == (len(files), 0)
    np.testing.assert_allclose(found.embeddings, classifier(files).embeddings, rtol=1e-5, atol=1e-6)


@pytest.mark.drawn("commands", one_in=6)
def test_heads_that_read_every_patch(files):
    """Give an image one embedding where the head takes the maximum over patches, and none where it gives all."""
    models = {
        pool: build_model(VisionMambaConfig(**SIZES, head_pool=pool), rngs=nnx.Rngs(1))
        for pool in ("max", "all")
    }
    outputs = ["embeddings", "features"]
    found = Classifier(models["max"], PREPROCESSING, batch_size=2, outputs=outputs)(files[:2])
    np.testing.assert_array_equal(found.embeddings, found.features.max((1, 2)))
    with pytest.raises(UserError, match="logits of every patch, none of the whole image"):
        Classifier(models["all"], PREPROCESSING)
    with pytest.raises(UserError, match="not models of feature maps"):
        export_classifier(Pretrained(models["all"], PREPROCESSING, ()), "all.npz")


def test_processes_decode_what_threads_decode(classifier, files, tmp_path):
    """Compare workers with threads: the same pixels and messages, in the same order."""
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no image")
    names = [*files, damaged, *files]
    by_threads = classifier(names)
    by_processes = copy.copy(classifier)
    by_processes.workers = 2
    found = by_processes(names)
    assert found.errors == by_threads.errors and list(found.errors) == [len(files)]
    np.testing.assert_array_equal(found.logits, by_threads.logits)
    assert not np.array_equal(found.logits[0], found.logits[1])


def test_batches_built_at_the_same_time_keep_their_order(classifier, rng):
    """Keep the order of batches built at the same time. One array needs no copy on the host; a list of arrays does."""
    cropped = copy.copy(classifier)
    cropped.data = dataclasses.replace(classifier.data, eval_crop=1.0)
    images = rng.integers(0, 256, (27, 8, 8, 3), np.uint8)
    one_array = cropped(images).logits
    np.testing.assert_array_equal(cropped(list(images)).logits, one_array)
    single = np.concatenate([cropped(image).logits for image in images])
    np.testing.assert_allclose(single, one_array, rtol=1e-5, atol=1e-6)
    assert len(np.unique(one_array[:, 0])) == len(images)


def test_threads_decode_where_shared_memory_is_too_small(classifier, files, monkeypatch, caplog):
    """Fall back to threads where shared memory is too small, as in a container with 64 MB.

    A warning says so, and no run ends for it.
    """

    def full(*arguments, **options):
        raise UserError("/dev/shm has 0 MiB free")

    expected = classifier(files).logits
    monkeypatch.setattr("fastvim_jax.inference.decoding.grain_stream", full)
    by_processes = copy.copy(classifier)
    by_processes.workers = 2
    np.testing.assert_array_equal(by_processes(files).logits, expected)
    assert "/dev/shm has 0 MiB free" in caplog.text


def test_threads_decode_without_shared_memory(classifier, files, tmp_path, monkeypatch, caplog):
    expected = classifier(files).logits
    monkeypatch.setattr("fastvim_jax.inference.decoding.SHARED", str(tmp_path / "none"))
    monkeypatch.setattr("sys.platform", "linux")
    by_processes = copy.copy(classifier)
    by_processes.workers = 2
    np.testing.assert_array_equal(by_processes(files).logits, expected)
    assert "is missing or read-only" in caplog.text


def test_a_script_that_its_processes_cannot_import_is_told(classifier, files, monkeypatch):
    """Refuse a script without `if __name__ == "__main__":`, which every process would begin again."""

    def ended(first):
        raise WorkersEnded("a data worker ended with exit code 1.")
        yield

    monkeypatch.setattr("fastvim_jax.inference.decoding.grain_stream", lambda *_, **__: ended)
    by_processes = copy.copy(classifier)
    by_processes.workers = 2
    with pytest.raises(UserError, match="below `if __name__ == .*__main__"):
        by_processes(files)


def test_a_buffer_that_is_used_again_keeps_nothing(classifier, files, tmp_path, monkeypatch):
    """Clear a reused buffer: places of bad files and of the padding are zero, not an earlier image.

    The test copies each batch, as a GPU does.
    """
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    names = [*files, *files, bad, files[0], bad, files[1], files[2]]
    expected = [(np.array(batch), errors) for _, batch, errors in classifier.decoded(names)]
    place, placed = jax.device_put, []

    def copied(batch, sharding):
        placed.append(batch)
        return place(batch.copy(), sharding)

    monkeypatch.setattr("fastvim_jax.inference.decoding._copies", lambda sharding: True)
    monkeypatch.setattr("fastvim_jax.inference.decoding.AHEAD", 1)
    monkeypatch.setattr(jax, "device_put", copied)
    found = [(np.array(batch), errors) for _, batch, errors in classifier.decoded(names)]
    assert len(set(map(id, placed))) < len(placed) == len(expected) == 5
    for (got, errors), (wanted, said) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert errors == said
    assert not found[3][0][[0, 2]].any() and not found[4][0][1:].any()


@pytest.mark.parametrize(
    ("found", "files", "expected"), [(2, 4999, 0), (2, 5000, 2), (192, 10**6, 16)]
)
def test_processes_decode_many_files_but_not_one_on_every_core_of_a_server(
    monkeypatch, found, files, expected
):
    monkeypatch.setattr("fastvim_jax.inference.decoding.own_cores", lambda: found)
    assert decoding_workers(files) == expected
    assert decoding_workers(files, 40) == 40
