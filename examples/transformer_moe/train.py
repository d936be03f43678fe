"""transformers' Trainer on one arm: its loop, logs and checkpoints, with our measurements in place of its evaluation."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin  # type: ignore[import-untyped,unused-ignore]
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from examples.shared.command import ExperimentError
from examples.shared.storage import going_on, load_checkpoint, save_checkpoint
from spectral_router import MoEHandle
from spectral_router.integrations.transformers import MoECallback

from . import arms, model
from .config import Config, processes
from .data import Text, Windows
from .measure import Measurements, writes
from .scope import adapting
from .whole import is_whole, seal

ROUTERS = "routers.pt"
FSDP = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
LAYER_NUMBERS = ("load_cv", "max_share", "spectral_norm", "stable_rank", "cosine", "specialisation")


class Phase(NamedTuple):
    """Training on all domains, or the adaptation (`adapt`) or fine-tuning (`finetune`) that follows it on one."""

    name: str
    windows: Windows
    steps: int
    evaluations: int
    lr: float
    schedule: str  # as Trainer calls it
    warmup: int


class Run(NamedTuple):
    """Where one arm and seed keeps its files."""

    arm: str
    seed: int
    work: Path  # checkpoints and measurements, until the run is done
    final: Path  # the trained model
    board: Path  # TensorBoard


class Watch(TrainerCallback):
    """When to measure and save; what a step takes; which checkpoints are whole."""

    def __init__(self, phase: Phase, on_step: Callable[[int], None]) -> None:
        self.points = {round(phase.steps * i / phase.evaluations) for i in range(1, phase.evaluations + 1)}
        self.steps = phase.steps
        self.on_step = on_step
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        _wait()
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait()
        self.seconds.append(time.perf_counter() - self.started)
        control.should_evaluate = state.global_step in self.points
        control.should_save = control.should_evaluate and state.global_step < self.steps
        self.on_step(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has written its own files
        if args.should_save:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class RoutedTrainer(Trainer):
    """Trainer whose evaluation is `measure.evaluate`: losses by domain and the choices of the gates, on every process alike."""

    measured: Callable[[int], dict[str, Any]]

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate shards on GPUs and the like only, and takes DDP elsewhere without a word; torch shards on CPUs too
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with _writing(Path(str(self.args.output_dir))):
            super()._save_checkpoint(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        row = self.measured(self.state.global_step)
        numbers = {"eval_loss": row["loss"], **{f"eval_loss_{name}": loss for name, loss in row["domains"].items()}}
        for name in LAYER_NUMBERS:
            numbers |= {f"eval_{name}/layer_{layer}": value for layer, value in enumerate(row[name], 1)}
        self.log(numbers)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, numbers)
        return numbers


def fit(config: Config, run: Run, phase: Phase, text: Text, tokenizer: Any, on_step: Callable[[int], None]) -> dict[str, Any]:
    """Run a phase, or what is left of it. Batches depend on the seed alone: both end in the same weights on the CPU.

    Training begins with a new model and leaves it in `run.final`; the adaptation begins with that one and the state of its
    term, fine-tuning with that one and a new term.
    """
    folder = run.work / phase.name
    checkpoint = _latest(folder)
    if checkpoint is not None and not config.fsdp:
        # Trainer loads neither gates nor experts when it resumes (huggingface/transformers#48805): they are in the model
        # before. A sharded checkpoint it loads whole.
        network = model.restore(checkpoint)
    elif phase.name != "train":
        if not is_whole(run.final):
            raise ExperimentError(f"cannot go on from {run.final}: it is not as it was written; begin anew with --overwrite")
        network = model.restore(run.final)
    else:
        network = model.build(config, run.seed)
    measured = Measurements(config, network, text, folder / "measured")
    handle = arms.attach(network, run.arm, config)
    watch = Watch(phase, on_step)
    callbacks: list[Any] = [watch]
    if handle is not None:
        callbacks.append(MoECallback(handle, per_gate=True))
    resumed = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else 0
    if "tensorboard" in config.report_to and writes():
        callbacks.append(_board(run.board / phase.name, resumed))
    trainer = RoutedTrainer(
        network,
        arguments(config, run, phase, folder, resumed),
        train_dataset=phase.windows,
        data_collator=default_data_collator,  # windows have one length: nothing to pad
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    if handle is not None and checkpoint is None and phase.name == "adapt":  # now that the model is on its device
        with going_on(run.final / ROUTERS):
            handle.load_state_dict(load_checkpoint(run.final / ROUTERS, torch.device("cpu")))
    trainer.measured = measured
    with contextlib.ExitStack() as limits:
        path = None
        if phase.name == "adapt":
            target = network if handle is None else handle
            scope = adapting(config, target, measured.gates, phase.windows.rows, folder / "path.json")
            path = limits.enter_context(scope)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    if phase.name == "train":
        _keep(network, tokenizer, handle, run.final)
    if handle is not None:
        handle.remove()
    trainer.accelerator.wait_for_everyone()
    seconds = sorted(watch.seconds)
    limited = {} if path is None else {"path": {layer.gate: list(layer.experts) for layer in path.layers}}
    return limited | {
        "history": measured.history(),
        "curve": [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry],
        "gates": [gate.name for gate in measured.gates],
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "tokens_per_second": phase.windows.rows[: config.batch_size].numel() / seconds[len(seconds) // 2] if seconds else None,
    }


def _keep(network: Any, tokenizer: Any, handle: MoEHandle | None, folder: Path) -> None:
    """The trained model as `from_pretrained` reads it, and the state of the term beside it."""
    weights = {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in network.state_dict().items()
    }
    if not writes():
        return
    plain = network
    if any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        plain = model.empty(network.config)
        plain.load_state_dict(weights)
    partial = folder.with_name(f"{folder.name}.partial")
    with _writing(folder):
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if handle is not None:
            save_checkpoint(partial / ROUTERS, handle.state_dict())
        seal(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as a RuntimeError
        raise ExperimentError(
            f"cannot write {path}: {error}; make room, or choose another --out; what was saved before is intact, and --resume "
            "goes on from it"
        ) from error


def arguments(config: Config, run: Run, phase: Phase, folder: Path, resumed: int) -> TrainingArguments:
    on_cpu = config.resolved_device() == "cpu"
    sharding: dict[str, Any] = {"fsdp": True, "fsdp_config": FSDP} if config.fsdp else {}
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=phase.steps,
        per_device_train_batch_size=config.batch_size // processes(),
        learning_rate=phase.lr,
        lr_scheduler_type=phase.schedule,
        warmup_steps=phase.warmup,
        weight_decay=0.01,
        seed=run.seed,
        # the order is that of `Windows`; process i of n takes part i of each global batch
        train_sampling_strategy="sequential",
        # every process has equally many tokens. With this on, Trainer multiplies the model's loss by the number of processes,
        # the model's own auxiliary loss too, which is a mean already (huggingface/transformers#48690)
        average_tokens_across_devices=False,
        logging_steps=max(1, phase.steps // 20),
        eval_on_start=not resumed,
        save_total_limit=2,
        report_to=[name for name in config.report_to if name not in ("none", "tensorboard")],
        run_name=f"{run.arm}-seed{run.seed}-{phase.name}",
        use_cpu=on_cpu,
        bf16=config.bf16,
        torch_compile=config.compile,
        ddp_backend="gloo" if on_cpu and processes() > 1 else None,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
        **sharding,
    )
    # one process with several GPUs: Trainer would turn to DataParallel, where hooks run on copies of the model
    made._n_gpu = min(made.n_gpu, 1)
    return made


def _latest(folder: Path) -> Path | None:
    """One that a kill has cut short, or that is damaged, is left aside: what came after the one before is done again."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return next(filter(is_whole, reversed(found)), None)


def _board(folder: Path, resumed: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    # what was logged after the checkpoint is logged again
    return TensorBoardCallback(SummaryWriter(str(folder), purge_step=resumed + 1 if resumed else None))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
