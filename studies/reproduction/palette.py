"""Colours that a colour-blind reader can tell apart."""

COLORS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2")  # Okabe and Ito
ROUTERS = {
    "baseline": "#D55E00",
    "clustering": "#56B4E9",
    "spectral": "#009E73",
    "baseline+balance": "#E69F00",
    "baseline+spectral": "#CC79A7",
    "clustering-balance": "#0072B2",
}
MARKERS = "os^Dv*"
