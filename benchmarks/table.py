"""Write the README's table from the results that the benchmarks left in ``results/``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- table: benchmarks/table.py -->", "<!-- end of table -->"
_H200, _CPU = "one NVIDIA H200", "two cores of a Xeon with AVX-512"


def _result(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "benchmarks/results" / name).read_text())
    return loaded


def table() -> str:
    """Return the table in Markdown."""
    accuracy = _result("accuracy_test_cpu.json")
    low, high = (100 * bound for bound in accuracy["interval_95"])
    rows = [
        (
            f"accuracy on {accuracy['images']:,} held-out blood cells",
            f"{100 * accuracy['accuracy']:.1f} % (95 % interval {low:.1f} to {high:.1f})",
            _CPU,
            "accuracy.py",
        )
    ]
    for machine, name in ((_CPU, "inference_cpu.json"), (_H200, "inference_h200.json")):
        result = _result(name)
        by_batch = {row["batch"]: row for row in result["rows"]}
        best = max(result["rows"], key=lambda row: row["images_per_second"])
        where = f"{machine}, {result['inference']['dtype']}"
        rows.append(
            ("one image, in the library", f"{by_batch[1]['median_ms']:.0f} ms", where,
             "inference.py")
        )  # fmt: skip
        rows.append(
            (f"images per second, batch {best['batch']}", f"{best['images_per_second']:,.0f}",
             where, "inference.py")
        )  # fmt: skip
    training = _result("training_h200.json")
    rows.append(
        (
            f"training, images per second, batch {training['batch']}",
            f"{training['images_per_second']:,}",
            f"{_H200}, bfloat16",
            "training.py",
        )
    )
    lines = ["| MambaMIC-T, 224 x 224 pixels | | machine | printed by |", "|---|---|---|---|"]
    lines += [f"| {what} | {value} | {where} | `benchmarks/{script}` |"
              for what, value, where, script in rows]  # fmt: skip
    return "\n".join(lines)


def updated(readme: str) -> str:
    """Return the README with the table in its place."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    """Rewrite the README."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))


if __name__ == "__main__":
    main()
