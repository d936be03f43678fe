"""Run the notebooks and keep what they print, for the site: `OMP_NUM_THREADS=1 python -m examples.notebooks` (extra `test`)."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PATHS = sorted(Path(__file__).parent.glob("*.ipynb"))


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook after a run from top to bottom in a new kernel, with `folder` as the working directory."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(
        notebook,
        timeout=300,
        resources=resources,
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # without the versions of this machine
    return notebook


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m examples.notebooks", description=__doc__.splitlines()[0]).parse_args()
    for path in PATHS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(path, Path(folder))
        nbformat.write(notebook, path)
        print(f"ran and saved {path.name}")
