"""The study's results as one compact file: all records, rounded, without what the protocol says already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.shared.command import ExperimentError
from studies import saved
from studies.saved import Results, write

from .protocol import RESULTS, Protocol

__all__ = ["RESULTS", "Results", "gather", "read", "write"]

Record = dict[str, Any]
COMMON = ("config", "data", "versions", "device")


def gather(protocol: Protocol, records: list[Record]) -> Results:
    """{protocol, versions, devices, data by phase, runs}; a run has the fields of `run.record` but the common ones."""
    data: dict[str, Record] = {}
    for record in records:
        first = data.setdefault(record["phase"], record["data"])
        if first["digest"] != record["data"]["digest"]:
            raise ExperimentError(f"runs of {record['phase']} must have the same images, got others in seed {record['seed']}")
    return {
        "protocol": protocol,
        "versions": _distinct([record["versions"] for record in records]),
        "devices": _distinct([record["device"] for record in records]),
        "data": data,
        "runs": [{key: value for key, value in record.items() if key not in COMMON} for record in records],
    }


def read(path: Path = RESULTS) -> Results:
    return saved.read(path)


def _distinct(values: list[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]
