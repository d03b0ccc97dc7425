"""The package as a whole: what it exports, what may import what, and that the checks of the suite are on."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.resources
import inspect
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest
from flax import nnx
from packaging.requirements import Requirement
from packaging.version import Version

import fastvim_jax
import pallas_kernels
from fastvim_jax.layers.patch_embed import PatchEmbed
from fastvim_jax.precision import Precision
from tests.support import ROOT

# Which rooms a room may import from, besides itself. Arrows point down only.
BASE = {
    "regular_file",
    "errors",
    "closed_output",
    "typing",
    "precision",
    "serialise",
    "config_checks",
    "json_text",
    "version",
    "stop_signals",
    "whole_file",
    "own_cores",
    "lock",
}
ROOMS: dict[str, set[str]] = {
    "pallas_kernels": set(),
    "errors": set(),
    "closed_output": set(),
    "regular_file": set(),
    "typing": set(),
    "json_text": set(),
    "version": set(),
    "stop_signals": set(),
    "precision": {"pallas_kernels", *BASE},
    "config_checks": {"errors"},
    "serialise": {"errors", "json_text"},
    "whole_file": {"errors"},
    "own_cores": set(),
    "lock": {"errors", "json_text"},
    "forward_mode": set(),
    "distributed": {"pallas_kernels", *BASE},
    "layers": {"pallas_kernels", *BASE},
    "models": {"layers", "distributed", "pallas_kernels", *BASE},
    "data": BASE,
    "interop": {"models", "layers", *BASE},
    "analysis": {"models", "layers", "pallas_kernels", *BASE},
    "training": {
        "models",
        "layers",
        "data",
        "distributed",
        "interop",
        "analysis",
        "pallas_kernels",
        *BASE,
    },
    "inference": {
        "training",
        "models",
        "data",
        "interop",
        "analysis",
        "pallas_kernels",
        *BASE,
    },
    "bench": {
        "inference",
        "training",
        "data",
        "distributed",
        "analysis",
        "models",
        "layers",
        "pallas_kernels",
        *BASE,
    },
    "cli": {
        "bench",
        "inference",
        "training",
        "data",
        "distributed",
        "interop",
        "analysis",
        "models",
        "pallas_kernels",
        *BASE,
    },
    "__main__": {"cli"},
}


def modules() -> dict[str, Path]:
    """Return every module of both packages by its dotted name."""
    found = {}
    for package in ("fastvim_jax", "pallas_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    """Return the room that a module belongs to; the package's own face has none."""
    package, *rest = module.split(".")
    return package if package == "pallas_kernels" else (rest or [""])[0]


def imports(path: Path, known: set[str]) -> Iterator[str]:
    """Yield the project's modules that a file imports, inside functions too."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            # A circle of types counts too, but not the package's own face, which names everything.
            if path.name == "__init__.py":
                return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    yield inner
                elif node.module == "fastvim_jax":  # a public name counts as an import of its home
                    yield fastvim_jax._HOMES.get(alias.name, "fastvim_jax")
                elif node.module in known:
                    yield node.module
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text()))


def test_arrows_point_down_only() -> None:
    known = modules()
    wrong = [
        f"{name} imports {target}"
        for name, path in known.items()
        if room(name)
        for target in imports(path, set(known))
        if room(target) not in {room(name), *ROOMS[room(name)]}
    ]
    assert not wrong, "\n".join(wrong)


def task(module: str) -> str | None:
    """Return the task whose folder in training/ a module belongs to; None for what the tasks share."""
    parts = module.split(".")
    if parts[:2] != ["fastvim_jax", "training"] or len(parts) < 3:
        return None
    return parts[2] if (ROOT / "fastvim_jax" / "training" / parts[2]).is_dir() else None


def test_no_task_imports_another_and_what_they_share_imports_none() -> None:
    known = modules()
    tasks = {task(name) for name in known} - {None}
    assert "classification" in tasks
    wrong = [
        f"{name} imports {target}"
        for name, path in known.items()
        if room(name) == "training" and name != "fastvim_jax.training"
        for target in imports(path, set(known))
        if task(target) not in {None, task(name)}
    ]
    assert not wrong, "\n".join(wrong)


def test_every_task_is_found_by_its_config() -> None:
    from fastvim_jax.training.tasks import TASKS

    trainers = {name for name in modules() if task(name) and name.endswith(".train")}
    assert {f"{folder}.train" for folder in TASKS.values()} == trainers
    for name, folder in TASKS.items():
        assert hasattr(importlib.import_module(f"{folder}.config"), name)
        assert callable(importlib.import_module(f"{folder}.train").train)


def test_no_module_imports_itself_in_a_circle() -> None:
    known = modules()
    # Imports inside functions count, too: they would run, but no file of a circle can be read without the others.
    graph = {
        name: {target for target in imports(path, set(known)) if target != name}
        for name, path in known.items()
    }
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in graph[name]:
                walk(target, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())
    assert done == set(known)


@pytest.mark.parametrize("package", [fastvim_jax, pallas_kernels], ids=lambda p: p.__name__)
def test_public_names_are_listed_importable_documented_and_typed(package) -> None:
    homes = getattr(package, "_HOMES", {})
    assert set(homes) <= set(package.__all__)
    assert len(package.__all__) == len(set(package.__all__)) > 0
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        value = getattr(package, name)
        if callable(value):
            assert value.__doc__, f"{package.__name__}.{name} has no docstring"
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            for parameter in signature.parameters.values():
                assert parameter.annotation is not parameter.empty, f"{name}: {parameter}"
            assert signature.return_annotation is not signature.empty, name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


@pytest.mark.parametrize("package", ["fastvim_jax", "pallas_kernels"])
def test_types_are_published(package: str) -> None:
    assert importlib.resources.files(package).joinpath("py.typed").is_file()


def test_every_module_imports_without_a_warning() -> None:
    optional = {"jax_triton", "triton", "torch", "tensorflow_datasets", "tensorflow"}
    for name in modules():
        if name == "fastvim_jax.__main__":
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            assert error.name in optional, name


@pytest.mark.skipif(
    os.environ.get("FASTVIM_TEST_ANNOTATIONS") == "off", reason="this set leaves shapes unchecked"
)
def test_a_wrong_shape_raises_inside_a_module() -> None:
    embed = PatchEmbed((4, 4), 3, 8, precision=Precision(), rngs=nnx.Rngs(0))
    images = jnp.zeros((1, 32, 32, 3))
    assert embed(images).shape == (1, 8, 8, 8)
    with pytest.raises(jaxtyping.TypeCheckError, match="images"):
        embed(images[0])
    with pytest.raises(jaxtyping.TypeCheckError, match="images"):
        embed(images.astype(jnp.int32))


def project() -> dict:
    """Return the [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_version_is_the_installed_one() -> None:
    assert importlib.metadata.version("fastvim-jax") == fastvim_jax.__version__
    assert Version(fastvim_jax.__version__).release


def allowed(requirements: list[str], name: str, version: str, python: str) -> bool:
    """Return whether `version` of `name` may be installed on `python`."""
    applying = [
        requirement
        for requirement in map(Requirement, requirements)
        if requirement.name == name
        and (not requirement.marker or requirement.marker.evaluate({"python_version": python}))
    ]
    assert len(applying) == 1, f"{name} on Python {python}: {applying}"
    return applying[0].specifier.contains(version)


def test_no_mixed_pair_of_jax_and_flax_can_be_installed() -> None:
    older = {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}
    newer = {"jax": "0.11.1", "jaxlib": "0.11.1", "flax": "0.12.10"}
    requirements = project()["dependencies"]
    for name in older:
        for python in ("3.12", "3.13"):
            assert allowed(requirements, name, newer[name], python)
            assert not allowed(requirements, name, older[name], python)
        assert allowed(requirements, name, older[name], "3.11")
        assert not allowed(requirements, name, newer[name], "3.11")
    for extra in ("cuda12", "cuda13"):
        for python in ("3.11", "3.12", "3.13"):
            same = [
                (v, allowed(requirements, "jax", v, python)) for v in ("0.10.2", "0.11.1", "0.13.0")
            ]
            gpu = project()["optional-dependencies"][extra]
            assert same == [(v, allowed(gpu, "jax", v, python)) for v, _ in same]


def test_this_environment_is_one_of_the_two_sets() -> None:
    python = "{}.{}".format(*sys.version_info)
    for name in ("jax", "jaxlib", "flax"):
        installed = importlib.metadata.version(name)
        assert allowed(project()["dependencies"], name, installed, python), f"{name} {installed}"


def test_the_wheel_is_complete_and_runs_outside_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
    subprocess.run([*build, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(installed)
    for name, path in modules().items():
        assert path.relative_to(ROOT).as_posix() in names, name
    assert {"fastvim_jax/py.typed", "pallas_kernels/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "experiments/", "docs/"))]
    listed = subprocess.run(
        [sys.executable, "-m", "fastvim_jax", "train", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for path in (ROOT / "experiments").rglob("*.py"):
        name = path.relative_to(ROOT / "experiments").with_suffix("").as_posix()
        assert f"fastvim_jax/experiments/{name}.py" in names
        assert name in listed


OPENINGS = set(
    "the a an what of how whether which that those who where when one as all each every for in from by with its this "
    "these it both two no if on only to at same but not after".split()
)


def test_docstrings_of_functions_open_with_a_verb() -> None:
    """Count docstrings that open with an article or a relative word: fewer than one in twenty.

    ruff's D401 refuses most of them already.
    """
    functions, others = 0, []
    for room in (
        "fastvim_jax",
        "pallas_kernels",
        "benchmarks",
        "scripts",
        "experiments",
        "tests",
        "docs",
    ):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.FunctionDef) or not (text := ast.get_docstring(node)):
                    continue
                decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
                if decorators & {"property", "functools.cached_property", "cached_property"}:
                    continue
                functions += 1
                if re.sub(r"\W", "", text.split()[0]).lower() in OPENINGS:
                    others.append(f"{path.relative_to(ROOT)}: {node.name}: {text.splitlines()[0]}")
    assert functions > 500
    assert len(others) < functions / 20, "\n".join(others)


def readme_example() -> str:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    assert sum(bool(line) for line in readme_example().splitlines()) <= 25


@pytest.mark.slow
def test_the_readme_s_example_trains() -> None:
    """Run it with fewer blocks and steps, which are most of the time."""
    code, names = readme_example(), {}
    for written, tested in (("depth=4", "depth=1"), ("key(0), 100)", "key(0), 30)")):
        assert code.count(written) == 1
        code = code.replace(written, tested)
    exec(compile(code, "README.md", "exec"), names)
    assert names["loss"] < 2.1, "below log 10, the loss of a guess among ten digits"
