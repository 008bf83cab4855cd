"""The verb `perturbed mirror`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def mirror(
    out: Annotated[Path, typer.Option("--dir", help="Folder to fill.")],
    config: Annotated[Path, typer.Option(help="The run whose files are wanted.")] = Path("config/config.yaml"),
    allow_unpinned: Annotated[bool, typer.Option(help="Accept files whose hash nobody has pinned.")] = False,
    progress: Annotated[bool, typer.Option(help="Draw progress bars on stderr.")] = True,
) -> None:
    """Collect in one folder all that a config gets from elsewhere, for a machine without internet (`mirror:` there).

    Files are checked against size and hash; what is there already is kept, half a download is gone on with. Beside them
    lie manifest.json and SHA256SUMS (`sha256sum -c SHA256SUMS` after carrying them).
    """
    from perturbed.config import read_yaml
    from perturbed.data.mirror import mirror_run
    from perturbed.plan import Plan

    mirror_run(Plan(read_yaml(config)), out, allow_unpinned=allow_unpinned, progress=progress)
