"""Processes make the same program, although the order of Python's sets differs between them.

Otherwise they sum over the mesh's axes in different orders and wait for each other forever, and JAX's compilation cache
finds a program in one process only.
"""

from __future__ import annotations

import pytest

from tests.distributed.test_many_devices import cases_of, finish, launch
from tests.distributed.two import PROCESSES

ALWAYS = ("fastvim-2x2", "masked-4x1")
DRAWN = (
    "fastvim-scan-4x1", "fastvim-scan-remat-accumulate-2x2", "vit-2x2", "masked-2x2", "channels-4x1",
    "segmentation-4x1", "detection-2x2",
)  # fmt: skip


@pytest.fixture(scope="module")
def programs(request, tmp_path_factory):
    """Return a folder of programs for each of two orders of the axes."""
    names = [*ALWAYS, *cases_of(request, "::test_every_task_has_one_program")]
    folders = [tmp_path_factory.mktemp(each["PYTHONHASHSEED"]) for each in PROCESSES]
    orders = finish(
        *(
            launch("programs.py", str(folder), *names, devices=4, PYTHONHASHSEED=each["PYTHONHASHSEED"])
            for folder, each in zip(folders, PROCESSES, strict=True)
        )
    )  # fmt: skip
    first, second = (order.splitlines()[-1] for order in orders)
    assert {first, second} == {"data fsdp", "fsdp data"}
    return folders


def assert_one_program(folders, name):
    first, second = ((folder / f"{name}.mlir").read_text() for folder in folders)
    assert "num_partitions = 4" in first
    assert first == second


@pytest.mark.parametrize("name", ALWAYS)
def test_the_order_of_sets_changes_no_program(programs, name):
    assert_one_program(programs, name)


@pytest.mark.slow
@pytest.mark.drawn("programs of all tasks", one_in=7)
@pytest.mark.parametrize("name", DRAWN)
def test_every_task_has_one_program(programs, name):
    assert_one_program(programs, name)
