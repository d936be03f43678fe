"""The study's results as one compact file: all records, rounded, without what the protocol says already."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from examples.shared.command import ExperimentError
from examples.shared.storage import write_atomically

from .protocol import Protocol

RESULTS = Path(__file__).with_name("results.json")
DIGITS = 5  # significant ones: an accuracy is a count out of at most 960 images
Record = dict[str, Any]
Results = dict[str, Any]
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
        "runs": [_rounded({key: value for key, value in record.items() if key not in COMMON}) for record in records],
    }


def write(results: Results, path: Path) -> None:
    """One line a run: small, and a difference shows which run it is of. The protocol keeps its order, which names arms."""
    parts = {key: json.dumps(value, sort_keys=key != "protocol") for key, value in results.items() if key != "runs"}
    lines = ",\n".join(json.dumps(run, sort_keys=True, separators=(",", ":")) for run in results["runs"])
    head = ",\n".join(f'"{key}": {value}' for key, value in parts.items())
    text = "{" + head + ',\n"runs": [\n' + lines + "\n]}\n"
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))


def read(path: Path = RESULTS) -> Results:
    try:
        results: Results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExperimentError(f"--results must be a file that `run` wrote, got {path}: {error}") from None
    return results


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _distinct(values: list[Any]) -> list[Any]:
    return [value for index, value in enumerate(values) if value not in values[:index]]
