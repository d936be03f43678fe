"""A study's results as one compact file in the repository: one line a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from examples.shared.command import ExperimentError
from examples.shared.storage import write_text

DIGITS = 5  # significant ones
Results = dict[str, Any]


def write(results: Results, path: Path) -> None:
    """One line a run: small, and a difference shows which run it is of. The protocol keeps its order, which names arms."""
    parts = {key: json.dumps(value, sort_keys=key != "protocol") for key, value in results.items() if key != "runs"}
    lines = ",\n".join(json.dumps(rounded(run), sort_keys=True, separators=(",", ":")) for run in results["runs"])
    head = ",\n".join(f'"{key}": {value}' for key, value in parts.items())
    text = "{" + head + ',\n"runs": [\n' + lines + "\n]}\n"
    write_text(path, text)


def read(path: Path) -> Results:
    try:
        results: Results = json.loads(path.read_text(encoding="utf-8"))
        if not {"protocol", "runs"} <= results.keys():
            raise ValueError("it has no protocol and runs")
    except (OSError, ValueError, AttributeError) as error:
        raise ExperimentError(f"--results must be a file that `run` wrote, got {path}: {error}") from None
    return results


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
