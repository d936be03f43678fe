"""A training script for `accelerate launch`: gradients of one optimizer step over two micro-batches on two processes."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import torch
from distributed_model import Model, batch, by_hand, distance, gradients, terms
from torch.utils.data import DataLoader, TensorDataset

from spectral_router import wrap_moe

STEPS, ROWS_EACH = 2, 3


def expected(model: Model, ranks: int) -> dict[str, torch.Tensor]:
    """In a single process: the mean over micro-batches, each of `ranks` consecutive loader batches."""
    model = copy.deepcopy(model)
    for rows in zip(*(tensor.split(ranks * ROWS_EACH) for tensor in batch()), strict=True):
        (by_hand(model, *rows) / STEPS).backward()
    return gradients(model)


def main(report: Path) -> None:
    from accelerate import Accelerator

    torch.set_default_dtype(torch.float64)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=STEPS)
    errors = {}
    for wrap in ("before", "after"):
        model = Model()
        wanted = expected(model, accelerator.num_processes)
        if wrap == "before":
            wrap_moe(model, **terms())
        loader = DataLoader(TensorDataset(*batch()), ROWS_EACH)
        model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), loader)
        if wrap == "after":
            wrap_moe(model, **terms())
        for x, y, mask in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(x, y, mask)["loss"])
                optimizer.step()
        errors[wrap] = distance(gradients(model), wanted)
    if accelerator.is_main_process:
        report.write_text(json.dumps({"processes": accelerator.num_processes, **errors}))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # without the interpreter's own end: in it a thread of torch or gloo now and then aborts a process that is done
    os._exit(0)
