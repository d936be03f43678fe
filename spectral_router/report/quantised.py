"""One tensor of a checkpoint as numbers: fp8 and int8 with their scales beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from .stored import Checkpoint

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def numbers_of(checkpoint: Checkpoint, key: str) -> tuple[Tensor, str | None]:
    """The tensor in float32 or better, and a note if it was quantised.

    W = s ⊙ Q, with one scale, one a row, or one a block (fp8: `weight_scale`, `weight_scale_inv`, which multiplies too
    whatever its name says); W = Q · SCB / 127 (bitsandbytes, int8).

    Raises:
        ValueError: it is quantised in a way that is not known here, or its scales are missing.
    """
    stored = checkpoint.tensors[key]
    if is_packed(checkpoint, key):
        raise ValueError(
            f"gate {key!r} is packed in 4 bits by bitsandbytes, which is not read here; keep gates out of the quantisation "
            "(llm_int8_skip_modules), or give the checkpoint before it"
        )
    tensor = stored.read()
    if tensor.dtype in _FLOAT8 or tensor.dtype == torch.int8:
        for suffix in ("_scale_inv", "_scale", ".scale"):
            if (scale := checkpoint.tensors.get(f"{key}{suffix}")) is not None:
                return _scaled(key, tensor.float(), scale.read().float()), f"dequantised from {stored.dtype}"
        scb = checkpoint.tensors.get(f"{key.removesuffix('weight')}SCB")
        if tensor.dtype == torch.int8 and scb is not None:
            return tensor.float() * (scb.read().float()[:, None] / 127), "dequantised from int8 (bitsandbytes)"
        if tensor.dtype == torch.int8:
            raise ValueError(f"gate {key!r} is int8 without scales; give the checkpoint from before the quantisation")
        return tensor.float(), f"{stored.dtype} without scales"
    if not tensor.is_floating_point():
        raise ValueError(f"gate {key!r} holds {stored.dtype}, no numbers; keep gates out of the quantisation")
    note = f"dequantised from {stored.dtype}" if stored.dtype.startswith(("Q", "IQ", "TQ")) else None
    return (tensor if tensor.dtype == torch.float64 else tensor.float()), note


def is_packed(checkpoint: Checkpoint, key: str) -> bool:
    """Whether bitsandbytes has packed it in 4 bits, so that its shape is not the gate's."""
    return any(f"{key}.{part}" in checkpoint.tensors for part in ("absmax", "quant_state.bitsandbytes__nf4"))


def _scaled(key: str, tensor: Tensor, scale: Tensor) -> Tensor:
    if scale.ndim == 1 and len(scale) == len(tensor):
        scale = scale[:, None]
    if scale.ndim != 2 or scale.numel() == 1 or scale.shape == (len(tensor), 1):
        return tensor * scale
    # blocks of equal size, the last ones cut off; a power of two in every format that has them
    blocks = [_block(side, count) for side, count in zip(tensor.shape, scale.shape, strict=True)]
    if 0 in blocks:
        raise ValueError(f"gate {key!r} of shape {tuple(tensor.shape)} does not fit its scales {tuple(scale.shape)}")
    for side, block in enumerate(blocks):
        scale = scale.repeat_interleave(block, side).narrow(side, 0, tensor.shape[side])
    return tensor * scale


def _block(side: int, count: int) -> int:
    """The size of the blocks into which a side is cut; 0 if there is none."""
    if count == side:
        return 1
    return next((size for size in (128, 64, 32, 16, 256, 512, side) if -(-side // size) == count), 0)
