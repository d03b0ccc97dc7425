"""Who is who among several processes, from each launcher's variables and from halves of them."""

import pytest

from fastvim_jax.distributed import Launch, detect
from fastvim_jax.errors import UserError

MANUAL = {
    "JAX_COORDINATOR_ADDRESS": "head:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "2",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
    "PMIX_NAMESPACE": "prterun-1",
}
KUBERNETES = {
    "JOB_COMPLETION_INDEX": "1",
    "JAX_NUM_PROCESSES": "2",
    "JAX_COORDINATOR_ADDRESS": "train-0.train:1234",
}


def without(environment, *names):
    return {key: value for key, value in environment.items() if key not in names}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HOME": "/home/me", "CUDA_VISIBLE_DEVICES": "0,1"},
        {"JOB_COMPLETION_INDEX": "3"},  # indexed jobs may just as well be independent runs
        {"JAX_NUM_PROCESSES": "1"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
        SLURM | {"JAX_NUM_PROCESSES": "1"},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_a_process_on_its_own(environment):
    assert detect(environment) is None
    assert detect(environment, processes=1) is None


def test_manual_variables_and_flags():
    assert detect(MANUAL) == Launch("head:1234", 4, 2)
    assert detect({}, "head:1", 2, 0) == Launch("head:1", 2, 0)
    assert detect(MANUAL, process=3) == Launch("head:1234", 4, 3)
    assert detect(MANUAL | {"JAX_LOCAL_DEVICE_IDS": "2,3"}) == Launch("head:1234", 4, 2, (2, 3))


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[007-008]", "gpu007"),
        ("gpu[007,010-012],cpu3", "gpu007"),
        ("gpu1,gpu2", "gpu1"),
        ("rack2-gpu[3-4]-ib", "rack2-gpu3-ib"),
        ("alone", "alone"),
    ],
)
def test_slurm_names_the_first_node(nodes, host):
    launch = detect(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert launch == Launch(f"{host}:10077", 16, 11, (3,))


def test_slurm_with_one_process_a_node_gives_it_all_devices():
    launch = detect(SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"})
    assert launch == Launch("gpu007:10077", 2, 1, None)


def test_a_process_that_sees_only_its_own_gpu_takes_it():
    assert detect(SLURM | {"CUDA_VISIBLE_DEVICES": "3"}).local_devices is None
    assert detect(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}).local_devices == (3,)


def test_steps_of_a_job_use_ports_of_their_own():
    ports = {detect(SLURM | {"SLURM_STEP_ID": str(i)}).coordinator for i in range(5)}
    assert len(ports) == 5


def test_open_mpi():
    launch = detect(OPEN_MPI)
    assert (launch.processes, launch.process, launch.local_devices) == (8, 5, (5,))
    assert launch.coordinator.startswith("127.0.0.1:")
    assert detect(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"}).coordinator == launch.coordinator
    assert detect(OPEN_MPI | {"PMIX_NAMESPACE": "another"}).coordinator != launch.coordinator
    hosts = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert detect(hosts | {"JAX_COORDINATOR_ADDRESS": "a:1"}) == Launch("a:1", 8, 5, (1,))
    with pytest.raises(UserError, match="mpirun -x JAX_COORDINATOR_ADDRESS=HOST_OF_RANK_0"):
        detect(hosts)


def test_an_indexed_kubernetes_job():
    assert detect(KUBERNETES) == Launch("train-0.train:1234", 2, 1)


@pytest.mark.parametrize("name", MANUAL)
def test_half_of_the_manual_variables_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"missing.*{name}"):
        detect(without(MANUAL, name))


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"])
def test_half_of_a_kubernetes_job_is_refused_by_name(name):
    with pytest.raises(UserError, match=name):
        detect(without(KUBERNETES, name))


@pytest.mark.parametrize(
    "name", ["SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST"]
)
def test_half_of_slurm_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"SLURM.*{name} is not set"):
        detect(without(SLURM, name))


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "LOCAL_SIZE"])
def test_half_of_open_mpi_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"OMPI_COMM_WORLD_{name} is not set"):
        detect(without(OPEN_MPI, f"OMPI_COMM_WORLD_{name}"))


def test_a_batch_script_without_srun_is_refused():
    script = without(SLURM, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
    with pytest.raises(UserError, match="16 tasks.*not started by srun.*--processes 1"):
        detect(script)
    assert detect(script, processes=1) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_PROCESS_ID": "4"}, "Process 4 of 4"),
        ({"JAX_NUM_PROCESSES": "0"}, "Process 2 of 0"),
        ({"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES is 'four'.*whole number"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID is '-1'"),
        ({"JAX_COORDINATOR_ADDRESS": "head"}, "'head'.*host:port"),
        ({"JAX_LOCAL_DEVICE_IDS": "a"}, "JAX_LOCAL_DEVICE_IDS is 'a'"),
    ],
)
def test_impossible_values_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        detect(MANUAL | change)
