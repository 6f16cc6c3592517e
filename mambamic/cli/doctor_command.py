"""``mambamic doctor``: what this machine has, and what would be used."""

from __future__ import annotations

import argparse
import json

from mambamic import doctor

DESCRIPTION = """\
Show versions, devices, scan backends with the reason where one is missing, and what serving needs.
The exit status is 1 where no model could be run here.

example:
  mambamic doctor
  mambamic doctor --json
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mambamic doctor``."""
    parser.description = DESCRIPTION
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    report = doctor.examine()
    print(json.dumps(report, indent=2) if args.json else "\n".join(doctor.lines(report)))
    return 0 if report["compute"].get("backend") else 1
