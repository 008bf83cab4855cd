"""The verbs `perturbed mirror` and `perturbed fetch-file`: what a run gets from elsewhere beside its cells."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perturbed.cli_options import DataDir, Mirror, Out, Unpinned, read_option


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


def fetch_file(
    file: Annotated[str, typer.Option("--file", help="The file as a card names it: YAML or JSON text, or a file.")],
    out: Out,
    data_dir: DataDir = Path("data"),
    mirror: Mirror = "",
    allow_unpinned: Unpinned = False,
) -> None:
    """Get one file that a card names beside the cells, such as a graph of genes, checked against size and hash."""
    import shutil

    from perturbed.config import parse
    from perturbed.data import fetch
    from perturbed.data.cards import RemoteFile
    from perturbed.files import atomic
    from perturbed.provenance import recorded

    wanted, near = parse(RemoteFile, read_option(file, "--file"), "--file"), Path(mirror) if mirror else None
    with recorded("fetch-file", out, {}, {"file": wanted.model_dump(mode="json")}):
        folder = data_dir / "downloads"
        path = fetch.fetch_file(wanted, folder, mirror=near, allow_unpinned=allow_unpinned, progress=False)
        with atomic(out) as part:
            shutil.copyfile(path, part)
