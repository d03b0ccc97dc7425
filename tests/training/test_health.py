"""A run that goes wrong stops at the right step and says why."""

import jax.numpy as jnp
import numpy as np
import pytest

from fastvim_jax.training.health import NonFiniteError, Window, likely_cause
from tests.training.tiny import tiny_config, tiny_model

GOOD = {
    "loss": 2.0, "grad_norm": 1.0, "update_norm": 0.1, "param_norm": 9.0, "finite_input": True
}  # fmt: skip


def metrics(**changes):
    return {key: jnp.asarray(value) for key, value in {**GOOD, **changes}.items()}


def record(step=20, **changes):
    values = {key: jnp.asarray(value).item() for key, value in GOOD.items()}  # in float32
    return {"step": step, **values, **changes}


def test_a_window_averages_its_records():
    window = Window(tiny_config(), [record(1, loss=4.0)])
    for step in (2, 3, 4, 5, 6, 7, 8):
        window.add(step, metrics(loss=2.0))
    assert [r["step"] for r in window.fetch(str)] == list(range(1, 9))
    assert window.summarise(str)["loss"] == (4 + 7 * 2) / 8
    assert window.fetch(str) == []


def test_steps_that_measured_no_norms_have_no_part_in_their_means():
    """Leave out such steps; a gradient that is not finite stops the run at once all the same."""
    window = Window(tiny_config())
    plain = {key: GOOD[key] for key in ("loss", "grad_norm", "finite_input")}
    window.add(1, metrics(param_norm=8.0))
    window.add(2, {key: jnp.asarray(value) for key, value in plain.items()})
    window.add(3, metrics(param_norm=10.0, grad_norm=4.0))
    wanted = {"loss": 2.0, "grad_norm": 2.0, "update_norm": 0.1, "param_norm": 9.0}
    assert window.summarise(str) == pytest.approx(wanted)
    plain |= {"grad_norm": np.inf}
    window.add(4, {key: jnp.asarray(value) for key, value in plain.items()})
    with pytest.raises(NonFiniteError, match="grad_norm inf"):
        window.fetch(str)


def test_norms_are_those_of_the_last_step_and_no_part_of_the_records():
    window = Window(tiny_config())
    for step in (1, 2):
        window.add(step, metrics() | {"norms": {"grad": jnp.arange(2.0) * step}})
    assert window.norms(["a", "b.0.c"]) == {"grad/a": 0.0, "grad/b.0.c": 2.0}
    assert window.fetch(str) == [record(1), record(2)]


@pytest.mark.parametrize("name", ["loss", "grad_norm", "update_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_first_step_at_fault_is_named(name, value):
    window = Window(tiny_config())
    for step in range(1, 9):
        window.add(step, metrics(**({name: value} if step >= 6 else {})))
    with pytest.raises(NonFiniteError) as caught:
        window.summarise(lambda: "step 4 in run/checkpoints/4")
    assert caught.value.step == 6
    assert "stopped at step 6" in str(caught.value)
    assert "Last good checkpoint: step 4 in run/checkpoints/4" in str(caught.value)


CALM = [record(step, grad_norm=1.0) for step in range(1, 20)]
WILD = [*CALM[:-1], record(19, grad_norm=500.0)]
HALF = tiny_config(model=tiny_model(dtype="bfloat16"))


@pytest.mark.parametrize(
    ("at_fault", "before", "config", "cause"),
    [
        (record(loss=np.nan, finite_input=False), CALM, tiny_config(), "batch itself holds NaN"),
        (
            record(loss=np.nan, finite_input=False),
            CALM,
            tiny_config(),
            "the device computed wrongly",
        ),
        (record(1, loss=np.inf), [], HALF, "overflow in model.dtype=bfloat16"),
        (record(loss=np.nan), WILD, tiny_config(), "gradients grew from a norm of 1 to 500"),
        (record(grad_norm=np.inf), CALM, HALF, "its gradient overflowed"),
        (record(grad_norm=np.inf), CALM, HALF, "or use model.dtype=float32"),
        (record(update_norm=np.inf), CALM, tiny_config(), "its update overflowed"),
        (record(loss=np.nan), CALM, tiny_config(), "lower optimizer.learning_rate"),
    ],
)
def test_likely_causes(at_fault, before, config, cause):
    assert cause in likely_cause(at_fault, before, config)


def test_an_overflow_of_the_first_update_is_told_from_one_of_the_loss():
    finite = likely_cause(record(1, update_norm=np.inf), [], tiny_config())
    assert "the loss is finite but its update overflowed" in finite
    assert "the first loss is already not finite" in likely_cause(
        record(1, loss=np.nan), [], tiny_config()
    )
