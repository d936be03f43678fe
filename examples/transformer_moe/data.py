"""Text by domain: documents into training and validation, then into windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from examples.shared.command import ExperimentError

from . import sources
from .config import Config
from .sources import Document

VALIDATION = 10  # one document in ten, by its hash
COPIED = 48  # tokens: as long a string is hardly the same by chance
LEAST_DOCUMENTS = 2 * VALIDATION  # a domain of fewer is cut by length, not by document


class Text(NamedTuple):
    """T tokens a window. Domains in their order."""

    domains: list[str]
    train: list[Tensor]  # a domain: (windows, T) int64
    validation: Tensor  # (domains, windows, T) int64
    tokens_per_byte: list[float]  # a domain: of its validation text, separators included
    entropy: list[float]  # a domain: of the tokens of its windows of validation, nats a byte
    pooled_entropy: float  # of all windows of validation
    digest: str


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows in the order in which training takes them: the global batch of a step is one piece of it."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def load(config: Config, tokenizer: Any) -> Text:
    hashed = hashlib.sha256()
    train, validation, density = [], [], []
    names = []
    for domain, documents in sources.documents(config).items():
        learned, held_out = split(list(documents), config.domain_bytes)
        windows = [_windows(tokenizer, part, config.sequence) for part in (learned, held_out)]
        if not len(windows[0]) or len(windows[1]) < config.validation_windows:
            raise ExperimentError(
                f"each domain needs a window of {config.sequence} tokens for training and {config.validation_windows} for "
                f"validation, got {len(windows[0])} and {len(windows[1])} in {domain!r}; add text, or lower --sequence or "
                "--validation-windows"
            )
        for part in windows:
            hashed.update(part.numpy().tobytes())
        names.append(domain)
        train.append(windows[0])
        # spread over the text
        chosen = torch.linspace(0, len(windows[1]) - 1, config.validation_windows).long()
        validation.append(windows[1][chosen])
        size = sum(len(document.text.encode()) for document in held_out)
        density.append(_tokens(tokenizer, held_out).numel() / size)
    if not names:
        raise ExperimentError(f"--dataset must hold text, got none in {config.dataset}")
    if config.adapt_domain is not None and config.adapt_domain not in names:
        raise ExperimentError(f"--adapt-domain must be one of {', '.join(names)}, got {config.adapt_domain}")
    stacked = torch.stack(validation)
    entropies = [unigram_entropy(part) * ratio for part, ratio in zip(stacked, density, strict=True)]
    pooled = unigram_entropy(stacked) * sum(density) / len(density)
    return Text(names, train, stacked, density, entropies, pooled, hashed.hexdigest())


def split(documents: list[Document], budget: int) -> tuple[list[Document], list[Document]]:
    """Training and validation: no document is in both, nor its copy. At most `budget` bytes, and a tenth of it.

    The order is that of the hash of the text, white space and capitals aside: on two machines the same documents are taken in
    the same order, and what one of them lacks changes nothing else.
    """
    keyed = {hashlib.sha256("".join(text.lower().split()).encode()).hexdigest(): (name, text) for name, text in documents}
    if len(keyed) < LEAST_DOCUMENTS:
        parts = [_cut(Document(*keyed[key])) for key in sorted(keyed)]
        return _take([part[0] for part in parts], budget), _take([part[1] for part in parts], budget // VALIDATION)
    members: tuple[list[Document], list[Document]] = ([], [])
    for key in sorted(keyed):
        # the last digits decide, as the first ones are the order
        members[int(key[-8:], 16) % VALIDATION == 0].append(Document(*keyed[key]))
    return _take(members[0], budget), _take(members[1], budget // VALIDATION)


def _cut(document: Document) -> tuple[Document, Document]:
    place = len(document.text) * (VALIDATION - 1) // VALIDATION
    return Document(document.name, document.text[:place]), Document(document.name, document.text[place:])


def _take(documents: list[Document], budget: int) -> list[Document]:
    taken = []
    for document in documents:
        raw = document.text.encode()[:budget]
        if raw:
            taken.append(Document(document.name, raw.decode(errors="ignore")))
        budget -= len(raw)
    return taken


def draw(text: Text, config: Config, seed: int, steps: int, domain: int | None = None) -> Windows:
    """The windows of `steps` steps: every domain alike often (or one only), each going round through a shuffle of its own."""
    generator = torch.Generator().manual_seed(seed)
    count, domains = steps * config.batch_size, len(text.domains)
    turns = torch.randint(domains, (count,), generator=generator) if domain is None else torch.full((count,), domain)
    rows = torch.empty(count, config.sequence, dtype=torch.long)
    for number, windows in enumerate(text.train):
        places = (turns == number).nonzero().flatten()
        order = torch.randperm(len(windows), generator=generator)
        rows[places] = windows[order[torch.arange(len(places)) % len(windows)]]
    return Windows(rows)


def copied(text: Text) -> list[float]:
    """By domain: share of the strings of `copied_length` tokens in its validation that its training text holds too."""
    length = copied_length(text)
    shares = []
    for learned, held_out in zip(text.train, text.validation, strict=True):
        wanted = [string for window in held_out for string in _strings(window, length)]
        known = set(wanted).intersection(_strings(learned.flatten(), length))
        shares.append(sum(string in known for string in wanted) / len(wanted))
    return shares


def copied_length(text: Text) -> int:
    return min(COPIED, text.validation.shape[-1])


def _strings(tokens: Tensor, length: int) -> Iterator[bytes]:
    width = tokens.element_size()
    raw = tokens.numpy().tobytes()
    return (raw[start * width : (start + length) * width] for start in range(len(tokens) - length + 1))


def unigram_entropy(tokens: Tensor) -> float:
    """Entropy of the tokens without their order, nats a token: no model that ignores the context gets below it."""
    shares = torch.bincount(tokens.flatten()).double() / tokens.numel()
    return float(-torch.special.xlogy(shares, shares).sum())


def _tokens(tokenizer: Any, documents: list[Document]) -> Tensor:
    """Documents one after the other, each followed by the end of text."""
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids, dtype=torch.long)


def _windows(tokenizer: Any, documents: list[Document], length: int) -> Tensor:
    tokens = _tokens(tokenizer, documents)
    return rearrange(tokens[: len(tokens) // length * length], "(n t) -> n t", t=length)
