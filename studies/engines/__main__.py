"""Runs the installed engines, two ranks each, and writes what was measured: `python -m studies.engines [ENGINE...]`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENGINES = {  # module here -> what it imports, what it is installed as
    "megatron": ("megatron.core", "megatron-core"),
    "torchtitan": ("torchtitan", "torchtitan"),
    "olmo_core": ("olmo_core", "ai2-olmo-core"),
    "deepspeed": ("deepspeed", "deepspeed"),
}


def installed(engine: str) -> bool:
    try:
        return importlib.util.find_spec(ENGINES[engine][0]) is not None
    except ModuleNotFoundError:
        return False


def run(engine: str, only: str = "", ranks: int = 2, limit: int = 3600) -> dict[str, Any]:
    """The cases of one engine, in processes of their own, by name: times for each gate, or a refusal or error in words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]),
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, "-m", "studies.engines.worker", engine, str(file), only]
        with (Path(folder) / "log").open("w+") as log:
            processes = [
                subprocess.Popen(
                    command,
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                for rank in range(ranks)
            ]
            try:
                codes = [process.wait(limit) for process in processes]
            finally:
                for process in processes:
                    process.kill()
            log.seek(0)
            if any(codes) or not file.exists():
                raise RuntimeError(f"{engine} ended with {codes}:\n{log.read()[-3000:]}")
        return json.loads(file.read_text())


def table(engine: str, found: dict[str, Any]) -> str:
    """In the loss and at the step, side by side: the times farthest from one, of all gates."""
    rows: dict[str, dict[tuple[str, str], str]] = {}
    for name, result in found.items():
        setting, place, kind = name.split("; ")
        if isinstance(result, str):
            shown = "refused" if result.startswith("refused") else "not run"
        else:
            shown = f"{max((entry[0] for entry in result.values()), key=lambda count: abs(count - 1)):.4f}"
        rows.setdefault(setting, {})[place, kind] = shown
    columns = [(place, kind) for place in ("in the loss", "at the step") for kind in ("penalty", "balance")]
    head = "| " + " | ".join([engine, *(f"{place}, {kind}" for place, kind in columns)]) + " |"
    lines = [head, "|---" + "|---:" * 4 + "|"]
    lines += ["| " + " | ".join([name, *(row.get(column, "–") for column in columns)]) + " |" for name, row in rows.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(
        prog="python -m studies.engines",
        description="Measure on the engines themselves how many times the term arrives; keep results.json beside this file and "
        "docs/engines_tables.md.",
    )
    flags.add_argument(
        "engines", nargs="*", metavar="ENGINE", help=f"of {', '.join(ENGINES)} (default: all that are installed)"
    )
    wanted = flags.parse_args(arguments).engines
    for engine in wanted:
        if engine not in ENGINES:
            flags.error(f"ENGINE must be any of {', '.join(ENGINES)}, got {engine}")
    results = HERE / "results.json"
    kept = json.loads(results.read_text()) if results.exists() else {}
    for engine in wanted or ENGINES:
        name = ENGINES[engine][1]
        if not installed(engine):
            print(f"{name} is not installed")
            continue
        kept[engine] = {"version": version(name), "torch": version("torch"), "ranks": 2, "times": run(engine)}
        results.write_text(json.dumps(kept, indent=1) + "\n")
        print(table(f"{name} {version(name)}", kept[engine]["times"]), end="\n\n", flush=True)
    tables = [table(f"{ENGINES[engine][1]} {entry['version']}", entry["times"]) for engine, entry in kept.items()]
    (HERE.parent.parent / "docs" / "engines_tables.md").write_text("\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
