"""One rank of an engine's cases: `python -m studies.engines.worker ENGINE FILE [CASE]`, with torchrun's variables set."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def main(engine: str, file: str, only: str = "") -> None:
    module: Any = importlib.import_module(f"studies.engines.{engine}")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    module.ready()
    found: dict[str, Any] = {}
    for name, case in module.cases().items():
        if only and only not in name:
            continue
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                found[name] = case()
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
                if only:
                    traceback.print_exc()
        if only:
            print(name, found[name], [str(w.message)[:300] for w in told if "spectral" in str(w.filename)], flush=True)
        if os.environ["RANK"] == "0":
            Path(file).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # engines leave threads and groups behind


if __name__ == "__main__":
    main(*sys.argv[1:])
