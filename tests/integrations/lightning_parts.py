"""What the tests of Lightning train with. Importing Lightning takes seconds, so that the tests do it when they run."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from moe_models import gradients
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spectral_router.integrations.lightning import MoECallback

__all__ = ["CSVLogger", "Language", "MoECallback", "ModelCheckpoint", "Spy", "data", "trainer"]


def rows(count: int = 12) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 90, (count, 8), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


class Language(LightningModule):
    """The loss comes from the model, with the term in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Spy(Callback):
    """Gradients of the first optimizer step."""

    gradients: dict[str, Tensor] | None = None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if self.gradients is None:
            self.gradients = {name: gradient.clone() for name, gradient in gradients(pl_module.model).items()}


def trainer(folder, *callbacks, kind=Trainer, **options):
    settings = {
        "max_steps": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    return kind(default_root_dir=folder, callbacks=list(callbacks), **{**settings, **options})


def data(count: int = 12) -> DataLoader:
    return DataLoader(rows(count), batch_size=2)
