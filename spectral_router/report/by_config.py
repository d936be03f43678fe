"""Gates by the model that config.json names: built by transformers without memory, searched, its names mapped to the file's."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..gates.find import find_gates
from ..gates.gate import Gate
from .by_name import SELECTION
from .stored import Checkpoint, short

_LAYERS, _PARTS = 2_000, 100_000  # in a model that is built, at most


@dataclass
class Named:
    """A gate of the empty model, and its tensors' names in the file; None where the file has none."""

    gate: Gate
    key: str | None
    bias_key: str | None = None

    def weight(self, tensor: Tensor) -> Tensor:
        """`(experts, dim)`, by the same steps as from a live model."""
        gate = self.gate
        name = str(gate.parameter).rpartition(".")[2]
        if tensor.numel() != gate.matrix.numel():
            raise ValueError(
                f"gate {self.key!r} has shape {tuple(tensor.shape)} in the file and {tuple(gate.matrix.shape)} in the model "
                "that config.json names; the two do not belong together"
            )
        gate.owner._parameters[name] = nn.Parameter(tensor.reshape(gate.matrix.shape), requires_grad=False)
        return gate.weight.detach()


def gates_by_config(checkpoint: Checkpoint) -> list[Named] | str:
    """The gates of the model, in its order; or why it could not be built, in a few words."""
    architectures = checkpoint.config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        return "" if not checkpoint.config else "config.json names no architecture"
    if said := _too_many(checkpoint.config):
        return f"config.json states {said}, which is not built"
    try:
        with _quiet():
            model = _empty_model(checkpoint.config, architectures[0])
            gates = find_gates(model)
            keys = _keys_of(model, checkpoint)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            return f"{architectures[0]} could not be built ({short(error)})"
        return "transformers is not installed"
    except Exception as error:  # a config of anyone's, a family that is not installed
        return f"{architectures[0]} could not be built ({short(error)})"
    full = [_full(model, gate) for gate in gates]
    firsts: dict[int, int] = {}  # tied gates are one
    for position, gate in enumerate(gates):
        known = firsts.get(id(gate.matrix))
        if known is None or (gate.index is None and full[known] not in keys and full[position] in keys):
            firsts[id(gate.matrix)] = position
    return [
        Named(gate, keys.get(name), keys.get(_selection_bias(model, gate, name)))
        for position, (gate, name) in enumerate(zip(gates, full, strict=True))
        if gate.index is not None or position == firsts[id(gate.matrix)]
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing that transformers has to say of a model that is not going to run."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _too_many(settings: Any, name: str = "") -> str | None:
    """A number of parts so large that even an empty model would not end to be built."""
    if isinstance(settings, dict):
        return next((said for key, value in settings.items() if (said := _too_many(value, str(key)))), None)
    if type(settings) not in (int, float) or not re.search("layer|expert|head|block|stage|depth", name):
        return None
    most = _LAYERS if re.search(r"(^|_)(num|n)_\w*layers?$|depth$", name) else _PARTS
    return f"{name}={settings}" if settings > most else None


def _full(model: nn.Module, gate: Gate) -> str:
    """The full name of the matrix; "" if it is put together from several."""
    if not isinstance(gate.parameter, str):
        return ""
    path = next(name for name, module in model.named_modules() if module is gate.owner)
    return f"{path}.{gate.parameter.rpartition('.')[2]}".lstrip(".")


def _selection_bias(model: nn.Module, gate: Gate, matrix: str) -> str:
    """The full name of what is added to the scores for the choice alone: of the gate, else beside it; "" if there is none."""
    path = matrix.rpartition(".")[0]
    for _ in range(3):
        module = model.get_submodule(path)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name.count(".") < 3 and SELECTION.search(name) and tensor.numel() == gate.num_experts:
                return f"{path}.{name}".lstrip(".")
        path, _, last = path.rpartition(".")
        if last.isdigit():
            break
    return ""


def model_class(settings: dict[str, Any], architecture: str) -> tuple[Any, Any]:
    """The class of transformers that a config names, and the config as an object; of transformers' own alone."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = _plain({key: value for key, value in settings.items() if key not in ("quantization_config", "auto_map")})
    config_class = CONFIG_MAPPING[str(settings.get("model_type"))]
    kind: Any = getattr(transformers, architecture, None)
    if kind is None:  # not every model class is handed on at the top
        __import__(modeling := config_class.__module__.replace("configuration_", "modeling_"))
        kind = getattr(sys.modules[modeling], architecture, None)
    if not (inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"transformers {transformers.__version__} has no such model")
    config = config_class.from_dict(settings)
    config._attn_implementation = "eager"
    return kind, config


def _empty_model(settings: dict[str, Any], architecture: str) -> nn.Module:
    kind, config = model_class(settings, architecture)
    with torch.device("meta"):
        model: nn.Module = kind._from_config(config)
    return model


def _plain(value: Any) -> Any:
    """Infinity and NaN as transformers writes them, as numbers again."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _plain(item) for k, item in value.items()}
    return value


def _keys_of(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """From names of the model's parameters and buffers to names in the file, as transformers itself would load them."""
    parameters = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        renamed = {
            rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)[0]: key
            for key in checkpoint.tensors
        }
    except ImportError:  # an older transformers keeps the model's names
        renamed = {}
    keys = {name: key for name, key in renamed.items() if name in parameters}
    keys |= {name: name for name in parameters if name in checkpoint.tensors}
    ends: dict[str, list[str]] = {}
    for key in checkpoint.tensors:  # a wrapper's prefix in front of everything
        for start in [match.end() for match in re.finditer(r"\.", key)][:3]:
            ends.setdefault(key[start:], []).append(key)
    for name in parameters:
        if name not in keys and len(ends.get(name, ())) == 1:
            keys[name] = ends[name][0]
    return keys
