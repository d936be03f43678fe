"""The slow, literal formulas of the paper (arXiv:2601.03889) and of its sisters, in float64, one matrix or one token at a time.

The package is compared to these. They are built for reading: no batching, no shared work, no care for degenerate inputs
beyond what the package documents. Gradients of the spectral values come from autograd through `svdvals`.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def spectral_norm(weight: Tensor) -> Tensor:
    return _each(weight, lambda matrix: torch.linalg.svdvals(matrix)[0])


def stable_rank(weight: Tensor) -> Tensor:
    """Equation 4, |W|_F^2 / sigma_max^2; 0 for the zero matrix."""

    def one(matrix: Tensor) -> Tensor:
        values = torch.linalg.svdvals(matrix)
        if values[0] == 0:
            return 0 * values[0]
        return (values**2).sum() / values[0] ** 2

    return _each(weight, one)


def spectral_rank_penalty(
    weight: Tensor,
    sigma_target: float | Tensor = 1.0,
    rank_target: float | Tensor | None = None,
    relative: bool = False,
    center: bool = False,
    one_sided: bool = False,
) -> Tensor:
    """Equations 3 + 5 for each matrix; one-sided, a norm below and a rank above its target cost nothing."""
    weight = weight.double()
    rows, columns = weight.shape[-2:]
    if center:
        weight = weight - weight.mean(-2, keepdim=True)
        rows -= 1
    if rank_target is None:
        rank_target = max(1, min(rows, columns))
    sigma_part = spectral_norm(weight) - sigma_target
    rank_part = stable_rank(weight) - rank_target
    if relative:
        sigma_part = sigma_part / sigma_target
        rank_part = rank_part / rank_target
    if one_sided:
        sigma_part = torch.where(sigma_part > 0, sigma_part, 0)
        rank_part = torch.where(rank_part < 0, rank_part, 0)
    return sigma_part**2 + rank_part**2


def gradient(function: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """Gradient of the sum of `function(weight)` in float64."""
    leaf = weight.detach().double().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def load_balance_loss(probs: Tensor, mask: Tensor | None = None, unbiased: bool = False) -> float:
    """Equation 6, (std(P) / mean(P))^2 with P_i the mean of probs[..., i] over the tokens that count."""
    num_experts = probs.shape[-1]
    rows = probs.double().reshape(math.prod(probs.shape[:-1]), num_experts).tolist()
    keep = [True] * len(rows) if mask is None else [bool(entry) for entry in mask.reshape(-1).tolist()]
    rows = [row for row, kept in zip(rows, keep, strict=True) if kept]
    if not rows or num_experts == 1:
        return 0.0
    importance = []
    for expert in range(num_experts):
        total = 0.0
        for row in rows:
            total += row[expert]
        importance.append(total / len(rows))
    mean = sum(importance) / num_experts
    variance = 0.0
    for value in importance:
        variance += (value - mean) ** 2
    variance /= num_experts - 1 if unbiased else num_experts
    return variance / mean**2


def scores(x: Tensor, prototypes: Tensor, metric: str) -> Tensor:
    """(T, D), (K, D) -> (T, K), one token and one expert at a time; "sqeuclidean" is the squared distance itself."""
    rows = []
    for token in x.double():
        row = []
        for prototype in prototypes.double():
            if metric == "euclidean":
                score = -(token - prototype).norm()
            elif metric == "sqeuclidean":
                score = -((token - prototype) ** 2).sum()
            elif metric == "cosine":
                score = (token * prototype).sum() / (token.norm() * prototype.norm())
            else:
                score = (token * prototype).sum()
            row.append(score)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def route(x: Tensor, prototypes: Tensor, temperature: float, metric: str) -> Tensor:
    """Equation 2: (T, D), (K, D) -> (T, K) probabilities."""
    rows = []
    for row in scores(x, prototypes, metric) / temperature:
        odds = [torch.exp(score - row.max()) for score in row]
        rows.append(torch.stack([value / sum(odds) for value in odds]))
    return torch.stack(rows)


def _each(weight: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of one matrix to every matrix of (*, m, n)."""
    matrices = weight.double().reshape(-1, *weight.shape[-2:])
    return torch.stack([function(matrix) for matrix in matrices]).reshape(weight.shape[:-2])


def spectral_norm_penalty(weights: list[Tensor], sigma_target: float = 0.0, power: float = 1) -> Tensor:
    """The formula, in float64, one matrix at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for weight in weights:
        sigma = torch.linalg.svdvals(weight.double().reshape(len(weight), -1))[0]
        total = total + (sigma**power - sigma_target**power) ** 2
    return total


def hyperspherical_energy(weight: Tensor, s: int, angular: bool, half_space: bool) -> Tensor:
    """The mean over all pairs but a row with its own negative, a pair at a time, in float64; none may be closer than EPS."""
    rows = [row / row.norm() for row in weight.double()]
    signs = (1, -1) if half_space else (1,)
    points = [(index, sign * row) for sign in signs for index, row in enumerate(rows)]
    energies = []
    for (i, one), (j, other) in itertools.combinations(points, 2):
        if i != j:
            r = torch.acos(one @ other) if angular else (one - other).norm()
            energies.append(torch.log(1 / r) if s == 0 else r**-s)
    return torch.stack(energies).mean() if energies else 0 * weight.double().sum()


def combine_weights(logits: list[float], choice: list[float], top_k: int | None) -> list[float]:
    """Of one token, for every expert: the softmax of the choice, or of the logits of the top_k chosen, closed ones at 0."""
    experts = range(len(logits))
    chosen = experts if top_k is None else sorted(experts, key=lambda expert: -choice[expert])[:top_k]
    score = choice if top_k is None else logits
    open_ones = [expert for expert in chosen if choice[expert] > -math.inf]
    top = max(score[expert] for expert in open_ones)
    odds = [math.exp(score[expert] - top) if expert in open_ones else 0.0 for expert in experts]
    return [value / sum(odds) for value in odds]


def importance_constraint(
    steps: list[Tensor], top_k: int | None, bound: float, kind: str, momentum: float | None = None
) -> list[tuple[list[bool], list[list[float]], list[float], float]]:
    """For each step's logits (T, K): who was open, the weights, the state after it, and how near an expert was to the bound."""
    num_experts = steps[0].shape[-1]
    state, counted, found = [0.0] * num_experts, 0, []
    for logits in steps:
        excess = [value if kind == "relative" else value - 1 / num_experts for value in state]
        opened = [value <= bound for value in excess]
        importance, rows = [0.0] * num_experts, []
        for row in logits.double().tolist():
            choice = [logit if is_open else -math.inf for logit, is_open in zip(row, opened, strict=True)]
            rows.append(combine_weights(row, choice, top_k))
            for expert in range(num_experts):
                importance[expert] += rows[-1][expert]
        mean = sum(importance) / num_experts
        if rows:
            counted += 1
            for expert in range(num_experts):
                if kind == "relative":
                    state[expert] += (importance[expert] - mean) / mean
                else:
                    newest = max(1 / counted, momentum or 0.0)
                    state[expert] = (1 - newest) * state[expert] + newest * importance[expert] / sum(importance)
        found.append((opened, rows, list(state), min(abs(value - bound) for value in excess)))
    return found


def loss_free_bias(steps: list[Tensor], top_k: int | None, rate: float) -> list[tuple[list[list[float]], list[float]]]:
    """For each step's logits (T, K): the weights, and the bias after it."""
    num_experts = steps[0].shape[-1]
    bias, found = [0.0] * num_experts, []
    for logits in steps:
        load, rows = [0.0] * num_experts, []
        for row in logits.double().tolist():
            choice = [logit + one for logit, one in zip(row, bias, strict=True)]
            rows.append(combine_weights(row, choice, top_k))
            for expert in range(num_experts):
                if top_k is None or top_k == num_experts:
                    load[expert] += rows[-1][expert]
                elif expert in sorted(range(num_experts), key=lambda one: -choice[one])[:top_k]:
                    load[expert] += 1
        for expert in range(num_experts):
            off = sum(load) / num_experts - load[expert]
            bias[expert] += rate * (1 if off > 1e-9 else -1 if off < -1e-9 else 0)
        found.append((rows, list(bias)))
    return found


def _counted(rows: Tensor, mask: Tensor | None) -> list[list[float]]:
    """(*, K) -> the rows that count, as lists of float64."""
    listed = rows.detach().double().reshape(math.prod(rows.shape[:-1]), rows.shape[-1]).tolist()
    keep = [True] * len(listed) if mask is None else [bool(entry) for entry in mask.reshape(-1).tolist()]
    return [row for row, kept in zip(listed, keep, strict=True) if kept]


def importance_kl_loss(probs: Tensor, mask: Tensor | None = None) -> float:
    """sum_i P_i log(K P_i), with P_i the share that expert i has of all probability (arXiv:2204.10598)."""
    importance = [sum(column) for column in zip(*_counted(probs, mask), strict=True)]
    if sum(importance) == 0:
        return 0.0
    shares = [value / sum(importance) for value in importance]
    return sum(share * math.log(len(shares) * share) for share in shares if share > 0)


def mutual_information_loss(probs: Tensor, mask: Tensor | None = None) -> float:
    """-sum_ti p_ti log(p_ti / (p_t p_i)), the entries over their sum read as joint probabilities of token and expert."""
    rows = _counted(probs, mask)
    total = sum(map(sum, rows))
    columns = [sum(column) for column in zip(*rows, strict=True)]
    information = 0.0
    for row in rows:
        for entry, column in zip(row, columns, strict=True):
            if entry > 0:
                information += entry / total * math.log(entry * total / (sum(row) * column))
    return -information


def switch_loss(probs: Tensor, mask: Tensor | None = None, top_k: int = 1) -> float:
    """K sum_i f_i P_i (arXiv:2101.03961, equation 4), f_i the share of the T top_k assignments that expert i gets."""
    rows, num_experts = _counted(probs, mask), probs.shape[-1]
    total = 0.0
    for expert in range(num_experts):
        assigned = 0
        for row in rows:
            assigned += sum(other > row[expert] for other in row) < top_k  # for rows without ties
        if rows:
            total += assigned / (len(rows) * top_k) * sum(row[expert] for row in rows) / len(rows)
    return num_experts * total


def router_z_loss(logits: Tensor, mask: Tensor | None = None) -> float:
    """Mean of (log sum_i exp x_i)^2 (arXiv:2202.08906, equation 5)."""
    rows = _counted(logits, mask)
    squares = []
    for row in rows:
        largest = max(row)
        squares.append((largest + math.log(sum(math.exp(logit - largest) for logit in row))) ** 2)
    return sum(squares) / len(squares) if squares else 0.0


def orthogonality(weight: Tensor, form: str) -> Tensor:
    """ "so": |WW' - I|_F^2; "simbal": its entries' absolute sum; "ernie": mean squared entry for rows of length one."""
    rows = list(weight.double())
    if form == "ernie":
        rows = [row / row.norm() if row.norm() > 0 else 0 * row for row in rows]
    total = torch.zeros((), dtype=torch.float64)
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            off = one @ other - (1.0 if i == j else 0.0)
            total = total + (off.abs() if form == "simbal" else off**2)
    return total / len(rows) ** 2 if form == "ernie" else total


def polar_factor(weight: Tensor) -> Tensor:
    """U V' of the singular value decomposition W = U S V', without the directions in which S is zero."""

    def one(matrix: Tensor) -> Tensor:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        kept = values > 1e-12 * values[0]
        return left[:, kept] @ right[kept]

    matrices = weight.double().reshape(-1, *weight.shape[-2:])
    return torch.stack([one(matrix) for matrix in matrices]).reshape(weight.shape)


def collapsed_rows(weight: Tensor, share: list[float] | None, tolerance: float, dead: float) -> list[bool]:
    """Which rows are dead, by norm or share, or repeat an earlier row that is neither; units of the finite rows' RMS norm."""
    rows = weight.double().tolist()
    norms = [math.hypot(*row) for row in rows]
    finite = [norm for norm in norms if math.isfinite(norm)]
    unit = math.sqrt(sum(norm**2 for norm in finite) / len(finite)) if finite else 0.0
    collapsed = []
    for i, norm in enumerate(norms):
        collapsed.append(not math.isfinite(norm) or norm <= tolerance * unit)
        known = [part for part in share or [] if math.isfinite(part)]
        if share is not None and math.isfinite(share[i]) and share[i] < dead * sum(known) / len(known):
            collapsed[i] = True
    dead_rows = list(collapsed)
    for i, j in itertools.combinations(range(len(rows)), 2):
        if not dead_rows[i] and math.dist(rows[i], rows[j]) <= tolerance * unit:
            collapsed[j] = True
    return collapsed
