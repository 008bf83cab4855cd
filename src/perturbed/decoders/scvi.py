"""scvi-tools' SCVI as a decoder, rebuilt from its saved folder without running anything the file holds.

A saved SCVI model is a pickle. Its weights are tensors, its registry holds plain containers and numpy arrays, its
training history pandas tables. Here it is read by torch's restricted unpickler with an allow-list: numpy arrays as they
are, pandas' parts replaced by inert ones, anything else refused, unless the file's hash is one the user vouches for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from perturbed.decoders.base import Context, Decoded, Decoder, Encoded, LastLayer
from perturbed.errors import DataError, MethodError, suggest
from perturbed.files import hash_file

if TYPE_CHECKING:
    from anndata import AnnData

CHUNK = 2048
"""Cells encoded at a time."""


class _Inert:
    """Stands in for an object of the file that is not needed."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def append(self, _: Any) -> None:
        """Accept items, as a list would."""


def _inert(*_: Any, **__: Any) -> _Inert:
    return _Inert()


def _empty_dict(*_: Any) -> dict[str, Any]:
    """Stands in for a defaultdict, which the restricted unpickler does not fill."""
    return {}


_WEIGHTS = ("decoder.px_scale_decoder.0.weight", "z_encoder.mean_encoder.weight")
"""Weights that every SCVI model has."""
_NOT_NEEDED = (
    "pandas.core.frame.DataFrame",
    "pandas.core.series.Series",
    "pandas.core.internals.managers.BlockManager",
    "pandas.core.internals.managers.SingleBlockManager",
    "pandas.core.indexes.base.Index",
    "pandas.core.indexes.range.RangeIndex",
    "pandas._libs.internals._unpickle_block",
    "pandas.core.indexes.base._new_Index",
)


@contextmanager
def _allow_list() -> Iterator[None]:
    """Names that a saved SCVI model may use."""
    from numpy._core.multiarray import _reconstruct, scalar

    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdgOSU"}
    numpy: list[Any] = [np.ndarray, np.dtype, *dtypes]
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):  # the name before and since numpy 2
        numpy += [(_reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    classes: list[Any] = [(_Inert if name.rsplit(".", 1)[1][0].isupper() else _inert, name) for name in _NOT_NEEDED]
    with torch.serialization.safe_globals(
        [*numpy, *classes, (_empty_dict, "collections.defaultdict"), slice, bytes, dict]
    ):
        yield


def read_checkpoint(path: str | Path, trust_sha256: str | None = None) -> dict[str, Any]:
    """Read `model.pt` of a saved SCVI model.

    Parameters
    ----------
    path
        The file, or the folder that holds it.
    trust_sha256
        Hash of a file that may be unpickled in full, where the allow-list does not suffice.

    Raises
    ------
    DataError
        If the file is missing, no model, or holds more than the allow-list names; the message gives its hash.
    """
    path = Path(path)
    file = path / "model.pt" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: no such file; give the folder that scvi-tools saved, with model.pt in it")
    try:
        with _allow_list():
            content = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # torch, zip and pickle raise many kinds
        content = _unpickle_trusted(file, trust_sha256, error)
    missing = {"model_state_dict", "var_names", "attr_dict"} - set(content)
    if missing:
        raise DataError(f"{file}: no SCVI model of scvi-tools 0.15 or later ({', '.join(sorted(missing))} missing)")
    registry = content["attr_dict"].get("registry_")
    if not isinstance(registry, dict) or "batch" not in registry.get("field_registries", {}):
        raise DataError(
            f"{file}: saved by a scvi-tools before 0.15, whose layout is not supported; load it there with "
            "`SCVI.convert_legacy_save` and save it anew"
        )
    missing = {key for key in _WEIGHTS if key not in content["model_state_dict"]}
    if missing or "init_params_" not in content["attr_dict"]:
        what = min(missing, default="init_params_")
        raise DataError(f"{file}: not a model of the class SCVI ({what} missing); its relatives are not supported")
    return content


def _unpickle_trusted(file: Path, trust_sha256: str | None, error: Exception) -> dict[str, Any]:
    found = hash_file(file)
    if trust_sha256 != found:
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"{file}: cannot be read with the allow-list ({reason}); if you trust its source, run again with "
            f"--trust-sha256 {found}"
        ) from None
    content = torch.load(file, weights_only=False, map_location="cpu")
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds a {type(content).__name__}, no SCVI model")
    return content


class SCVIDecoder(Decoder):
    """Decoder and encoder of a trained SCVI model; expression is `px_scale`, the expected share of counts.

    `batches` are the batches it was trained on, `batch_column` the column that named them.

    Parameters
    ----------
    checkpoint
        What `read_checkpoint` gives.

    Raises
    ------
    MethodError
        If the model has covariates besides the batch, or its weights do not fit its description.
    """

    def __init__(self, checkpoint: Mapping[str, Any]) -> None:
        from scvi.module import VAE

        self.genes = tuple(map(str, checkpoint["var_names"]))
        attributes = checkpoint["attr_dict"]
        fields = attributes["registry_"]["field_registries"]
        self._refuse_covariates(fields)
        self.batch_column: str | None = fields["batch"]["state_registry"].get("original_key")
        self.batches = tuple(map(str, fields["batch"]["state_registry"]["categorical_mapping"]))
        options = {**attributes["init_params_"]["non_kwargs"]}
        for nested in attributes["init_params_"]["kwargs"].values():
            options.update(nested)
        state = {key: value for key, value in checkpoint["model_state_dict"].items() if isinstance(value, Tensor)}
        # what the weights say is true, whatever the description says
        options["n_hidden"] = int(state["decoder.px_scale_decoder.0.weight"].shape[1])
        options["n_latent"] = int(state["z_encoder.mean_encoder.weight"].shape[0])
        options["use_size_factor_key"] = bool(fields.get("size_factor", {}).get("data_registry"))
        options["use_observed_lib_size"] = True  # a learned library has no say in the share of counts
        self.module = VAE(n_input=len(self.genes), n_batch=len(self.batches), n_labels=_n_labels(fields), **options)
        problems = self.module.load_state_dict(state, strict=False)
        unfit = [*problems.missing_keys, *problems.unexpected_keys]
        if any(not key.startswith(("l_encoder", "library_log")) for key in unfit):
            raise MethodError(f"SCVI model: weights do not fit its description (such as {unfit[0]})")
        self.module.eval().requires_grad_(False)
        self.n_latent = options["n_latent"]

    @staticmethod
    def _refuse_covariates(fields: Mapping[str, Any]) -> None:
        for key in ("extra_categorical_covs", "extra_continuous_covs"):
            if fields.get(key, {}).get("summary_stats", {}).get(f"n_{key}", 0):
                raise MethodError(f"SCVI model: has {key.replace('_', ' ')}; only a batch covariate is supported")

    # --- decoding ---------------------------------------------------------------------------------------------------

    def decode(self, z: Tensor, context: Context) -> Decoded:
        """Expected share of counts; the context holds `batch` (n_cells, 1)."""
        return Decoded(self.module.decoder.px_scale_decoder(self.hidden(z, context)), z[:, :0])

    def hidden(self, z: Tensor, context: Context) -> Tensor:
        """Activations before the last linear layer."""
        if self.module.batch_representation == "embedding":
            batch = self.module.compute_embedding("batch", context["batch"])
            return self.module.decoder.px_decoder(torch.cat([z, batch], dim=-1))
        return self.module.decoder.px_decoder(z, context["batch"])

    def last_layer(self) -> LastLayer:
        """The last linear layer before softmax or softplus."""
        linear, activation = self.module.decoder.px_scale_decoder
        link = "softmax" if isinstance(activation, torch.nn.Softmax) else "softplus"
        return LastLayer(linear.weight, linear.bias, link)  # type: ignore[arg-type]

    # --- encoding ---------------------------------------------------------------------------------------------------

    def context(self, batch: Sequence[str], library: np.ndarray | None = None) -> dict[str, Tensor]:
        """Context of cells from the names of their batches.

        Raises
        ------
        DataError
            If a batch was not in training: its decoder weights do not exist.
        """
        place = {name: i for i, name in enumerate(self.batches)}
        unknown = sorted({name for name in batch if name not in place})
        if unknown:
            raise DataError(
                f"batch {unknown[0]!r} was not in the model's training ({len(unknown)} such); "
                f"{suggest(unknown[0], place)}"
            )
        found = {"batch": torch.tensor([place[name] for name in batch], dtype=torch.long)[:, None]}
        if library is not None:
            found["log_library"] = torch.log(torch.from_numpy(np.asarray(library, dtype=np.float32)))[:, None]
        return found

    @torch.no_grad()
    def encode(self, counts: sparse.csr_matrix, batch: Sequence[str]) -> Encoded:
        """Posterior of cells.

        Parameters
        ----------
        counts
            Raw counts on the model's genes, in its order, CSR (n_cells, n_genes).
        batch
            Batch of each cell.
        """
        library = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
        context = self.context(batch, library)
        mean, sd = [], []
        for start in range(0, counts.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            dense = torch.from_numpy(np.asarray(counts[rows].toarray(), dtype=np.float32))
            posterior = self.module.inference(dense, context["batch"][rows])["qz"]
            mean.append(posterior.loc)
            sd.append(posterior.scale)
        return Encoded(torch.cat(mean), torch.cat(sd), context)

    def counts_of(self, adata: AnnData, layer: str | None = None, *, min_share: float = 0.5) -> sparse.csr_matrix:
        """Counts of an AnnData on the model's genes, by name; genes it lacks are zero.

        Raises
        ------
        DataError
            If the layer or too many of the model's genes are missing, or the values are no counts.
        """
        if layer is not None and layer not in adata.layers:
            raise DataError(f"no layer {layer!r} in the data; {suggest(layer, adata.layers)}")
        matrix = sparse.csr_matrix(adata.X if layer is None else adata.layers[layer])
        return self.arrange(matrix, list(adata.var_names), min_share=min_share)

    def arrange(self, matrix: sparse.csr_matrix, genes: Sequence[str], *, min_share: float = 0.5) -> sparse.csr_matrix:
        """Counts on the model's genes, in its order; the errors are those of `counts_of`.

        Parameters
        ----------
        matrix
            Counts, CSR (n_cells, n_genes).
        genes
            Names of its columns.
        min_share
            As in `counts_of`.
        """
        index = pd.Index(genes)
        if not index.is_unique:
            twice = index[index.duplicated()][0]
            raise DataError(f"gene {twice!r} stands twice in the data; keep one, or name genes by another column")
        place = index.get_indexer(pd.Index(self.genes))
        share = float((place >= 0).mean())
        if share < min_share:
            raise DataError(
                f"only {share:.0%} of the model's genes are in the data; the model names them like {self.genes[0]!r}, "
                f"the data like {genes[0]!r}"
            )
        values = matrix.data
        if not np.isfinite(values).all():
            raise DataError("the counts hold NaN or infinite values; take these cells or genes out")
        if (values < 0).any() or (values != np.round(values)).any():
            raise DataError("the values are no counts (fractions or negative); name the layer that holds them")
        have = np.flatnonzero(place >= 0)
        selector = sparse.csr_matrix(
            (np.ones(len(have), dtype=np.float32), (place[have], have)), shape=(matrix.shape[1], len(self.genes))
        )
        return sparse.csr_matrix(matrix @ selector)


def _n_labels(fields: Mapping[str, Any]) -> int:
    return int(fields.get("labels", {}).get("summary_stats", {}).get("n_labels", 1) or 1)


def load_scvi(path: str | Path, trust_sha256: str | None = None) -> SCVIDecoder:
    """The decoder of a model folder that scvi-tools saved."""
    return SCVIDecoder(read_checkpoint(path, trust_sha256))
