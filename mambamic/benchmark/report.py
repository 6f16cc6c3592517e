"""A record as a short table for the screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_HEADINGS = ("", "", "dtype", "batch", "result", "x floor", "published", "speed-up")


def lines(record: dict[str, Any]) -> list[str]:
    """Return a record as text.

    Args:
        record: From ``Suite.run``.
    """
    tf32 = record.get("tf32")
    where = [record["device"], f"{record['threads']} threads" if tf32 is None else
             f"driver {record['driver']}, CUDA {record['cuda']}"]  # fmt: skip
    where += [f"torch {record['torch']}", f"mambamic {record['mambamic']}"]
    if tf32 is not None:
        on = [name for name, allowed in tf32.items() if allowed]
        where.append(f"TF32 {'for ' + ' and '.join(on) if on else 'off'}")
    text = [
        ", ".join(where),
        f"scan: {record['backend']}, {record['backend_detail']}; "
        f"medians of {record['repeats']} runs after {record['warmup']}",
        "",
        *_aligned([_HEADINGS, *(cells for row in record["rows"] for cells in _cells(row))]),
        "",
        *(f"floor of {name}: {meaning}" for name, meaning in record["floors"].items()),
    ]
    text += [f"failed: {name}: {why}" for name, why in record["failed"].items()]
    for dtype, rates in record["rates_per_second"].items():
        text.append(f"this device, {dtype}: {_rates(rates)}")
    if any("published" in row for row in record["rows"]):
        text.append("published: the research code with mamba_ssm's scan on an H200, its best batch")
        text.append("and dtype; for the scan, without cross-scan and merge")
    return text


def _rates(rates: dict[str, float | None]) -> str:
    copied, exponentials, flops = (rates[name] or 0 for name in ("copied_bytes", "exponentials",
                                                                 "flops"))  # fmt: skip
    parts = [f"copies at {copied / 1e9:,.0f} GB/s", f"multiplies at {flops / 1e12:,.2f} TFLOP/s"]
    if exponentials:
        parts.insert(1, f"{exponentials / 1e12:.2f} T exponentials/s")
    return ", ".join(parts)


def _cells(row: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    if row["part"] == "scan":
        shape = "(" + ", ".join(map(str, row["shape"])) + ")"
        for direction in ("forward", "backward"):
            theirs = _published(row, "ms") if direction == "forward" else ("", "")
            yield (f"scan {direction}", shape, row["dtype"], "", f"{row[direction + '_ms']:.3f} ms",
                   f"{row[direction + '_times_floor']:.1f}", *theirs)  # fmt: skip
        return
    if row["part"] == "latency":
        result, unit = f"{row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f}", "ms"
    else:
        rate = row["images_per_second"]
        result, unit = f"{rate:,.{0 if rate >= 100 else 1}f} images/s", "images/s"
    yield (row["part"], row["model"], row["dtype"], str(row["batch"]), result,
           f"{row['times_floor']:.1f}", *_published(row, unit))  # fmt: skip


def _published(row: dict[str, Any], unit: str) -> tuple[str, str]:
    if "published" not in row:
        return "", ""
    return f"{row['published']:,g} {unit}", f"{row['speedup']:.1f} x"


def _aligned(table: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        yield "  ".join(padded).rstrip()
