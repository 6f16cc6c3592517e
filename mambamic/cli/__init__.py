"""The command line: one module per command, imported only when the command is called."""

from __future__ import annotations

import argparse
import codecs
import errno
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from mambamic._version import __version__
from mambamic.errors import MambamicError, UsageError

COMMANDS = {
    "train": "train a model on a folder of images",
    "data": "check a data set, or take its mean and standard deviation",
    "info": "count what a model has and does",
    "evaluate": "measure how good a checkpoint is",
    "predict": "classify images",
    "score": "score every tile of whole slides",
    "ood": "teach a checkpoint to tell images of its kind from others",
    "explain": "show where in an image a prediction comes from",
    "import": "turn a checkpoint of the published research code into one of ours",
    "onnx": "export a checkpoint for ONNX Runtime, which needs no torch",
    "archive": "pack a checkpoint into a TorchServe archive",
    "serve": "start, and stop, a server",
    "health": "tell whether a server can answer, for probes",
    "edge": "put nginx in front of servers",
    "benchmark": "measure how fast this machine is",
    "doctor": "show what this machine has and what would be used",
}


class Command(Protocol):
    """What a module under ``mambamic.cli`` provides."""

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments, description and worked example to its parser."""

    def run(self, args: argparse.Namespace) -> int:
        """Do the work and return the exit status."""


# What an installation without extras lacks, by the name that fails to import.
_EXTRAS = {
    "torch": "torch",
    "onnx": "onnx",
    "onnxruntime": "ort",
    "psutil": "serve",
    "ts": "serve",
    "yaml": "serve",
    "kornia": "train",
    "pytorch_lightning": "train",
    "torchmetrics": "train",
    "matplotlib": "train",
    "jinja2": "train",
    "filelock": "slides",
    "openslide": "slides",
    "pyarrow": "slides",
    "ray": "ray",
    "tiffslide": "slides",
}


def _command(name: str) -> Command:
    return cast(Command, importlib.import_module(f"mambamic.cli.{name}_command"))


def _missing(error: ModuleNotFoundError) -> UsageError:
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        raise error
    return UsageError(
        f"the package {package!r} is not installed",
        "an installation with what this command needs",
        f"pip install 'mambamic[{_EXTRAS[package]}]'",
    )


# What any command may meet wherever it writes, and what is no fault of the program.
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
# Likewise, where a path cannot be what it was given for: a file in place of a folder, say.
_WRONG_PATH = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def _unwritable(error: OSError) -> MambamicError:
    named = error.filename2 or error.filename
    what = "a file" if named is None else str(named)
    if error.errno in _WRONG_PATH:
        return UsageError(
            f"{what} cannot be read or written ({error.strerror})",
            "a file where one is wanted, in folders, with names that are not too long",
            "give another path",
        )
    return MambamicError(
        f"{what} cannot be read or written ({error.strerror})",
        "permission, and space on the disk",
        "free some, or give another folder; what was finished before is kept",
    )


def _escape(error: UnicodeError) -> tuple[str, int]:
    r"""Return what cannot be encoded as ``\uXXXX``, which within JSON means the same."""
    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _print_anything() -> None:
    """Let no name of a file end a command: its bytes need not be text that a terminal knows."""
    # Not Python's own backslashreplace, whose \xe9 is no JSON.
    codecs.register_error("mambamic", _escape)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="mambamic")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mambamic", description="Microscopy image classification with state-space models."
    )
    parser.add_argument("-V", "--version", action="version", version=f"mambamic {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        # Only the parser of the command that was called is filled in: the others would import
        # torch, and more, for nothing.
        if name in arguments[:1]:
            _command(name).configure(sub)
    return parser.parse_args(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 1 (the work failed) or 2 (a wrong call)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _print_anything()
    try:
        args = _parse(arguments)
        return _command(args.command).run(args)
    except ModuleNotFoundError as error:
        return _report(_missing(error), arguments)
    except MambamicError as error:
        return _report(error, arguments)
    except BrokenPipeError:
        # Whoever reads our output has enough of it (``| head``). Python would complain once more
        # when it flushes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno not in (*_CANNOT_WRITE, *_WRONG_PATH):
            raise
        return _report(_unwritable(error), arguments)


def _report(error: MambamicError, arguments: Sequence[str]) -> int:
    print(f"mambamic {arguments[0]}: {error}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
