"""What penalty and balance loss cost on paper: operations and bytes of every term as formulas; an estimate for real models.

    python -m benchmarks.cost

The formulas are checked against the counts of a run (tests/benchmarks/test_cost_model.py): products of matrices exactly, bytes
by the tensors that the large operations read and write. The estimate puts them on the roofline of a data sheet: each term
takes the longer of its bytes over the bandwidth and its operations over the peak. It leaves out what a data sheet does not
know: launches of kernels (a few dozen, whatever the number of gates), `eigh`, which on a GPU waits for itself and is not bound
by either limit, what a kernel does inside beyond one read of its inputs and one write of its result, and efficiencies below
one (those of the training step as well).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ._harness import Report, parser, publish

BYTES = 4  # of an entry: float32, in which router weights and probabilities are computed

# L gates, K experts, d their dim, T tokens; a polynomial is a coefficient for each product of them
Polynomial = dict[str, int]


class Term(NamedTuple):
    """One step of the computation. `matmul`: its operations are multiplications and additions of a product of matrices."""

    name: str
    operations: Polynomial
    entries: Polynomial  # read or written
    matmul: bool = False


# 9 K^3 for all eigenvectors of a symmetric matrix is a convention (tridiagonal form, iteration, back-transformation)
EXACT = [Term("top vector: eigh", {"LKKK": 9}, {"LKK": 2})]
POWER = [
    Term("top vector: 12 squarings", {"LKKK": 24}, {"LKK": 24}, matmul=True),
    Term("top vector: division by the trace, 13 times", {"LKK": 13}, {"LKK": 26}),
    Term("top vector: 2 products with a vector", {"LKK": 4}, {"LKK": 2}, matmul=True),
]


def penalty_terms(top_vector: Sequence[Term]) -> list[Term]:
    return [
        Term("forward: copy into one batch", {}, {"LKd": 2}),
        Term("forward: largest and smallest entry", {"LKd": 2}, {"LKd": 2}),
        Term("forward: division by the scale", {"LKd": 1}, {"LKd": 2}),
        Term("forward: Gram matrix W Wᵀ", {"LKKd": 2}, {"LKd": 1, "LKK": 1}, matmul=True),
        Term("forward: zeros for what is not finite", {"LKK": 1}, {"LKK": 2}),
        *top_vector,
        Term("forward: v = Wᵀu", {"LKd": 2}, {"LKd": 1}, matmul=True),
        Term("backward: a multiple of W", {"LKd": 1}, {"LKd": 2}),
        Term("backward: u vᵀ added", {"LKd": 2}, {"LKd": 2}, matmul=True),
    ]


PENALTY = {"exact": penalty_terms(EXACT), "power": penalty_terms(POWER)}
# operations of a softmax by convention: maximum, difference, exponential, sum, quotient
BALANCE = [
    Term("forward: softmax of the logits", {"LTK": 5}, {"LTK": 2}),
    Term("forward: sum over tokens", {"LTK": 1}, {"LTK": 1}),
    Term("backward: of the softmax", {"LTK": 4}, {"LTK": 2}),
    Term("backward: added to the gradient of the logits", {"LTK": 1}, {"LTK": 3}),
]


def value(polynomial: Polynomial, sizes: dict[str, int]) -> int:
    return sum(factor * math.prod(sizes[letter] for letter in product) for product, factor in polynomial.items())


def total(terms: Sequence[Term], sizes: dict[str, int], matmul_only: bool = False) -> tuple[int, int]:
    """Operations and bytes."""
    chosen = [term for term in terms if term.matmul or not matmul_only]
    return sum(value(t.operations, sizes) for t in chosen), BYTES * sum(value(t.entries, sizes) for t in chosen)


class Model(NamedTuple):
    gates: int
    experts: int
    dim: int
    active: float  # parameters that a token passes


MODELS = {
    "Mixtral-8x7B": Model(32, 8, 4096, 12.9e9),
    "OLMoE-1B-7B": Model(16, 64, 2048, 1.3e9),
    "Qwen3-30B-A3B": Model(48, 128, 2048, 3.3e9),
    "DeepSeek-V3": Model(58, 256, 7168, 37e9),
    "Kimi-K2": Model(60, 384, 7168, 32e9),
}
TOKENS = 8192  # of one micro-batch of one device, or of the group of devices that shares one copy of the model
# H100 SXM, data sheet: bytes a second, float32 operations a second without tensor cores, dense bfloat16 ones with them
BANDWIDTH, FLOAT32, BFLOAT16 = 3.35e12, 67e12, 989e12


def seconds(terms: Sequence[Term], sizes: dict[str, int]) -> float:
    costs = [total([term], sizes) for term in terms]
    return sum(max(operations / FLOAT32, moved / BANDWIDTH) for operations, moved in costs)


def formula(polynomial: Polynomial) -> str:
    powers = {"KKK": "K³", "KK": "K²"}
    shown = []
    for product, factor in polynomial.items():
        for long, short in powers.items():
            product = product.replace(long, short)
        shown.append(f"{factor} {product}" if factor > 1 else product)
    return " + ".join(shown) or "0"


def formulas() -> Report:
    report = Report(
        "Formulas: L gates of K experts, width d; T tokens", ["term", "step", "operations", "entries read and written"]
    )
    own = [("penalty, power only" if term in POWER else "penalty, exact only" if term in EXACT else "penalty", term)
           for term in penalty_terms([*EXACT, *POWER])]  # fmt: skip
    for name, term in [*own, *(("balance loss", term) for term in BALANCE)]:
        report.rows.append([name, term.name, formula(term.operations), formula(term.entries)])
    report.notes = [f"An entry has {BYTES} bytes. `eigh`'s operations and those of a softmax are conventions."]
    return report


def estimate() -> Report:
    report = Report(
        "ESTIMATE, data sheet roofline of an H100 SXM: nothing here is measured",
        ["model: L x (K, d)", "part", "GB", "GFLOP", "ms", "% of a step"],
    )
    for name, model in MODELS.items():
        sizes = {"L": model.gates, "K": model.experts, "d": model.dim, "T": TOKENS}
        step = 6 * model.active * TOKENS
        label = f"{name}: {model.gates} x ({model.experts}, {model.dim})"
        for part, terms in (
            ("penalty, exact", PENALTY["exact"]),
            ("penalty, power", PENALTY["power"]),
            ("balance loss", BALANCE),
        ):
            operations, moved = total(terms, sizes)
            taken = seconds(terms, sizes)
            report.rows.append(
                [
                    label,
                    part,
                    f"{moved / 1e9:.3g}",
                    f"{operations / 1e9:.3g}",
                    f"{taken * 1e3:.3g}",
                    f"{100 * taken / (step / BFLOAT16):.2g}",
                ]
            )
        report.rows.append([label, "training step", "", f"{step / 1e9:.3g}", f"{step / BFLOAT16 * 1e3:.4g}", "100"])
    report.notes = [
        f"A step is {TOKENS} tokens at 6 operations a token and active parameter, at the bfloat16 peak: one micro-batch of one "
        "copy of the model. The penalty is computed anew for each, by one device, for all gates; a global batch of 4 million "
        "tokens is 512 such steps, with the same shares.",
        f"{BANDWIDTH / 1e12} TB/s, {FLOAT32 / 1e12:.0f} TFLOP/s float32, {BFLOAT16 / 1e12:.0f} TFLOP/s bfloat16. Left out: "
        "kernel launches, and that `eigh` (exact) runs far below any roofline on a GPU and makes the host wait. Neither step "
        "nor terms reach the data sheet in practice.",
    ]
    return report


def measure(repeats: int, quick: bool) -> list[Report]:
    """Sums on paper: nothing to repeat, and nothing to make smaller."""
    return [formulas(), estimate()]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser("cost", __doc__, repeats=1).parse_args(argv)
    publish(measure(arguments.repeats, arguments.quick), arguments.json)


if __name__ == "__main__":
    main()
