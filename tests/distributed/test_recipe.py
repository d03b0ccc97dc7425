"""A run with all that the recipe has, on two processes of two devices, makes the steps that are written out by hand.

Flip, RandAugment, erasing, mixup, cutmix, smoothing, drop path, accumulation, clipping, decay groups, the schedule and
the average of the weights are on. The batches and the random draws are shared; all else is plain JAX in recipe.py. The
first process alone lists the images.
"""

from pathlib import Path

import pytest

from tests.distributed.test_many_devices import finish, launch, together


@pytest.mark.slow
@pytest.mark.drawn("runs on several devices", one_in=20)
def test_the_trainer_makes_the_steps_of_the_recipe(tmp_path: Path) -> None:
    together("recipe.py", "train", str(tmp_path))
    finish(launch("recipe.py", "compare", str(tmp_path), devices=1))
