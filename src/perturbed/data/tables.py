"""Tables with a header: csv files that say where they come from and carry the hash of their body."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from perturbed.errors import DataError
from perturbed.files import sha256_text, write_text


def write_table(path: str | Path, table: pd.DataFrame, header: Mapping[str, Any]) -> str:
    """Write a csv with `# key: json` header lines and the sha256 of its body; return that hash.

    Numbers are written with 9 significant digits, so that equal tables are equal bytes.
    """
    body = table.to_csv(index=False, lineterminator="\n", float_format="%.9g")
    digest = sha256_text(body)
    lines = [f"# {key}: {json.dumps(value, sort_keys=True)}" for key, value in {**header, "sha256": digest}.items()]
    write_text(path, "\n".join(lines) + "\n" + body)
    return digest


def read_table(path: str | Path, **read_csv: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a csv of `write_table`: the table and its header, with the hash checked.

    Raises
    ------
    DataError
        If the file is missing, has no header, or its body was changed since it was written.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); make it with the stage before") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: holds no text; delete it and rerun the stage that makes it") from None
    lines = text.splitlines(keepends=True)
    header = _parse_header(lines, path)
    body = "".join(lines[len(header) :])
    if header.get("sha256") != sha256_text(body):
        raise DataError(f"{path}: its sha256 does not match its content; delete it and rerun the stage that makes it")
    return pd.read_csv(io.StringIO(body), keep_default_na=False, na_values=[""], **read_csv), header


def read_header(path: str | Path) -> dict[str, Any]:
    """The header alone of a csv of `write_table`, whose body is neither read nor checked."""
    try:
        with open(path, encoding="utf-8") as handle:
            return _parse_header(list(itertools.takewhile(lambda line: line.startswith("# "), handle)), path)
    except (OSError, UnicodeDecodeError):
        return read_table(path)[1]  # which says what is wrong


def _parse_header(lines: list[str], path: str | Path) -> dict[str, Any]:
    """The header lines that a file begins with."""
    header = itertools.takewhile(lambda line: line.startswith("# "), lines)
    try:
        return {key: json.loads(value) for key, value in (line[2:].split(": ", 1) for line in header)}
    except ValueError:
        raise DataError(
            f"{path}: its header cannot be read; delete the file and rerun the stage that makes it"
        ) from None
