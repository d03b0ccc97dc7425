"""The same run on 1, 2, 4 and 8 simulated devices, in one and in two processes, gives the same numbers.

Tolerances: 1e-9 of the loss in float64, 1e-5 in float32, both for the first ten steps; whole runs of the trainer in
float64 1e-10 in every number of the log, and exactly the same counts. The augmented images are float32, and without
optimisation each program rounds them in its own way: up to 2e-10 of the loss, and 4e-16 with images exact in float64.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastvim_jax.data import open_source
from fastvim_jax.data.prepare.shards import prepare
from fastvim_jax.training import read_metrics
from fastvim_jax.training.clock import TIMING
from tests.distributed.two import PROCESSES
from tests.support import ROOT
from tests.training.tiny import EVAL_IMAGES, STEPS_PER_EPOCH

HERE = Path(__file__).parent
# Each compiles a training step: every option stands once, on a mesh of its own. Beside it, the largest share of the
# state that a device may hold, and the most entries that are gathered at once: the largest parameter of a block has
# 16 × 64, the two blocks of `unroll` gather theirs together, and the activations of a batch have 32 × 16 × 16 and more.
MESHES = {
    "float64-2x1-accumulate2": (1.0, 0),
    "float64-2x2-unroll": (0.7, 2 * 16 * 64),
    "float64-8x1": (1.0, 0),
    "float64-1x8-remat": (0.22, 16 * 64),
    "float64-2x4-accumulate4": (0.35, 16 * 64),
}
SINGLE = "float32-2x4-accumulate4"
QUICK = ("float32-2x4-accumulate2-vit-unroll", "float32-1x1-vit")


def launch(program: str, *arguments: str, devices: int, **variables: str) -> subprocess.Popen:
    # Level 1 of the optimiser compiles twice as long as level 0 (a tiny FastVim's gradient: 3.6 s against 1.8 s).
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return subprocess.Popen(
        [sys.executable, str(HERE / program), *arguments],
        env=os.environ
        | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen) -> list[str]:
    """Wait for processes that must end well, and return what they printed."""
    try:
        outputs = [process.communicate(timeout=1200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-5000:]
    return outputs


def curves(folder: Path, *names: str) -> dict:
    finish(launch("curves.py", str(folder / "out.json"), *names, devices=8))
    return json.loads((folder / "out.json").read_text())


def together(program: str, *arguments: str) -> None:
    """Run a program in two processes of two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    finish(*(launch(program, *arguments, devices=2, **common, **process) for process in PROCESSES))


def test_eight_devices_and_one_give_the_same_curve(tmp_path):
    """Compare eight devices with one, quickly.

    Data × fsdp and accumulation at once, drop path and all augmentation on.
    """
    results = curves(tmp_path, *QUICK)
    (eight, share, _), (one, whole, _) = (results[name] for name in QUICK)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert share < 0.4 and whole == 1.0
    assert one[-1] < one[0] - 0.01


def cases_of(request, test: str) -> list[str]:
    """Return the names that a test of this session is run with, so that a fixture makes no more than these."""
    run = (item for item in request.session.items if item.nodeid.partition("[")[0].endswith(test))
    return [item.callspec.params["name"] for item in run]


@pytest.fixture(scope="module")
def float64(request, tmp_path_factory):
    meshes = cases_of(request, "::test_the_mesh_does_not_change_the_curve")
    return curves(tmp_path_factory.mktemp("curves"), "float64-1x1", *meshes)


@pytest.mark.slow
@pytest.mark.drawn("runs on several devices", one_in=20)
@pytest.mark.parametrize("name", MESHES)
def test_the_mesh_does_not_change_the_curve(float64, name):
    """Compare loss curves of several meshes. FSDP spreads the state, and gathers nothing but single parameters."""
    losses, *_ = float64["float64-1x1"]
    curve, share, gathered = float64[name]
    np.testing.assert_allclose(curve, losses, rtol=1e-9)
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.01
    largest_share, most = MESHES[name]
    assert share == 1.0 if largest_share == 1.0 else share < largest_share
    assert gathered <= most and (gathered > 0) == (most > 0)


@pytest.mark.slow
@pytest.mark.drawn("runs on several devices", one_in=20)
def test_the_mesh_does_not_change_the_curve_in_float32(tmp_path):
    results = curves(tmp_path, "float32-1x1", SINGLE)
    np.testing.assert_allclose(results[SINGLE][0], results["float32-1x1"][0], rtol=1e-5)


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Return a run on one device, and one broken off on eight and taken up on others; see runs.py."""
    folder = tmp_path_factory.mktemp("runs")
    resumed = {"one": "one=spread:1x1", "four": "four=spread:2x2"}
    names = cases_of(request, "::test_a_checkpoint_of_eight_devices_goes_on_where_others_are")
    jobs = ("whole:1x1", "spread:1x8:15", *(resumed[name] for name in names), "whole:score")
    finish(launch("runs.py", str(folder), *jobs, devices=8))
    return folder


@pytest.fixture(scope="module")
def two_processes(request, runs):
    """Return a run in two processes, and the one broken off on eight devices of one process taken up by two."""
    names = cases_of(request, "::test_two_processes_give_the_same_run_and_count_exactly")
    begun = ["two:4x1"] if "two" in names else []
    together("runs.py", str(runs), *begun, "moved=spread:2x2", "moved:score")
    return runs


def assert_same_log(folder: Path, other: Path) -> None:
    mine, theirs = read_metrics(folder), read_metrics(other)
    assert (
        len(mine) == len(theirs) == 2 * STEPS_PER_EPOCH + 2 + 2
    )  # evaluations and norms of two epochs
    for record, expected in zip(mine, theirs, strict=True):
        assert record.keys() - TIMING == expected.keys() - TIMING
        for key in record.keys() - TIMING - {"kind"}:
            np.testing.assert_allclose(
                record[key], expected[key], rtol=1e-10, atol=1e-12, err_msg=key
            )
        if record["kind"] == "eval":
            assert record["count"] == EVAL_IMAGES
            for key in ("raw_top1", "ema_top1", "raw_top5", "ema_top5"):
                assert record[key] == expected[key]


@pytest.mark.slow
@pytest.mark.drawn("runs on several devices", one_in=20)
@pytest.mark.parametrize("name", ["one", "four"])
def test_a_checkpoint_of_eight_devices_goes_on_where_others_are(runs, name):
    assert_same_log(runs / name, runs / "whole")


@pytest.mark.slow
@pytest.mark.drawn("runs on several devices", one_in=20)
@pytest.mark.parametrize("name", ["two", "moved"])
def test_two_processes_give_the_same_run_and_count_exactly(two_processes, name):
    """Compare two processes on 4 × 1 and 2 × 2 devices with one; what process 0 wrote is the whole run folder."""
    assert_same_log(two_processes / name, two_processes / "whole")


@pytest.mark.drawn("runs on several devices", one_in=20)
@pytest.mark.slow
def test_two_processes_score_a_run_as_one_does(two_processes):
    """Evaluate in two processes as in one: all weights, by class. The folder was written on other devices."""
    mine, theirs = (
        json.loads((two_processes / name / "scores.json").read_text())
        for name in ("moved", "whole")
    )
    for weights in ("raw", "ema"):
        np.testing.assert_allclose(
            mine[weights].pop("loss"), theirs[weights].pop("loss"), rtol=1e-10
        )
        assert np.sum(mine[weights]["confusion"]) == mine[weights]["count"] == EVAL_IMAGES
    assert mine == theirs


@pytest.mark.slow
@pytest.mark.drawn("runs on several devices", one_in=20)
def test_a_resident_set_in_shares_is_the_same_in_two_processes(tmp_path, seed):
    """Compare a resident set in shares.

    Each process keeps and gathers its own devices' shares, and none sends an image.
    """
    finish(launch("shares.py", str(tmp_path / "one.npz"), str(seed), devices=4))
    together("shares.py", str(tmp_path / "two.npz"), str(seed))
    _assert_close(tmp_path)


@pytest.mark.slow
@pytest.mark.drawn("runs on several devices", one_in=20)
def test_pixel_shards_are_cropped_alike_in_two_processes(tmp_path, seed):
    """Compare crops of pixel shards: each process reads its own devices' rows, and none sends an image."""
    digits = open_source("digits", "train[:40]")
    prepare(digits, tmp_path / "pixels", "train", pixels=8)
    more = (str(seed), str(tmp_path / "pixels"))
    finish(launch("shares.py", str(tmp_path / "one.npz"), *more, devices=4))
    together("shares.py", str(tmp_path / "two.npz"), *more)
    _assert_close(tmp_path)


def _assert_close(folder: Path) -> None:
    with np.load(folder / "one.npz") as one, np.load(folder / "two.npz") as two:
        assert set(one) == {"kept", "image", "label"}
        for name in one:
            np.testing.assert_allclose(two[name], one[name], atol=1e-6)
