"""Run the `fastvim` command: find the subcommand, and turn errors into messages and exit statuses.

Each subcommand is a module `cli/<name>.py` with a function `run(arguments)` that returns the exit status. It is
imported only when it is called, so that `fastvim --help` need not import JAX.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence

from fastvim_jax.cli.usage import UsageError
from fastvim_jax.closed_output import open_standard_streams, say
from fastvim_jax.errors import UserError, suggest
from fastvim_jax.stop_signals import STOP_SIGNALS
from fastvim_jax.version import __version__

COMMANDS = {
    "models": "list the models: parameters, multiply-adds, scan steps",
    "train": "train an experiment, or continue an unfinished run",
    "eval": "evaluate a trained run on its data",
    "predict": "classify image files with a trained run",
    "import-weights": "turn a PyTorch or safetensors checkpoint into a folder that other commands take",
    "export-weights": "write a run's weights as a folder to share, or as a file for PyTorch",
    "export": "write a trained run as one file that runs with JAX and NumPy alone",
    "reconstruct": "draw image files as a masked autoencoder reconstructs them",
    "embed": "write embeddings of photographs or microscope fields to a table",
    "channels": "show which channels matter to a trained run",
    "plot": "draw the figures of the documentation",
    "data": "check a data set; turn it into shards that read fast",
    "bench": "measure scan, mixer, models, training steps and data on this machine",
    "quickstart-report": "draw the result of `make quickstart`",
}

HELP = f"""\
fastvim {__version__}: vision Mamba models whose scan runs over pooled tokens

Usage: fastvim COMMAND [ARGUMENTS]

Commands:
{"".join(f"  {name:<18} {text}{chr(10)}" for name, text in COMMANDS.items())}
Options of every command:
  --help                     describe the command and its options
  --traceback                on an error, print the traceback
  --no-compilation-cache     compile everything anew. Otherwise compiled programs are kept in
                             $JAX_COMPILATION_CACHE_DIR, or in your cache folder
                             (FASTVIM_COMPILATION_CACHE=off does the same)

Examples:
  fastvim models 'fastvim_*'
  fastvim train digits/fastvim_digits --help
  fastvim train digits/fastvim_digits --run-dir runs/mine --epochs 10 --data.batch-size 64
  fastvim eval runs/mine
  fastvim predict runs/mine some.png other.jpg --json
  fastvim data check ~/my_images

Exit status: 0 done, 1 failed, 2 wrong usage, 75 training was asked to stop and saved, or lost another process.
"""
_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    open_standard_streams()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = _take(arguments, "--traceback")
    cache = not _take(arguments, "--no-compilation-cache")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fastvim {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        hint = suggest(name, COMMANDS) or f" Commands: {', '.join(COMMANDS)}."
        _complain(f"unknown command {name!r}.{hint}")
        return 2
    if cache and os.environ.get("FASTVIM_COMPILATION_CACHE", "").lower() not in ("off", "0", "no"):
        from fastvim_jax.cli.compilation_cache import keep_compiled_programs

        keep_compiled_programs()
    # Otherwise warnings begin with the module that gives them, because Orbax calls basicConfig.
    logging.basicConfig(format="fastvim: %(message)s")
    # Orbax reports its routine through absl, and its errors too, with tracebacks, before it raises them.
    logging.getLogger("absl").setLevel(logging.ERROR if show_traceback else logging.CRITICAL)
    try:
        with _stop_early() if name == "train" else contextlib.nullcontext():
            command = importlib.import_module(f"fastvim_jax.cli.{name.replace('-', '_')}")
            status: int = command.run(rest)
        _say_goodbye()
        return status
    except _StoppedEarly as stopped:
        _complain(str(stopped))
        return _failed(_TRY_AGAIN)
    except SystemExit as stop:  # tyro has printed help, or what is wrong with the arguments.
        return int(stop.code or 0)
    except UserError as error:
        if show_traceback:
            _failed(1, traceback.format_exc())
            raise
        lost = _lost_process(error)
        _complain(lost or str(error))
        return _failed(_TRY_AGAIN if lost else 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        if show_traceback:
            _failed(130, traceback.format_exc())
            raise
        _complain("interrupted")
        return _failed(130)
    except BrokenPipeError:
        # The program that read our output, such as `head`, has ended.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _failed(1)
    except Exception as error:
        lost = None if show_traceback else _lost_process(error)
        cause = lost or (None if show_traceback else _cause_outside(error))
        if cause is None:
            say(traceback.format_exc(), sys.stderr)
        else:
            _complain(cause)
        return _failed(_TRY_AGAIN if lost else 1)


def _cause_outside(error: Exception) -> str | None:
    """Describe an error of the operating system or want of memory. None for others: faults of ours."""
    if isinstance(error, OSError) and error.strerror:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return f"{shown[:200]}{': ' if name else ''}{error.strerror}. --traceback shows where."
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        first = (str(error) or "not enough memory").splitlines()[0]
        return (
            f"{first[:300]}\nThe memory does not suffice: take fewer images at once (--data.batch-size, --batch-size), "
            "smaller images or a smaller model. --traceback shows where."
        )
    return None


def _lost_process(error: Exception) -> str | None:
    if "fastvim_jax.distributed" not in sys.modules:  # No command of several processes.
        return None
    from fastvim_jax.distributed import lost_process

    return lost_process(error)


class _StoppedEarly(BaseException):
    """A signal came before training handles signals. A BaseException, so that no `except Exception` catches it."""


@contextlib.contextmanager
def _stop_early() -> Iterator[None]:
    """Exit with status 75, which asks a scheduler for a restart, on a signal that comes before training handles them.

    Importing JAX and building the data pipeline take seconds, and a scheduler may reclaim the machine during these.
    """

    def stop(number: int, frame: object) -> None:
        name = signal.Signals(number).name
        raise _StoppedEarly(
            f"{name}: stopped before training began; the same command starts it again."
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [each for each in STOP_SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    earlier = {each: signal.signal(each, stop) for each in numbers}
    try:
        yield
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)


def _say_goodbye() -> None:
    """Wait for the other processes, if there are any, to end as well as this one."""
    if "fastvim_jax.distributed" in sys.modules:
        from fastvim_jax.distributed import leave_watch

        leave_watch()


def _failed(status: int, last_words: str = "") -> int:
    """Return the exit status of an error. If this is one of several processes, print `last_words` and exit at once."""
    if "fastvim_jax.distributed" in sys.modules:
        from fastvim_jax.distributed import fail_at_once

        fail_at_once(status, last_words)
    return status


def _take(arguments: list[str], flag: str) -> bool:
    """Remove `flag` from the arguments before a `--`, and return whether it was there."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    found = flag in arguments[:end]
    arguments[:end] = [a for a in arguments[:end] if a != flag]
    return found


def _complain(message: str) -> None:
    say(f"fastvim: {message}", sys.stderr)
