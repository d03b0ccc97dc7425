"""Exported programs: the live model's numbers, by a script that imports JAX and NumPy alone."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fastvim_jax import UserError, save_pretrained
from fastvim_jax.cli.main import main
from fastvim_jax.data.device_transforms import make_preprocess
from fastvim_jax.inference.export import export_classifier
from fastvim_jax.inference.preprocessing import preprocessing_of
from fastvim_jax.models import build_model
from fastvim_jax.models.pretrained import Pretrained
from fastvim_jax.training import Run
from tests.pallas_kernels.mosaic_support import abstract_h100
from tests.support import ROOT
from tests.training.tiny import tiny_config, tiny_model

NAMES = tuple("zero one two three four five six seven eight nine".split())

EXPORTED = ROOT / "tests" / "inference" / "exported"
MESSAGE = "Failed to deserialize StableHLO"


def make_run(key, **changes):
    config = tiny_config(model=tiny_model(**changes))
    if config.model.image_size != config.data.height_width:
        raise AssertionError
    return Run(build_model(config.model, rngs=nnx.Rngs(key)), config, NAMES, 7, "ema")


def the_documented_script():
    text = (ROOT / "docs" / "inference.md").read_text()
    return text.split("```python\n# load an exported program\n")[1].split("```")[0]


def called(file):
    with np.load(file) as arrays:
        about = json.loads(str(arrays["about"]))
        program = jax.export.deserialize(bytearray(arrays["program"].tobytes()))
        weights = [arrays[f"weight_{i}"] for i in range(about["weights"])]
    return np.asarray(program.call(weights, np.full((1, *about["image"]), 200, np.uint8)))


@pytest.mark.drawn("commands", one_in=6)
def test_a_saved_model_gives_the_program_of_its_run(tmp_path, key):
    run = make_run(key)
    preprocessing = preprocessing_of(run)
    save_pretrained(run.model, tmp_path / "saved", preprocessing=preprocessing, class_names=NAMES)
    of_run = export_classifier(run, tmp_path / "run.npz", batch=1)
    command = ["export", str(tmp_path / "saved"), "--out", str(tmp_path / "saved.npz")]
    assert main([*command, "--batch", "1"]) == 0
    with np.load(tmp_path / "saved.npz") as saved, np.load(tmp_path / "run.npz") as file:
        about = json.loads(str(saved["about"]))
        for i in range(about["weights"]):
            np.testing.assert_array_equal(saved[f"weight_{i}"], file[f"weight_{i}"])
    for name in ("weights", "image", "preprocess", "classes"):
        assert about[name] == json.loads(json.dumps(of_run[name])), name
    # The same program, but for the lines of source it names.
    logits = [called(tmp_path / name) for name in ("run.npz", "saved.npz")]
    np.testing.assert_array_equal(*logits)
    no_classes = Pretrained(build_model(tiny_model(num_classes=0), rngs=0), preprocessing, ())
    with pytest.raises(UserError, match="0 classes"):
        export_classifier(no_classes, tmp_path / "model.npz")


@pytest.mark.drawn("commands", one_in=6)
@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_a_portable_program_takes_any_batch_and_runs_alone(tmp_path, key, rng, pooling):
    run = make_run(key, pooling=pooling, depth=2)  # lines of both axes, of any batch
    about = export_classifier(run, tmp_path / "model.npz")
    assert about["batch"] is None and about["platforms"] == ("cpu", "cuda")
    images = rng.integers(0, 256, (5, 8, 8, 1), np.uint8)
    np.save(tmp_path / "images.npy", images)
    script = the_documented_script()
    imports = [node for node in ast.parse(script).body if isinstance(node, ast.Import)]
    assert "from " not in script
    named = {alias.name for node in imports for alias in node.names}
    assert named == {"hashlib", "json", "jax", "numpy"}
    assert sum(bool(line) for line in script.splitlines()) == 10
    script += "\nassert not [name for name in sys.modules if name.startswith('fastvim')]\n"
    script += "np.save('logits.npy', logits)\n"
    script += "assert 'stablehlo.' in jax.export.deserialize(bytearray(program)).mlir_module()"
    subprocess.run([sys.executable, "-c", "import sys\n" + script], cwd=tmp_path, check=True)
    expected = run.model(make_preprocess(run.config.data)(jnp.asarray(images)))
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("file", sorted(EXPORTED.glob("jax_*.npz")), ids=lambda file: file.stem)
def test_programs_of_other_versions_run_as_the_documentation_says(tmp_path, file, monkeypatch):
    """JAX 0.10 reads what it wrote, and later versions read the programs of all."""
    with np.load(file) as arrays:
        images, logits = arrays["images"], arrays["logits"]
        written_by = json.loads(str(arrays["about"]))["versions"]["jax"]
    assert file.stem == f"jax_{written_by}"
    np.save(tmp_path / "images.npy", images)
    (tmp_path / "model.npz").write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    script, found = the_documented_script(), {}
    try:
        if jax.__version_info__ < (0, 11) and not written_by.startswith("0.10."):
            with pytest.raises(jax.errors.JaxRuntimeError, match=MESSAGE):
                exec(script, found)
            return
        exec(script, found)
        np.testing.assert_allclose(found["logits"], logits, rtol=2e-5, atol=2e-5)
    finally:
        found["file"].close()


def test_the_page_names_the_versions_and_the_message():
    page = (ROOT / "docs" / "inference.md").read_text()
    assert MESSAGE in page
    for file in EXPORTED.glob("jax_*.npz"):
        assert file.stem.removeprefix("jax_").rpartition(".")[0] in page, file


def test_the_file_says_what_is_in_it(tmp_path, key):
    run = make_run(key)
    export_classifier(run, tmp_path / "model.npz", batch=3)
    with np.load(tmp_path / "model.npz") as file:  # refuses pickles
        about = json.loads(str(file["about"]))
        assert len([name for name in file.files if name.startswith("weight_")]) == about["weights"]
    assert about["classes"] == list(NAMES) and about["batch"] == 3 and about["averaged"]
    assert about["image"] == [8, 8, 1] and about["preprocess"]["mean"] == [0.3]


@pytest.mark.drawn("commands", one_in=6)
def test_a_fast_program_holds_the_kernels(tmp_path, key):
    run = make_run(key, embed_dim=64, depth=1)
    with pytest.raises(
        UserError, match="a fast program can only be exported on a machine that runs it"
    ):
        export_classifier(run, tmp_path / "model.npz", fast=True, batch=2)
    with pytest.raises(UserError, match="takes one batch size"):
        export_classifier(run, tmp_path / "model.npz", fast=True)
    if jax.__version_info__ < (0, 11, 1):
        pytest.skip("no kernels for this JAX")
    with abstract_h100():
        about = export_classifier(run, tmp_path / "model.npz", fast=True, batch=2)
    assert about["platforms"] == ("cuda",) and about["batch"] == 2


def test_other_names_and_sizes_are_refused(tmp_path, key):
    run = make_run(key)
    with pytest.raises(UserError, match="ends in .npz"):
        export_classifier(run, tmp_path / "model.bin")
    with pytest.raises(UserError, match="batch=0"):
        export_classifier(run, tmp_path / "model.npz", batch=0)
