"""The project's own models behind the decoder protocol."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from perturbed.decoders.base import as_latents, chunks
from perturbed.decoders.nb_vae import NBVAEDecoder
from perturbed.decoders.perturbedvae import PerturbedVAEDecoder
from perturbed.errors import ConfigError, DataError
from perturbed.gradients.cells import decoder_of
from perturbed.gradients.jacobian import gradients, gradients_of
from perturbed.models.base import FitRun, Method, TrainingData
from perturbed.models.baselines import NoChange
from perturbed.models.nb_vae import NBVAE, Head, NBVAEParams
from perturbed.models.perturbedvae import PerturbedVAE, PerturbedVAEParams

COUNTS = np.random.default_rng(0).poisson(3.0, (100, 12)).astype(np.float32) + 1
DATA = TrainingData(
    X=sparse.csr_matrix(np.log1p(COUNTS / COUNTS.sum(axis=1, keepdims=True) * 100)),
    perturbation=np.repeat(["control", "G00", "G01"], [40, 30, 30]).astype(object),
    context=np.full(100, "all"),
    is_val=np.arange(100) % 10 == 0,
    genes=tuple(f"G{i:02d}" for i in range(12)),
    centre=np.zeros(12),
    loadings=np.eye(12)[:, :3],
    counts=sparse.csr_matrix(COUNTS),
    library=COUNTS.sum(axis=1).astype(float),
    covariates=pd.DataFrame({"day": np.linspace(0, 50, 100)}),
)
LINKS = {
    "identity": lambda a: a,
    "softplus": torch.nn.functional.softplus,
    "softmax": lambda a: torch.softmax(a, dim=1),
}


@pytest.fixture(scope="module", params=["vae_nb", "vae_gaussian", "perturbedvae_gaussian", "perturbedvae_nb"])
def fitted(request):
    kind, likelihood = request.param.rsplit("_", 1)
    if kind == "vae":
        heads = {
            "treated": Head(column="perturbation", positive=("G00",)),
            "day": Head(column="day", kind="continuous"),
        }
        params = NBVAEParams(hidden=(8, 6), n_latent=3, epochs=3, batch_size=32, likelihood=likelihood, heads=heads)
        method: Method = NBVAE(params)
    else:
        params = PerturbedVAEParams(n_nu=3, n_iota=2, n_hidden=8, epochs=3, likelihood=likelihood)
        method = PerturbedVAE(params)
    method.fit(DATA, FitRun(progress=False))
    return method, decoder_of(method), request.param


def test_shapes_names_and_the_last_layer(fitted):
    method, decoder, name = fitted
    assert isinstance(decoder, NBVAEDecoder if name.startswith("vae") else PerturbedVAEDecoder)
    encoded = decoder.encode(DATA.X)
    assert encoded.mean.shape == encoded.sd.shape == (DATA.X.shape[0], decoder.n_latent)
    assert (encoded.sd > 0).all()
    with torch.no_grad():
        decoded = decoder.decode(encoded.mean, encoded.context)
        last = decoder.last_layer()
        activation = decoder.hidden(encoded.mean, {}) @ last.weight.T + last.bias
    assert decoder.genes == DATA.genes == method.genes and decoded.expression.shape == DATA.X.shape
    assert decoded.heads.shape[1] == len(decoder.heads)
    torch.testing.assert_close(LINKS[last.link](activation), decoded.expression, rtol=1e-5, atol=1e-6)
    if name == "perturbedvae_nb":
        torch.testing.assert_close(decoded.expression.sum(dim=1), torch.ones(DATA.X.shape[0]))


def test_latents_are_the_models_own(fitted):
    method, decoder, name = fitted
    z = decoder.encode(DATA.X).mean.numpy()
    if name.startswith("vae"):
        own = method.represent(DATA.X)
    else:
        unperturbed = np.full(len(z), "control")
        own = np.hstack([method.encode_response(DATA.X, unperturbed), method.encode_background(DATA.X)])
    np.testing.assert_allclose(z, own, rtol=1e-5, atol=1e-6)


def test_some_outputs_equal_their_columns_of_all_outputs(fitted):
    _, decoder, _ = fitted
    z = decoder.encode(DATA.X).mean[:7]
    columns = [3, 0, len(decoder.genes) + len(decoder.heads) - 1]
    with torch.no_grad():
        torch.testing.assert_close(decoder.outputs(z, {}, columns), decoder.outputs(z, {})[:, columns])
    names = ["G03", "G00", *decoder.heads]
    weights = torch.zeros(len(names), len(decoder.genes) + len(decoder.heads))
    weights[torch.arange(len(names)), decoder.find(names)] = 1
    torch.testing.assert_close(gradients(decoder, z, {}, names), gradients_of(decoder, z, {}, weights))


def test_times_are_decoded_in_their_own_unit(fitted):
    _, decoder, name = fitted
    if not name.startswith("vae"):
        pytest.skip("has no heads")
    assert decoder.heads == ("treated", "day")
    with torch.no_grad():
        found = decoder.decode(decoder.encode(DATA.X).mean, {}).heads[:, 1]
    assert 10 < float(found.mean()) < 40
    with pytest.raises(DataError, match="'dya' is no output of the decoder; did you mean 'day'"):
        decoder.find(["dya"])


def test_methods_without_decoder_are_refused():
    with pytest.raises(ConfigError, match="NoChange has no decoder"):
        decoder_of(NoChange())


def test_latents_and_chunks():
    assert as_latents(np.zeros((2, 3))).dtype == torch.float32
    with pytest.raises(DataError, match="cells × dimensions"):
        as_latents(np.zeros(3))
    assert [(c.start, c.stop) for c in chunks(5, 2)] == [(0, 2), (2, 4), (4, 5)]
    assert list(chunks(0, 3)) == [] and [c.stop for c in chunks(2, 0)] == [1, 2]
