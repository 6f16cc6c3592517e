"""Known holes of the installed packages, by pip-audit, where its data can be reached.

``make check`` only reports: a hole that became known last night must not stop today's work, and
neither may a network that is not there. ``make audit`` fails where a package has a hole, or where
nothing could be looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT_S = 90
UNREACHED = "the data on known holes cannot be reached from here; nothing was audited"


def audit(timeout: float = TIMEOUT_S) -> list[dict[str, Any]] | None:
    """Return what pip-audit says of each package, or None where it could look none up."""
    tool = Path(sys.executable).with_name("pip-audit")
    command = [tool, "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired):
        return None
    # An index of packages that has no data on holes makes it skip each of them, and end well.
    return packages if any("vulns" in package for package in packages) else None


def lines(packages: list[dict[str, Any]] | None) -> tuple[list[str], bool]:
    """Return what to print, and whether all was found well.

    Args:
        packages: As ``audit`` returns them.
    """
    if packages is None:
        return [f"pip-audit: {UNREACHED}"], False
    holes = [
        f"pip-audit: {package['name']} {package['version']}: {hole['id']}, mended in "
        + (", ".join(hole["fix_versions"]) or "no version")
        for package in packages
        for hole in package.get("vulns", ())
    ]
    looked_up = sum("vulns" in package for package in packages)
    summary = f"pip-audit: {len(holes)} known holes in {looked_up} of {len(packages)} packages"
    return [*holes, summary], not holes


if __name__ == "__main__":
    said, well = lines(audit())
    print("\n".join(said))
    sys.exit("--strict" in sys.argv[1:] and not well)
