"""``mambamic health``: is a server fit to answer, for the probes of containers and clusters."""

from __future__ import annotations

import argparse

from mambamic.errors import UsageError
from mambamic.launcher import health
from mambamic.launcher.settings import Settings

DESCRIPTION = """\
Ask a server that mambamic serve started on this machine whether it is well. The exit status is 0
where it is and 1 where not, with the reason on standard error.

--ready lets every model classify a drawn cell: whether requests can be sent here.
--live looks for workers that TorchServe no longer starts again: whether to start the server anew.

example:
  mambamic health --ready --port 8080
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic health``."""
    parser.description = DESCRIPTION
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ready", action="store_true", help="make a real prediction")
    what.add_argument("--live", action="store_true", help="ask for the state of the workers")
    port = Settings().port
    parser.add_argument(
        "--port", type=int, default=port, help="of predictions (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=10, metavar="S", help="seconds (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Ask, and say in one line what was found."""
    if not 0 < args.timeout < 3600:
        raise UsageError(f"--timeout {args.timeout}", "seconds above 0, below 3600", "give another")
    check = health.check_ready if args.ready else health.check_live
    models = check(args.port, args.timeout)
    print(f"{'ready' if args.ready else 'live'}: {', '.join(models)}")
    return 0
