"""What PyPI shows: README with links that work there, and the addresses of repository and site.

The addresses come from where a release is built: REPO_URL and SITE_URL, as for the site. Without them, as in a checkout, a link
into the repository is its text, and a picture of it is left out.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ReadmeHook(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        version = re.search(r'__version__ = "(.+)"', (Path(self.root) / "spectral_router" / "__init__.py").read_text("utf-8"))
        assert version is not None
        repository, site = (os.environ.get(name, "").rstrip("/") for name in ("REPO_URL", "SITE_URL"))
        text = (Path(self.root) / "README.md").read_text("utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, repository, f"v{version[1]}")}
        changes = f"{repository}/blob/main/CHANGELOG.md" if repository else ""
        urls = {"Repository": repository, "Documentation": site, "Changelog": changes}
        metadata["urls"] = {name: address for name, address in urls.items() if address}


def absolute(text: str, repository: str, tag: str) -> str:
    """`text` with links relative to the root of the repository made absolute, to the files as they are at the tag."""
    text = re.sub(r"^<!-- --8<-- .*-->\n", "", text, flags=re.MULTILINE)  # marks for the site

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if not repository:
            return "" if picture else words
        return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/{tag}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)]+)\)", link, text)
