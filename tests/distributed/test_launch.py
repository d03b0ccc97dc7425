"""The launch scripts: valid bash, and what they start is a command that fastvim takes."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from fastvim_jax.cli.train import _arguments
from fastvim_jax.cli.usage import parse
from fastvim_jax.distributed import Launch, detect
from fastvim_jax.training import load_experiment
from tests.support import ROOT

FOLDER = ROOT / "experiments" / "launch"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
ARGUMENTS = {"manual.sh": ["node1:12345", "2", "1"]}

# In place of srun and mpirun: leaves out their options, and starts the rest.
LAUNCHER = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$RECORD.launcher"
while [ "$1" != "$FASTVIM" ]; do shift; done
exec "$@"
"""
FASTVIM = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$RECORD"
env | grep ^JAX_ >> "$RECORD.environment"
exit "${STATUS:-0}"
"""


def run(script: Path, folder: Path, **variables: str) -> tuple[int, list[str], str]:
    """Run a launch script; return its status, fastvim's arguments, and what launchers and the scheduler were asked."""
    for name, text in {
        "srun": LAUNCHER,
        "mpirun": LAUNCHER,
        "fastvim": FASTVIM,
        "scontrol": '#!/usr/bin/env bash\necho "scontrol $*" >> "$RECORD.launcher"\n',
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(folder),
        "FASTVIM": str(folder / "fastvim"),
        "RECORD": str(folder / "record"),
        "SLURM_JOB_ID": "77",
        **variables,
    }
    command = ["bash", str(script), *ARGUMENTS.get(script.name, [])]
    status = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
    launcher = folder / "record.launcher"
    asked = launcher.read_text() if launcher.exists() else ""
    return status, shlex.split((folder / "record").read_text()), asked


def taken(arguments: list[str]):
    """Return what `fastvim` reads from these arguments."""
    command, name, *rest = arguments
    assert command == "train"
    return parse(_arguments(load_experiment(name), Path("runs")), "train", rest, "")


def test_there_is_a_script_for_each_launcher():
    names = {path.name for path in FOLDER.iterdir()}
    assert {"slurm_per_gpu.sh", "slurm_per_node.sh", "open_mpi.sh", "manual.sh"} <= names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_start_what_fastvim_takes(script, tmp_path):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    status, arguments, _ = run(script, tmp_path)
    assert status == 0
    chosen = taken(arguments)
    assert chosen.run_dir == Path("runs/imagenet/fastvim_base")
    assert chosen.config.model.embed_dim == 768
    if script.name == "manual.sh":
        assert (chosen.coordinator, chosen.processes, chosen.process) == ("node1:12345", 2, 1)
        assert detect({}, chosen.coordinator, chosen.processes, chosen.process) == Launch(
            "node1:12345", 2, 1
        )


@pytest.mark.parametrize("name", ["slurm_per_gpu.sh", "slurm_per_node.sh"])
def test_a_job_that_saved_and_stopped_goes_back_into_the_queue(name, tmp_path):
    status, _, asked = run(FOLDER / name, tmp_path, STATUS="75")
    assert status == 75 and "scontrol requeue 77" in asked
    assert "srun --kill-on-bad-exit=1" in asked


@pytest.mark.parametrize("name", ["slurm_per_gpu.sh", "slurm_per_node.sh"])
def test_a_job_that_failed_does_not_go_back_into_the_queue(name, tmp_path):
    status, _, asked = run(FOLDER / name, tmp_path, STATUS="1")
    assert status == 1 and "scontrol" not in asked


def test_open_mpi_tells_all_ranks_where_the_first_is(tmp_path):
    _, _, asked = run(FOLDER / "open_mpi.sh", tmp_path, HOSTS="a,b,c", GPUS="4")
    assert "--host a:4,b:4,c:4 " in asked and "-x JAX_COORDINATOR_ADDRESS" in asked
    assert "JAX_COORDINATOR_ADDRESS=a:12345" in (tmp_path / "record.environment").read_text()


def test_the_kubernetes_job_is_consistent():
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][0] == "fastvim"
    assert taken(container["command"][1:]).config.mesh.fsdp == 8
    environment = {each["name"]: each["value"] for each in container["env"]}
    launch = detect(environment | {"JOB_COMPLETION_INDEX": "3"})
    host = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert launch == Launch(f"{host}:12345", spec["completions"], 3)
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
