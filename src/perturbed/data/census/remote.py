"""The Census' client: opening a release, with patience for the network and one line for what goes wrong."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from perturbed.errors import ConfigError, DataError, FetchError, PerturbedError

ATTEMPTS = 5
"""Attempts at whatever needs the network."""
PAUSE = 2.0
"""Seconds before the second attempt; doubled each time."""
BUFFER = 64 * 2**20
"""Bytes that the client reserves for each column it reads; its own default is 1 GiB."""

Result = TypeVar("Result")


def attempts_for(uri: str | None) -> int:
    """A folder of this machine gives the same answer every time; everything else is asked again."""
    return 1 if uri is not None and "://" not in uri else ATTEMPTS


def persist(call: Callable[[], Result], what: str, attempts: int) -> Result:
    """What `call` gives, tried again where the network or the store's server fails.

    Raises
    ------
    FetchError
        If the last attempt failed as well.
    """
    for attempt in range(attempts):
        try:
            return call()
        except PerturbedError:
            raise
        except Exception as error:  # the client raises many kinds: SOMAError, TileDBError, OSError, those of requests
            if not _passing(error):
                raise
            if attempt == attempts - 1:
                advice = f"({attempts} attempts); check the network, run again" if attempts > 1 else "; is it whole?"
                raise FetchError(f"{what}: {_reason(error)} {advice}") from None
            time.sleep(PAUSE * 2**attempt)
    raise AssertionError("unreachable")


def _passing(error: Exception) -> bool:
    """Whether another attempt could mend it."""
    import requests
    import tiledbsoma as soma

    if isinstance(error, soma.DoesNotExistError):
        return False
    return isinstance(error, soma.SOMAError | ConnectionError | TimeoutError | requests.RequestException) or (
        type(error).__name__ in ("TileDBError", "ClientError", "EndpointConnectionError")
    )


@contextmanager
def open_census(census_version: str, uri: str | None, name: str) -> Iterator[Any]:
    """Open a release by its date, or a store by its address.

    Raises
    ------
    ConfigError
        If there is no such release; known ones are listed where the directory of releases can be read.
    DataError
        If there is no store at `uri`.
    FetchError
        If the network gives nothing.
    """
    import tiledbsoma as soma

    if uri is not None and "://" not in uri and not Path(uri).is_dir():
        raise DataError(f"{name}: {uri}: no such store; correct `uri`, or make it with `perturbed census simulate`")
    try:
        census = persist(lambda: _open(census_version, uri), f"{name}: Census {census_version}", attempts_for(uri))
    except ValueError as error:
        if uri is not None or "version" not in str(error):
            raise
        raise ConfigError(f"{name}: cells.census_version: no release {census_version!r}; {_known_releases()}") from None
    except soma.DoesNotExistError:
        raise DataError(f"{name}: {uri or census_version}: holds no Census; correct `uri`") from None
    with census:
        if "census_data" not in census:
            raise DataError(f"{name}: {uri or census_version}: holds no Census (no census_data); correct `uri`")
        yield census


def _open(census_version: str, uri: str | None) -> Any:
    import cellxgene_census

    logging.getLogger("cellxgene_census").setLevel(logging.WARNING)
    buffers = {"soma.init_buffer_bytes": BUFFER, "py.init_buffer_bytes": BUFFER}
    if uri is None:
        return cellxgene_census.open_soma(census_version=census_version, tiledb_config=buffers)
    where = uri if "://" in uri else str(Path(uri).resolve())
    return cellxgene_census.open_soma(uri=where, tiledb_config=buffers)


def _known_releases() -> str:
    import cellxgene_census

    try:
        directory = cellxgene_census.get_census_version_directory()
    except Exception:  # only an addition to an error that is told anyway
        return "see the Census' documentation for its releases"
    dates = sorted({str(key) for key in directory if str(key)[:1].isdigit()})
    return f"known: {', '.join(dates)}"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
