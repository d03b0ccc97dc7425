"""Load experiment files by name: `digits/fastvim_digits`, or a path to a Python file that sets `config`.

A file's docstring says its source, expected result and cost. `claims`, if it is set, holds the number of classes and
parameters of the model, which the tests compare with the model that `config` builds.
"""

from __future__ import annotations

import functools
import importlib.util
import traceback
from pathlib import Path

from fastvim_jax.errors import UserError, suggest
from fastvim_jax.training.config import RunConfig


def experiments_folder() -> Path:
    """Find the folder of the experiments that ship: inside the package when installed, beside it in a checkout.

    Raises:
        UserError: neither exists.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "experiments", package.parent / "experiments"):
        if folder.is_dir():
            return folder
    raise UserError("the experiments did not come with this installation: give the path of a file.")


def list_experiments() -> list[str]:
    """List the experiments that come with the package, e.g. `digits/fastvim_digits`."""
    return list(_names_in(experiments_folder()))


@functools.cache  # each experiment that is loaded asks for them
def _names_in(folder: Path) -> tuple[str, ...]:
    files = (path.relative_to(folder).with_suffix("") for path in folder.rglob("*.py"))
    return tuple(sorted(name.as_posix() for name in files if not name.name.startswith("_")))


def load_experiment(name: str | Path) -> RunConfig:
    """Load the config of an experiment.

    Args:
        name: a name of `list_experiments`, or the path of a Python file.

    Raises:
        UserError: no such experiment (the nearest names are suggested), or the file sets no `config`.
    """
    return _config_of(_find(str(name)))


def experiment_docs(name: str | Path) -> str:
    """Return the docstring of an experiment file: expected result and cost."""
    return (_load(_find(str(name))).__doc__ or "").strip()


def experiment_claims(name: str | Path) -> dict[str, int]:
    """Return the numbers of `classes` and `parameters` that an experiment file claims, or an empty dictionary."""
    return dict(getattr(_load(_find(str(name))), "claims", {}))


def _find(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix == ".py":
        if path.is_file():
            return path
        raise UserError(f"there is no experiment file {name}.")
    names = list_experiments()
    if name in names:
        return experiments_folder() / f"{name}.py"
    short = [known for known in names if known.rsplit("/", 1)[-1] == name]
    hint = f" Did you mean {short[0]!r}?" if short else suggest(name, names)
    known = "`fastvim train --help` lists all." if hint else f"Known are: {', '.join(names)}."
    raise UserError(f"unknown experiment {name!r}.{hint} {known}")


def _load(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(f"fastvim_experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise  # Its own message names the field and the fix.
    except SyntaxError as error:
        # A file with null bytes has no such line.
        place = f"\n  {error.filename}, line {error.lineno}" if error.lineno else ""
        line = f"\n  {error.text.strip()}" if error.text else ""
        raise UserError(f"{path} is not valid Python: {error.msg}{place}{line}") from error
    except (Exception, SystemExit) as error:
        # The last line of the file itself, not of what it called.
        own = str(path.absolute())
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
        place = f"{path}, line {frames[-1].lineno}\n  {frames[-1].line}" if frames else str(path)
        raise UserError(f"{path} failed: {type(error).__name__}: {error}\n  {place}") from error
    return module


def _config_of(path: Path) -> RunConfig:
    config = getattr(_load(path), "config", None)
    if not isinstance(config, RunConfig):
        raise UserError(
            f"{path} must set `config` to a TrainConfig, or another task's config; it holds {config!r}."
        )
    return config
