"""One colour for each arm, in every picture of every experiment.

Arms that add the same thing are one colour, whatever an experiment calls them: grey adds nothing, orange the balance loss,
purple the penalty, blue both. Most are of Okabe and Ito, so that colour-blind readers can tell those of one picture apart.
"""

from __future__ import annotations

GREY, ORANGE, PURPLE, BLUE, SKY, GREEN = "#6E6E6E", "#E69F00", "#CC79A7", "#0072B2", "#56B4E9", "#009E73"
BROWN, WINE = "#8B5E1A", "#882255"
NEUTRAL = "#333333"  # of arms that their row names, and of what belongs to none
ARMS = {
    # the paper's routers and their controls
    "baseline": GREY,
    "baseline+balance": ORANGE,
    "baseline+spectral": PURPLE,
    "spectral": BLUE,
    "clustering": SKY,
    "clustering-balance": GREEN,
    "linear gate": GREY,
    "prototypes": GREEN,
    "no penalty": SKY,
    "SpectralRankPenalty": BLUE,
    # language models, and the small mixture of experts
    "none": GREY,
    "no term": GREY,
    "balance": ORANGE,
    "penalty": PURPLE,
    "penalty alone": PURPLE,
    "spread": PURPLE,
    "both": BLUE,
    "both, the default": BLUE,
    "hold": GREEN,
    "hold+balance": SKY,
    "own": BROWN,
    "ernie": WINE,
    "slower": GREEN,
    # the paper's network at many rates
    "linear": GREY,
    "linear+balance": ORANGE,
    "linear+balance, residual": BROWN,
    "prototypes+balance": SKY,
    "spectral, relative": WINE,
    # convolutional experts: soft constraints are balance losses
    "plain": NEUTRAL,
    "quiet": SKY,
    "importance": ORANGE,
    "kl": BROWN,
    "relative": PURPLE,
    "mean": WINE,
    # regularizers
    "weight-decay": BROWN,
    "spectral-norm": BLUE,
    "spectral-target": SKY,
    "mhe": ORANGE,
    "mhe-half": BROWN,
    "comhe-random": PURPLE,
    "comhe-angle": BLUE,
    "comhe-adversarial": WINE,
}
CLASSES = ("#332288", "#88CCEE", "#DDCC77", "#CC6677", "#AA4499", "#44AA99", "#999933", "#661100", "#117733", "#BBBBBB")  # Tol
MARKERS = "os^Dv*P"


def color(arm: str) -> str:
    """Of an arm by its name; neutral for one that has none of its own."""
    return ARMS.get(arm, NEUTRAL)
