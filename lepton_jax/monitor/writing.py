"""Pages as files: whole or not at all."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from lepton_jax.errors import LeptonError, writing_remedy


def write_page(path: Path, page: str, folder: Path) -> Path:
    """Write a page, and return its path.

    Args:
      path: of the page.
      page: as HTML.
      folder: of the run that it is about, for the remedy.

    Raises:
      LeptonError: it can't be written.
    """
    try:
        part = path.with_suffix(".html.part")
        part.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
        os.replace(part, path)  # a reader sees the old page or the new one
    except OSError as error:
        raise LeptonError(
            f"the report can't be written: {error.strerror or error}",
            where=path,
            remedy=(
                f"{writing_remedy(error)}; then run "
                f"python -m lepton_jax.monitor.report {shlex.quote(str(folder))}"
            ),
        ) from error
    return path
