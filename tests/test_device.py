from __future__ import annotations

import json
import logging
import os

import numpy as np
import pandas as pd
import pytest
import torch

from perturbed import device
from perturbed.device import Device, choose_device, one_process, why_no_gpu
from perturbed.errors import MethodError

SLURM = {
    "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "a-run", "SLURM_NODELIST": "n[1-2]",
    "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "4", "RANK": "1",
}  # fmt: skip


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def a_gpu(monkeypatch):
    """torch lists a GPU; whether it works is up to the test."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: "a GPU")
    return lambda answer: monkeypatch.setattr(device, "why_no_gpu", lambda name: answer)


def test_the_cpu_is_taken_when_asked_for(a_gpu):
    assert choose_device("cpu") == Device("cpu", "asked for")


def test_auto_takes_a_gpu_that_works_and_says_which(a_gpu):
    a_gpu("")
    assert choose_device("auto") == Device("cuda", "found: a GPU")
    assert choose_device("cuda:1") == Device("cuda:1", "asked for: a GPU")


def test_auto_without_a_gpu_is_the_cpu_with_the_reason(no_gpu, caplog):
    name, reason = choose_device("auto")
    assert name == "cpu"
    assert reason == why_no_gpu() != ""
    assert caplog.text == ""


def test_an_invisible_gpu_is_explained(no_gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert why_no_gpu() == "torch finds no GPU (CUDA_VISIBLE_DEVICES is '')"


def test_a_gpu_that_is_listed_but_broken_is_not_used(a_gpu, monkeypatch):
    def zeros(*_, **__):
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nCompile with ...")

    monkeypatch.setattr(torch, "zeros", zeros)
    assert choose_device("auto").name == "cpu"
    assert "devices are busy" in choose_device("auto").reason
    with pytest.raises(MethodError, match=r"^device: cuda was asked for but the GPU cannot be used \(CUDA error.*cpu$"):
        choose_device("cuda")


def test_a_gpu_that_was_paid_for_and_is_not_used_is_a_warning(no_gpu, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    choose_device("auto")
    assert "the scheduler gave a GPU (SLURM_JOB_GPUS)" in caplog.text


def test_asking_for_a_gpu_where_none_is_fails_in_one_line_before_any_data_is_read(no_gpu, tmp_path):
    from typer.testing import CliRunner

    from perturbed.cli import app

    method = json.dumps({"title": "V", "implementation": "perturbed.models.perturbedvae:PerturbedVAE"})
    files = [f"--{name}={tmp_path / name}" for name in ("prepared", "split", "features", "out")]
    done = CliRunner().invoke(app, ["fit", *files, f"--method={method}", "--device=cuda"])
    assert done.exit_code == 1
    assert done.output.startswith("perturbed: device: cuda was asked for but ")
    assert done.output.count("\n") == 1


def test_a_slurm_job_without_a_gpu_says_that_it_was_given_none(no_gpu, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with pytest.raises(MethodError, match="asked for but Slurm gave this job none"):
        choose_device("cuda")
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    with pytest.raises(MethodError, match="asked for but torch"):
        choose_device("cuda")


def test_variables_of_launchers_are_hidden_and_put_back(monkeypatch):
    for key, value in {**SLURM, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(key, value)
    before = dict(os.environ)
    with pytest.raises(RuntimeError), one_process():
        assert not SLURM.keys() & os.environ.keys()
        assert (os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("1", "0")
        raise RuntimeError
    assert dict(os.environ) == before


def test_scvi_trains_alone_inside_a_slurm_job(monkeypatch, tmp_path, caplog):
    import anndata
    import scvi
    from lightning.fabric.plugins.environments import SLURMEnvironment

    for key, value in SLURM.items():
        monkeypatch.setenv(key, value)
    counts = np.random.default_rng(0).poisson(3, (40, 6)).astype(np.float32)
    adata = anndata.AnnData(counts, obs=pd.DataFrame(index=[str(i) for i in range(40)]))
    scvi.model.SCVI.setup_anndata(adata)
    how = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "logger": False}
    how |= {"default_root_dir": tmp_path, "enable_checkpointing": False}
    assert SLURMEnvironment.detect()
    model = scvi.model.SCVI(adata, n_hidden=4)
    with caplog.at_level(logging.INFO), one_process():
        assert not SLURMEnvironment.detect()
        model.train(**how)
    assert "Trainer.fit" in caplog.text
    assert "SLURM" not in caplog.text  # else Lightning requeues the job itself at the first warning of the time limit
    assert (model.trainer.world_size, model.trainer.global_rank) == (1, 0)
