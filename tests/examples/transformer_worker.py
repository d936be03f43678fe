"""One of two processes: the example, stopped and resumed or before a tiny model is saved by torch.distributed.checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

# the smallest run that has all parts: two phases, three and two measurements, a checkpoint in each
TINY = (
    "--layers 1 --dim 32 --hidden 16 --experts 4 --steps 6 --evaluations 2 --adapt-steps 4 --adapt-evaluations 2 --batch-size 4"
)
TINY += " --sequence 24 --validation-windows 6 --lr 0.01 --device cpu --report-to none"


def arguments(data: Path, out: Path, *others: str) -> list[str]:
    return [*TINY.split(), "--dataset", str(data), "--out", str(out), *others]


def write_domains(folder: Path) -> None:
    """Two domains of thirty documents each."""
    for domain, words in (("letters", "abcde fgh ijkl"), ("numbers", "12 345 6789 0")):
        (folder / domain).mkdir(parents=True)
        for number in range(30):
            text = " ".join(words[(number * step) % len(words) :] for step in range(1, 30))
            (folder / domain / f"{number}.txt").write_text(f"{domain} {number}\n{text}\n")


def interrupted(points: list[tuple[str, int]]) -> None:
    """Make training stop as by Ctrl-C, once at each (phase, step)."""
    from examples.transformer_moe import train

    watched = train.Watch.on_step_end
    phases: dict[int, str] = {}
    started = train.Watch.__init__

    def start(self, phase, on_step):
        started(self, phase, on_step)
        phases[id(self)] = phase.name

    def stop(self, args, state, control, **kwargs):
        watched(self, args, state, control, **kwargs)
        here = (phases[id(self)], state.global_step)
        if here in points:
            points.remove(here)
            raise KeyboardInterrupt

    train.Watch.__init__, train.Watch.on_step_end = start, stop


def example(data: Path, out: Path, *others: str) -> None:
    from examples.transformer_moe import figures
    from examples.transformer_moe.__main__ import main

    figures.draw = lambda *_: []  # of results alone, and no test of these looks at them
    if "--stopped" in others:
        others = tuple(flag for flag in others if flag != "--stopped")
        interrupted([("train", 5), ("adapt", 3)])
        assert [main(arguments(data, out, *others, *again)) for again in ([], ["--resume"])] == [130, 130]
        others = (*others, "--resume")
    assert main(arguments(data, out, *others)) == 0


def checkpoint(folder: Path) -> None:
    """A wrapped Mixtral under FSDP2 after a step; rank 0 also leaves its tensors, whole, in plain.pt."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from moe_models import BATCH, mixtral
    from torch.distributed.fsdp import fully_shard

    from spectral_router import wrap_moe

    model = mixtral()
    handle = wrap_moe(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(**BATCH).loss.backward()
    optimizer.step()
    dcp.save({"model": model.state_dict(), "routers": handle.state_dict()}, checkpoint_id=folder / "dcp")
    whole = {name: value.full_tensor() for name, value in model.state_dict().items()}
    if dist.get_rank() == 0:
        torch.save({"model": whole, "routers": handle.state_dict()}, folder / "plain.pt")
    dist.barrier()


if __name__ == "__main__":
    task, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    example(Path(rest[0]), Path(rest[1]), *rest[2:])
    if task == "example+checkpoint":  # among the processes that the example has brought together
        checkpoint(Path(rest[1]))
    sys.stdout.flush()
    # without the interpreter's own end: in it a thread of torch or gloo now and then aborts a process that is done
    os._exit(0)
