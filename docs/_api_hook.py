"""Puts docstrings into the docs: a line `::: spectral_router.name` of a page becomes that object's signature and docstring."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Source", "Warns")
METHODS = ("init_from", "reset_parameters", "observe", "loss", "metrics", "state_dict", "load_state_dict", "remove", "of")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"^::: ([\w.]+)$", lambda match: render(match[1]), markdown, flags=re.MULTILINE)


def render(path: str) -> str:
    module, _, name = path.rpartition(".")
    target = getattr(importlib.import_module(module), name)
    # the signature of a NamedTuple says nothing that its docstring does not, that of a protocol nothing at all
    plain = isinstance(target, type) and (issubclass(target, tuple) or getattr(target, "_is_protocol", False))
    call = name if plain else name + _signature(target)
    text = f"```python\n{call}\n```\n\n{docstring_to_markdown(inspect.getdoc(target) or '')}"
    for method in METHODS:
        if method in vars(target) and (body := getattr(target, method)).__doc__:
            text += f"\n\n```python\n{name}.{method}{_signature(body)}\n```\n\n"
            text += docstring_to_markdown(inspect.getdoc(body) or "")
    return text


def docstring_to_markdown(text: str) -> str:
    """Google-style sections become lists; doctests become code blocks; formulas are indented, so code blocks already."""
    lines: list[str] = []
    section = False
    for line in text.splitlines():
        title = line.rstrip(":")
        if (title in SECTIONS and line.endswith(":")) or line == "**Shape**":
            section = True
            lines += ["", line if line == "**Shape**" else f"**{title}**", ""]
        elif section and line.startswith("    "):
            item = line[4:]
            lines.append(
                re.sub(r"^(?:- )?([\w, ]+):(?= )", r"- `\1`:", item) if not item.startswith(" ") else f"    {item.strip()}"
            )
        else:
            section = section and not line
            lines.append(line)
    return re.sub(
        r"((?:^(?:>>>|\.\.\.).*\n?(?:(?!>>>|\n).+\n?)*)+)", r"\n```pycon\n\1\n```\n", "\n".join(lines), flags=re.MULTILINE
    )


def _signature(target: Any) -> str:
    """Without annotations: the docstring gives types, and defaults read better alone."""
    signature = inspect.signature(target)
    parameters = [item.replace(annotation=item.empty) for item in signature.parameters.values() if item.name != "self"]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))
