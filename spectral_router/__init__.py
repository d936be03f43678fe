"""Healthy mixture-of-experts routers: distance-based gates, spectral penalties, load balancing."""

from . import functional
from .losses import LoadBalanceLoss
from .penalties import SpectralRankPenalty
from .router import PrototypeRouter, RouterOutput

__version__ = "0.1.0"

__all__ = ["LoadBalanceLoss", "PrototypeRouter", "RouterOutput", "SpectralRankPenalty", "functional"]
