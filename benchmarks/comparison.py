"""Write the tables of docs/comparison.md from what ``benchmarks/servers.py`` has measured."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "servers_cpu.json"
PAGE = ROOT / "docs" / "comparison.md"
_MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.S)


def speed(results: dict[str, Any]) -> list[list[str]]:
    """Return a row for each server at each number of connections."""
    head = ["connections", "server", "requests/s (rounds)", "p99, s (rounds)", "processor, ms"]
    rows = [head]
    for row in results["speed"]:
        low, high = row["requests_per_second_range"]
        quick, slow = (value / 1e3 for value in row["p99_ms_range"])
        rows.append(
            [
                str(row["connections"]),
                row["server"],
                f"{row['requests_per_second']:g} ({low:g} to {high:g})",
                f"{row['p99_ms'] / 1e3:.3g} ({quick:.3g} to {slow:.3g})",
                f"{row['cpu_ms_per_request']:g}",
            ]
        )
    return rows


def faults(results: dict[str, Any]) -> list[list[str]]:
    """Return a row for each fault and server."""
    rows = [["fault", "server", "what became of it"]]
    for title, found in results["faults"].items():
        for row in found:
            said = [f"{name}: {_said(value)}" for name, value in row.items() if name != "server"]
            rows.append([title, row["server"], "; ".join(said)])
    return rows


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} x {status}" for status, count in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "never" if value is None else f"{value}"


def page(text: str, results: dict[str, Any]) -> str:
    """Return the page with its tables written anew."""

    def table(found: re.Match[str]) -> str:
        rows = {"speed": speed, "faults": faults}[found[2]](results)
        rows.insert(1, ["---"] * len(rows[0]))
        lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        return f"{found[1]}{lines}{found[3]}"

    return _MARKS.sub(table, text)


def main() -> None:
    """Write the page; with --check only tell whether it is as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    written = page(text, json.loads(RESULTS.read_text(encoding="utf-8")))
    if "--check" in sys.argv[1:]:
        raise SystemExit(0 if written == text else f"{PAGE} is not what benchmarks print")
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
