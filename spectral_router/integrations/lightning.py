"""Lightning: the router's metrics in its logs, the state of the objective in its checkpoints."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

from ..wrap.handle import MoEHandle
from . import router_metrics

# Lightning is published under two names, whose classes differ; the one that the program uses is there already
if TYPE_CHECKING or "lightning.pytorch" in sys.modules:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ImportError:
        from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["MoECallback"]


class MoECallback(Callback):
    """Logs what the routers of a wrapped model do, and carries `handle.state_dict()` through Lightning's checkpoints.

    Every `log_every_n_steps` the keys of `integrations.router_metrics` are logged with the module's `log_dict`, for all loggers
    and `trainer.callback_metrics`. Wrap the module that `training_step` calls. Works with `lightning` and `pytorch_lightning`.

    Args:
        handle: of the wrapped model; None finds that of a model inside the LightningModule.
        per_gate: log every number of every gate too.

    Raises:
        ValueError: when training begins: no handle, and nothing in the module is wrapped; or the checkpoint is of other gates.

    Warns:
        UserWarning: the checkpoint holds no state, so that "initial" anchors are those of the weights as they are now.

    >>> trainer = Trainer(callbacks=[MoECallback(handle)])  # doctest: +SKIP
    >>> trainer.fit(module, data)  # doctest: +SKIP
    """

    def __init__(self, handle: MoEHandle | None = None, per_gate: bool = False) -> None:
        self.handle = handle
        self.per_gate = per_gate
        self._given = handle
        self._loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.handle = self._given or MoEHandle.of(pl_module)
        if self.handle is None:
            raise ValueError(f"no model in {type(pl_module).__name__} is wrapped; call wrap_moe(model) first")
        if self._loaded is not None:
            self.handle.load_state_dict(self._loaded)
        elif trainer.ckpt_path is not None:
            warnings.warn(
                "the checkpoint holds no state of the routers' objective, as it was written without MoECallback; "
                'sigma_target="initial" takes the weights as they are now for its anchors',
                stacklevel=2,
            )
        self._loaded = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        # Lightning's own callbacks ask this too: numbers are read from the device only where they are logged
        if self.handle is not None and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(router_metrics(self.handle, self.per_gate), on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.handle is None else self.handle.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # kept until training starts: the model may be made and wrapped, and moved, after this
        self._loaded = state_dict
