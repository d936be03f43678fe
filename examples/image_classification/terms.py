"""What `--penalty` and `--balance` name: everything that can fill these two places of equation 7, each in one line.

A penalty reads the routers' weights; "project" and "rescue" have no loss, they change the weights instead, after a step and
after an epoch. A balance loss reads probabilities or logits; a controller sits in every router, between gate and choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names below are those of flags, whose help is not to wait for torch
    import torch
    from torch import Tensor, nn

    from spectral_router import ImportanceConstraint, LossFreeBias

    from .config import Config


def _made(name: str, *arguments: Any, **options: Any) -> Any:
    """One of the library's modules."""
    import spectral_router

    return getattr(spectral_router, name)(*arguments, **options)


def _rank(config: Config) -> nn.Module:
    return _made("SpectralRankPenalty", config.sigma_target, config.rank_target, relative=config.relative)


PENALTIES: dict[str, Callable[[Config], nn.Module]] = {
    "rank": _rank,  # SR-MoE, equations 3 + 5
    "norm": lambda config: _made("SpectralNormPenalty"),  # Yoshida & Miyato 2017
    "sigma": lambda config: _made("SpectralNormPenalty", 1, solver="exact"),  # equation 3 alone
    "lewandowski": lambda config: _made("SpectralNormPenalty", 1, power=2),
    "mhe": lambda config: _made("HypersphericalEnergyPenalty"),
    "mhe-half": lambda config: _made("HypersphericalEnergyPenalty", half_space=True),
    "comhe": lambda config: _made("HypersphericalEnergyPenalty", half_space=True, projection="random"),
    "so": lambda config: _made("OrthogonalityPenalty", "so"),
    "simbal": lambda config: _made("OrthogonalityPenalty", "simbal"),
    "ernie": lambda config: _made("OrthogonalityPenalty", "ernie"),
}
INPLACE = ("project", "rescue")

BALANCES = {
    "cv2": "LoadBalanceLoss",  # equation 6
    "kl": "ImportanceKLLoss",
    "mi": "MutualInformationLoss",
    "switch": "SwitchLoss",
    "z": "RouterZLoss",
}
CONTROLLERS: dict[str, Callable[[Config], ImportanceConstraint | LossFreeBias]] = {
    "relative": lambda config: _made("ImportanceConstraint", config.experts, config.bound, kind="relative"),
    "mean": lambda config: _made("ImportanceConstraint", config.experts, config.bound, kind="mean"),
    "bias": lambda config: _made("LossFreeBias", config.experts, config.bias_rate),
}


def penalty(config: Config) -> nn.Module:
    return PENALTIES.get(config.penalty, _rank)(config)


def balance(config: Config) -> nn.Module:
    return _made(BALANCES.get(config.balance, "LoadBalanceLoss"))


def controller(config: Config, used: bool) -> ImportanceConstraint | LossFreeBias | None:
    """A new one for one router, None if the balance is a loss or not used."""
    return CONTROLLERS[config.balance](config) if used and config.balance in CONTROLLERS else None


def after_step(config: Config, weights: list[Tensor]) -> None:
    if config.penalty == "project":
        from spectral_router import project_spectral_

        project_spectral_(weights, float(config.sigma_target))


def after_epoch(config: Config, weights: list[Tensor], routed: Tensor, optimizer: torch.optim.Optimizer) -> int:
    """`routed` (n, L, K): the experts' weights on the validation images; how many prototypes were planted anew."""
    if config.penalty != "rescue":
        return 0
    import torch

    from spectral_router import rescue_collapsed_

    shares = routed.mean(0)
    rescued = [
        rescue_collapsed_(weight, share=share, optimizer=optimizer) for weight, share in zip(weights, shares, strict=True)
    ]
    return int(torch.stack(rescued).sum())
