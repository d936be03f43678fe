"""From what stands on the command line to a checkpoint: a folder, a file, or the name of a model in the local cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .dcp_folder import dcp_in, is_dcp
from .gguf_file import gguf_in
from .safetensors_file import safetensors_in
from .stored import Checkpoint, Stored, short
from .torch_file import torch_file_in

# by preference, as transformers has it
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth")
_TORCH = {".bin", ".pt", ".pth", ".ckpt"}


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The names and shapes of a checkpoint; of its tensors nothing is read yet, and no code in it is run.

    Raises:
        ValueError: there is no checkpoint, or it is damaged; the sentence says which file and why.
        ModuleNotFoundError: its format needs a package that is missing.
    """
    place = Path(path).expanduser()
    if not place.exists():
        place = _in_cache(str(path))
    try:
        return _folder(place) if place.is_dir() else _file(place)
    except OSError as error:
        raise ValueError(f"{error.filename or place} cannot be read: {error.strerror or short(error)}") from None


def _in_cache(name: str) -> Path:
    """The newest snapshot of a model in the cache of the hub; nothing is downloaded."""
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/"):
        home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
        cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
        model = cache / f"models--{name.replace('/', '--')}"
        head = model / "refs" / "main"
        if head.is_file() and (snapshot := model / "snapshots" / head.read_text().strip()).is_dir():
            return snapshot
        raise ValueError(f"there is no {name}, neither here nor in the cache of the hub ({cache}); nothing is downloaded")
    raise ValueError(f"there is no file or folder {name}")


def _file(path: Path) -> Checkpoint:
    if path.name.endswith(".index.json"):
        return _sharded(path.parent, path)
    config = _json(path.parent / "config.json") if path.name in _SINGLE else {}
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".gguf" or head[:4] == b"GGUF":
        tensors, config = gguf_in(path)
        return Checkpoint(path, "GGUF", tensors, config)
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and path.suffix not in _TORCH):
        return Checkpoint(path, "safetensors", safetensors_in(path), config)
    if path.suffix in _TORCH or head[:2] == b"PK":
        return Checkpoint(path, "torch.save", torch_file_in(path), config)
    raise ValueError(f"{path} is no checkpoint: known are .safetensors, .bin, .pt, .pth, .ckpt, .gguf, and an index of shards")


def _folder(folder: Path) -> Checkpoint:
    for name in _INDICES:
        if (folder / name).is_file():
            return _sharded(folder, folder / name)
    for name in _SINGLE:
        if (folder / name).is_file():
            return _file(folder / name)
    if is_dcp(folder):
        return Checkpoint(folder, "distributed checkpoint", dcp_in(folder), _json(folder / "config.json"))
    indices = sorted(folder.glob("*.index.json"))
    files = [path for path in sorted(folder.iterdir()) if path.suffix in {".safetensors", ".gguf", *_TORCH}]
    # what trainers leave beside the model
    files = [path for path in files if not path.name.startswith(("optimizer", "scheduler", "training_args", "rng_state"))]
    shards = [path for path in files if path.suffix == ".safetensors"]
    if len(indices) == 1:
        return _sharded(folder, indices[0])
    if shards and len({path.name.rpartition("-of-")[2] for path in shards}) == 1 and "-of-" in shards[0].name:
        total = shards[0].stem.rpartition("-of-")[2]
        if total.isdigit() and int(total) != len(shards):
            raise ValueError(f"{folder} holds {len(shards)} of {int(total)} shards, and no index; add the missing ones")
        tensors = {name: stored for path in shards for name, stored in safetensors_in(path).items()}
        return Checkpoint(folder, f"safetensors, {len(shards)} shards", tensors, _json(folder / "config.json"))
    if len(files) == 1:
        found = _file(files[0])
        found.config = found.config or _json(folder / "config.json")
        return found
    if files:
        raise ValueError(f"{folder} holds {len(files)} checkpoints ({files[0].name}, {files[1].name}, ...); name one of them")
    raise ValueError(f"{folder} holds no checkpoint: no .safetensors, .bin, .pt, .gguf, and no .metadata of a distributed one")


def _sharded(folder: Path, index: Path) -> Checkpoint:
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index} is no index of shards: it has no weight_map from names to files")
    tensors: dict[str, Stored] = {}
    files = sorted(set(places.values()))
    for file in files:
        path = folder / file
        if Path(file).name != file:
            raise ValueError(f"{index} names {file!r}, which is not beside it")
        if not path.is_file():
            raise ValueError(f"{index} names {file}, which is missing; {len(files)} shards belong to this checkpoint")
        tensors |= safetensors_in(path) if path.suffix == ".safetensors" else torch_file_in(path)
    missing = [name for name in places if name not in tensors]
    if missing:
        raise ValueError(f"{index} names {len(missing)} tensors that are in no shard, such as {missing[0]!r}")
    kind = "safetensors" if files[0].endswith(".safetensors") else "torch.save"
    return Checkpoint(folder, f"{kind}, {len(files)} shards", tensors, _json(folder / "config.json"))


def _json(path: Path) -> dict[str, Any]:
    """A table in a file of JSON; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({short(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no table, but a {type(content).__name__}")
    return content
