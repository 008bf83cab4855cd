"""A store in the layout of the CELLxGENE Census, which its own client opens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.files import atomic

SCHEMA_VERSION = "1.2.0"


def write_store(
    path: str | Path,
    organism: str,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    counts: sparse.csr_matrix,
    *,
    census_version: str,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write cells as a Census of one organism, whole or not at all.

    Parameters
    ----------
    path
        Folder of the store.
    organism
        Name of the experiment, such as `mus_musculus`.
    obs, var
        Tables with `soma_joinid` 0 … n − 1, `dataset_id` in `obs`, and `feature_id` in `var`.
    counts
        Cells × genes.
    census_version
        Date that the store gives as its release.
    about
        What made the store, kept as JSON in its metadata.
    """
    import pyarrow as pa
    import tiledbsoma as soma

    census: Any
    with atomic(path) as part, soma.Collection.create(str(part.resolve())) as census:
        census.metadata["created_on"] = census_version
        census.metadata["census_schema_version"] = SCHEMA_VERSION
        census.metadata["about"] = json.dumps(dict(about or {}), sort_keys=True)
        with census.add_new_collection("census_info") as info:
            _write_frame(info, "summary", _summary(obs, census_version))
            _write_frame(info, "datasets", _datasets(obs))
        with (
            census.add_new_collection("census_data") as data,
            data.add_new_collection(organism, soma.Experiment) as experiment,
        ):
            _write_frame(experiment, "obs", obs)
            with (
                experiment.add_new_collection("ms") as ms,
                ms.add_new_collection("RNA", soma.Measurement) as rna,
            ):
                _write_frame(rna, "var", var)
                with rna.add_new_collection("X") as layers:
                    _write_matrix(layers, "raw", counts, pa.float32())
                presence = sparse.csr_matrix(np.ones((obs["dataset_id"].nunique(), len(var)), dtype=bool))
                _write_matrix(rna, "feature_dataset_presence_matrix", presence, pa.bool_())


def _summary(obs: pd.DataFrame, census_version: str) -> pd.DataFrame:
    values = {
        "census_schema_version": SCHEMA_VERSION,
        "census_build_date": census_version,
        "total_cell_count": str(len(obs)),
        "unique_cell_count": str(int(obs["is_primary_data"].sum())),
    }
    return pd.DataFrame(
        {"soma_joinid": np.arange(len(values), dtype=np.int64), "label": list(values), "value": list(values.values())}
    )


def _datasets(obs: pd.DataFrame) -> pd.DataFrame:
    counts = obs["dataset_id"].astype(str).value_counts().sort_index()
    ids = counts.index.to_list()
    empty = dict.fromkeys(("citation", "collection_id", "collection_name", "collection_doi"), "")
    return pd.DataFrame(
        {
            "soma_joinid": np.arange(len(ids), dtype=np.int64),
            **empty,
            "dataset_id": ids,
            "dataset_version_id": ids,
            "dataset_title": ids,
            "dataset_h5ad_path": [f"{name}.h5ad" for name in ids],
            "dataset_total_cell_count": counts.to_numpy(dtype=np.int64),
        }
    )


def _write_frame(parent: Any, name: str, frame: pd.DataFrame) -> None:
    """Write a table and link it.

    A table that is created and written within the same open collection shares one timestamp with it: its categories
    are then read back empty, and filters silently match nothing. So it is created, closed and opened anew.
    """
    import pyarrow as pa
    import tiledbsoma as soma

    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata(None).cast(pa.schema([_field(field) for field in table.schema]))
    leaf = f"{parent.uri}/{name}"
    domain = [(0, max(len(frame) - 1, 0))]
    soma.DataFrame.create(leaf, schema=table.schema, index_column_names=["soma_joinid"], domain=domain).close()
    with soma.DataFrame.open(leaf, "w") as writer:
        writer.write(table)
    parent.set(name, soma.DataFrame.open(leaf), use_relative_uri=True)


def _field(field: Any) -> Any:
    """The Census' types: text is `large_string`, categories are dictionaries of it."""
    import pyarrow as pa

    if pa.types.is_dictionary(field.type):
        return pa.field(field.name, pa.dictionary(pa.int32(), pa.large_string()))
    if pa.types.is_string(field.type):
        return pa.field(field.name, pa.large_string())
    return pa.field(field.name, field.type)


def _write_matrix(parent: Any, name: str, matrix: sparse.csr_matrix, kind: Any) -> None:
    import pyarrow as pa

    coo = matrix.tocoo()
    columns = {
        "soma_dim_0": coo.row.astype(np.int64),
        "soma_dim_1": coo.col.astype(np.int64),
        "soma_data": coo.data.astype(kind.to_pandas_dtype()),
    }
    with parent.add_new_sparse_ndarray(name, type=kind, shape=matrix.shape) as array:
        array.write(pa.Table.from_pydict(columns))
