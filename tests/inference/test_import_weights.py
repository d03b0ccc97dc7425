"""Checkpoints under other programs' names become folders that every command takes; each entry is accounted for."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from fastvim_jax import UserError, load_pretrained, to_torch_state_dict
from fastvim_jax.cli.main import main
from fastvim_jax.inference import import_weights
from fastvim_jax.models import VisionMambaConfig, ViTConfig, build_model

SIZES = {"image_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_classes": 5}
CONFIGS = {
    "fastvim": VisionMambaConfig(**SIZES),
    "vim": VisionMambaConfig(**SIZES, pooling="none", class_token="middle"),
    "vit": ViTConfig(**SIZES, num_heads=1),
}


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request, tmp_path_factory):
    model = build_model(CONFIGS[request.param], rngs=nnx.Rngs(2))
    file = tmp_path_factory.mktemp("files") / "model.safetensors"
    save_file({n: np.ascontiguousarray(a) for n, a in to_torch_state_dict(model).items()}, file)
    return file, model


def same(a, b):
    for x, y in zip(jax.tree.leaves(nnx.state(a)), jax.tree.leaves(nnx.state(b)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_command_recognises_the_model_and_keeps_every_bit(checkpoint, tmp_path, capsys):
    file, model = checkpoint
    assert main(["import-weights", str(file), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "64 wide, 2 blocks (recognised from names and shapes)" in said
    assert "CC BY-NC-SA" in said and "taken" in said
    found = load_pretrained(tmp_path / "out").model
    same(found, model)
    assert type(found) is type(model) and found.config.image_size == (16, 16)


def test_another_size_and_other_classes(checkpoint, tmp_path):
    file, model = checkpoint
    (tmp_path / "classes.txt").write_text("cat\ndog\n\nfish\n", "utf-8-sig")
    imported = import_weights(
        file,
        tmp_path / "out",
        options={"image_size": 24, "num_classes": 3},
        classes=tmp_path / "classes.txt",
    )
    assert imported.report.names("resized") == ["pos_embed"]
    assert set(imported.report.names("drawn")) == {"head.kernel", "head.bias"}
    found = load_pretrained(tmp_path / "out")
    assert found.class_names == ("cat", "dog", "fish")
    assert found.model.config.image_size == (24, 24) and found.model.config.num_classes == 3
    np.testing.assert_array_equal(
        found.model.patch_embed.proj.kernel[...], model.patch_embed.proj.kernel[...]
    )


def test_misfits_are_listed(tmp_path):
    weights = to_torch_state_dict(build_model(CONFIGS["fastvim"], rngs=nnx.Rngs(2)))
    weights["layers.0.mixer.extra"] = np.zeros(3, np.float32)
    del weights["layers.1.mixer.D_b"]
    save_file(
        {n: np.ascontiguousarray(a) for n, a in weights.items()}, tmp_path / "odd.safetensors"
    )
    with pytest.raises(UserError) as caught:
        import_weights(tmp_path / "odd.safetensors", tmp_path / "out")
    assert "unexpected: layers.0.mixer.extra" in str(caught.value)
    assert "missing: layers.1.mixer.D_b" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_named_model_that_it_is_not(checkpoint, tmp_path):
    with pytest.raises(UserError, match="do not fit this"):
        import_weights(checkpoint[0], tmp_path / "out", name="fastvim_small_patch16_224")


def test_options_without_a_value(capsys, tmp_path):
    assert main(["import-weights", "a.pth", "--out", str(tmp_path), "--option", "pooling"]) == 1
    assert "write NAME=VALUE" in capsys.readouterr().err
