"""README.md as the description of the package: read away from the repository, its links must be whole addresses.

A metadata hook of hatchling, named in pyproject.toml.
"""

import re
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# [text](target) and ![text](target), where the target is a file of the repository.
LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?![a-z]+:|#)([^)\s]+)(?=\))")


def with_whole_links(text: str, repository: str) -> str:
    """Return a page of the repository's root with the addresses of what it links to; pictures as files, not pages."""
    return LINK.sub(
        lambda link: f"{link[1]}{link[2]}{repository}/{'raw' if link[1] else 'blob'}/main/{link[3]}",
        text,
    )


class ReadmeHook(MetadataHookInterface):
    """Fills in the dynamic field `readme`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the description from README.md."""
        with open(f"{self.root}/README.md", encoding="utf-8") as page:
            text = with_whole_links(page.read(), metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
