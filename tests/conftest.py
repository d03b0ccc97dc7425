"""Set up every test run. The settings must be made before JAX and the packages are imported."""

from __future__ import annotations

import gc
import importlib.util
import os
import secrets
import zlib
from typing import Any

# One XLA thread per worker: the suite runs in parallel processes, and its arrays are small.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
# Compiling is most of the suite's work, and without LLVM's optimisations it takes half the time (gradient of a small
# FastVim: 5.8 s of processor time instead of 13.1 s; 2026-11-23, JAX 0.12.0, two cores).
for flag in ("--xla_cpu_multi_thread_eigen=false", "--xla_backend_optimization_level=0"):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()

# Programs are compiled and thrown away, so the source lines of their operations are not recorded.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# The interpreter of GPU kernels blocks one XLA thread per warpgroup, and one more. XLA has one thread per core. On two
# cores, kernels of two warpgroups sometimes waited forever, and kernels of more warpgroups always.
os.environ.setdefault("PJRT_NPROC", "8")

# Drawn once by the first process; the parallel workers inherit it.
RUN_SEED = int(os.environ.setdefault("FASTVIM_TEST_SEED", str(secrets.randbelow(2**31))))

# Every annotated shape and dtype of both packages is checked at every call, inside NNX modules too. No version of JAX
# changes what this finds, so the set for Python 3.11 goes without.
if os.environ.get("FASTVIM_TEST_ANNOTATIONS") != "off":
    from tests.annotations import install

    install(["fastvim_jax", "pallas_kernels"])

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests.drawn_cases import draw_cases  # noqa: E402
from tests.support import ALL_CASES, DRAWS  # noqa: E402

LEFT_OUT = pytest.StashKey[tuple[int, int]]()  # drawn cases that were left out, of how many

hypothesis.settings.register_profile(
    "fastvim",
    deadline=None,  # the first example compiles
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fastvim")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let hypothesis draw from the run's seed."""
    if config.getoption("--hypothesis-seed", None) is None:
        config.option.hypothesis_seed = str(RUN_SEED)


@pytest.hookimpl(trylast=True)  # behind -m and -k, so that something of every selection is left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases of tests marked `drawn` that this run's seed does not choose."""
    kept, left_out = draw_cases(items, config.args, RUN_SEED)
    marked = sum(item.get_closest_marker("drawn") is not None for item in items)
    config.stash[LEFT_OUT] = (0, marked) if ALL_CASES else (len(left_out), marked)
    if left_out and not ALL_CASES:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the controller of parallel workers, which collects nothing itself, how many cases were left out."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, (0, 0))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take that count from a parallel worker. All workers collect the same."""
    if "left_out" in getattr(node, "workeroutput", {}):
        node.config.stash[LEFT_OUT] = tuple(node.workeroutput["left_out"])


def pytest_collection_finish() -> None:
    """Let the collector pass over what was imported, and run less often: it took 4 % of test_models.py's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_report_header() -> list[str]:
    """Print the seed and versions that reproduce a failure."""
    cases = (
        "all"
        if ALL_CASES
        else "of the drawn ones a tenth, or the share that their mark names; FASTVIM_TEST_CASES=all runs all"
    )
    return [
        f"seed: FASTVIM_TEST_SEED={RUN_SEED}, FASTVIM_TEST_DRAWS={DRAWS}",
        f"cases: {cases}",
        f"jax {jax.__version__}, numpy {np.__version__}",
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that uses `seed`, `rng` or `key` FASTVIM_TEST_DRAWS times, each time with another seed."""
    if DRAWS > 1 and "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(DRAWS), indirect=True, ids=lambda n: f"draw{n}")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Return this test's own seed, which differs from run to run unless FASTVIM_TEST_SEED is set."""
    return zlib.crc32(f"{RUN_SEED} {request.node.nodeid}".encode())


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """Return a NumPy generator with this test's seed."""
    return np.random.default_rng(seed)


@pytest.fixture
def key(seed: int) -> jax.Array:
    """Return a JAX key with this test's seed."""
    return jax.random.key(seed)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what tests recorded with `record_property`, in parallel workers, too, and count drawn cases."""
    recorded: dict[str, list[Any]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for name, value in report.user_properties:
                    recorded.setdefault(name, []).append(value)
    lines = [str(line) for line in recorded.get("summary", [])]
    left_out, marked = config.stash.get(LEFT_OUT, (0, 0))
    if marked:
        lines.append(f"drawn cases: {marked - left_out} of {marked} ran, {left_out} left out")
    if "parity" in recorded and importlib.util.find_spec("tests.parity.report"):
        from tests.parity.report import summary_lines

        lines += summary_lines(recorded["parity"])
    if lines:
        terminalreporter.section("summary")
        for line in lines:
            terminalreporter.write_line(line)
