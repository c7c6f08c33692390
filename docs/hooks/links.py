"""Links that leave docs/ work on GitHub as they are; here they are made to work in the built site too.

A picture outside docs/ is copied into the site. Any other link to a file of the repository becomes one to the
repository's page of that file, if the file is there; the build fails if it is not.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

logger = logging.getLogger("mkdocs.hooks.links")

PICTURES = (".png", ".svg", ".jpg", ".webp")
# [text](target) and ![text](target), where the target leaves the page's folder. In code nobody writes that here.
LINK = re.compile(r"(?<=\]\()(\.\./[^)\s#]+)(#[^)\s]*)?(?=\))")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files, **_: Any) -> str:
    """Return a page's text with its links out of docs/ rewritten."""
    docs = Path(config.docs_dir)
    root = docs.parent

    def rewritten(found: re.Match[str]) -> str:
        target, anchor = found.group(1), found.group(2) or ""
        file = (docs / page.file.src_uri).parent.joinpath(target).resolve()
        if file.is_relative_to(docs):
            return found.group()
        if not file.exists() or not file.is_relative_to(root):
            logger.warning("%s links to %s, which is not in the repository.", page.file.src_uri, target)
            return found.group()
        inside = file.relative_to(root).as_posix()
        if file.suffix not in PICTURES:
            kind = "tree" if file.is_dir() else "blob"
            return f"{config.repo_url.rstrip('/')}/{kind}/main/{inside}{anchor}"
        if files.get_file_from_path(inside) is None:
            files.append(File.generated(config, inside, abs_src_path=str(file)))
        return posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(rewritten, markdown)
