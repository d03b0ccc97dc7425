"""A save ends in every process by itself, because processes notice its end at different steps."""

from __future__ import annotations

from tests.distributed.two import run_two


def test_no_process_waits_for_another_to_finish_a_save(tmp_path):
    """Finish the first save, which is read back, in one process long before the other.

    If the first process waited on its devices for the other, whose devices wait for the first one's next step, a run on
    GPUs would stand still. Then fail a save in the first process alone, which must say so although the other's part of
    this save never ends.
    """
    first, second = (output.splitlines() for output in run_two("saves.py", str(tmp_path)))
    assert "saved 1" in first and first[-1] == "The checkpoint of step 2 could not be written"
    assert second[-1] == "saved 1"
