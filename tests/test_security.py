"""What others wrote (archives, addresses, names) can neither leave its folder nor run, and secrets stay unwritten.

Beside these: `tests/data/test_archives.py` (names that lead out, links, bombs), `tests/data/test_fetch.py` (addresses),
`tests/workflow/test_hostile_names.py` (names from data through the real rules).
"""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from file_server import serve_files
from hostile_world import PERTURBED, harm_done
from perturbed.config import parse
from perturbed.data import download as transfer
from perturbed.data.archives import FREE_BYTES, extract_member
from perturbed.data.cards import Card, RemoteFile
from perturbed.data.census.spec import CensusCard
from perturbed.data.download import Refused, check_address, download
from perturbed.data.fetch import fetch_file
from perturbed.errors import ConfigError, DataError, PerturbedError
from perturbed.models.spec import MethodSpec
from perturbed.pathways.judge_providers import JudgeError, OpenAIProvider, hider, read_key
from perturbed.pathways.judge_spec import JudgeSpec
from perturbed.plan import Plan

ROOT = Path(__file__).parents[1]
CONTENT = np.random.default_rng(5).bytes(100_000)


# --- archives -----------------------------------------------------------------------------------------------------


def tar_with(path: Path, mode: str, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, mode) as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.devmajor, info.devminor = 1, 5  # /dev/zero
    return info


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_only_regular_files_come_out_of_a_tar(kind: bytes, tmp_path: Path) -> None:
    archive = tar_with(tmp_path / "x.tar", "w", special("cells", kind, "/etc/passwd"))
    with pytest.raises(DataError, match="no regular file"):
        extract_member(archive, "cells", tmp_path / "out" / "cells")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_only_regular_files_come_out_of_a_zip(kind: int, tmp_path: Path) -> None:
    info = zipfile.ZipInfo("cells")
    info.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="no regular file"):
        extract_member(tmp_path / "x.zip", "cells", tmp_path / "out" / "cells")


def test_other_members_of_an_archive_are_never_written(tmp_path: Path) -> None:
    """A link and a file through it, and names that lead out, beside the one that is wanted."""
    folder = tmp_path / "inner" / "data"
    folder.mkdir(parents=True)
    members = [special("out", tarfile.SYMTYPE, ".."), tarfile.TarInfo("out/harm"), tarfile.TarInfo("../harm")]
    wanted = tarfile.TarInfo("cells")
    wanted.size = 10
    archive = tar_with(folder / "x.tar", "w", *members, tarfile.TarInfo(f"{tmp_path}/harm"), wanted)
    assert extract_member(archive, "cells", folder / "cells").read_bytes() == bytes(10)
    assert sorted(path.name for path in folder.iterdir()) == ["cells", "x.tar"]
    assert harm_done(tmp_path) == []


def test_a_card_names_no_file_outside_of_the_downloads(tmp_path: Path) -> None:
    for name in ("../harm", "/tmp/harm", "a/b", ".hidden", "-rf", "a b", "$(touch harm)", ""):
        with pytest.raises(ValueError, match="pattern"):
            RemoteFile(name=name, urls=("https://example.invalid/f",), sha256="0" * 64)


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
def test_holes_in_a_sparse_tar_count_as_unpacked(tmp_path: Path) -> None:
    with open(tmp_path / "cells", "wb") as sparse:
        sparse.truncate(FREE_BYTES + 2**22)
    subprocess.run(["tar", "-S", "-cf", "x.tar", "cells"], cwd=tmp_path, check=True)
    assert (tmp_path / "x.tar").stat().st_size < 50_000
    with pytest.raises(DataError, match="bomb"):
        extract_member(tmp_path / "x.tar", "cells", tmp_path / "out" / "cells")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_zip_that_lies_about_its_size_is_stopped(tmp_path: Path) -> None:
    """The size in the directory of the archive is not believed: what comes out is counted."""
    path = tmp_path / "x.zip"
    size = FREE_BYTES + 2**22
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cells", bytes(size))
    lying = path.read_bytes().replace(size.to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    path.write_bytes(lying)
    with pytest.raises(DataError, match=r"bomb|broken archive"):
        extract_member(path, "cells", tmp_path / "out" / "cells")
    assert list((tmp_path / "out").iterdir()) == []


# A changed byte of a tar.gz shows in its hash alone: the sum at its end is not read on the way to a member.
DAMAGES = [("gz", "cut"), ("bz2", "cut"), ("bz2", "changed"), ("xz", "cut"), ("xz", "changed")]


@pytest.mark.parametrize(("packing", "harm"), DAMAGES)
def test_a_damaged_packed_tar_is_one_line(packing: str, harm: str, tmp_path: Path) -> None:
    info = tarfile.TarInfo("cells")
    info.size = len(CONTENT)
    path = tmp_path / f"x.tar.{packing}"
    with tarfile.open(path, f"w:{packing}") as archive:  # type: ignore[call-overload]
        archive.addfile(info, io.BytesIO(CONTENT))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    path.write_bytes(data[:middle] if harm == "cut" else data[:middle] + bytes(64) + data[middle + 64 :])
    with pytest.raises(DataError) as error:
        extract_member(path, "cells", tmp_path / "out" / "cells")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


# --- addresses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["http://example.com/f", "ftp://example.com/f", "file:///etc/passwd", "HTTP://example.com", "//example.com/f", "",
     "gopher://example.com", "data:text/plain,x", "http://localhost.example.com/f", "/etc/passwd"],
)  # fmt: skip
def test_only_https_is_asked(url: str) -> None:
    with pytest.raises(Refused, match="only https"):
        check_address(url, False)
    check_address("https://example.com/f", False)


@pytest.mark.parametrize(
    "url", ["http://localhost.example.com/f", "http://127.0.0.1.example.com/f", "http://0.0.0.0/f"]
)
def test_only_this_machine_is_this_machine(url: str) -> None:
    with pytest.raises(Refused, match="only https"):
        check_address(url, True)


@pytest.mark.parametrize("target", ["http://example.com/f", "file:///etc/passwd", "ftp://example.com/f"])
def test_https_does_not_lead_to_less(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect is checked as the first address is, before it is asked."""
    import requests

    asked = []

    def get(url: str, **_: object) -> SimpleNamespace:
        asked.append(url)
        return SimpleNamespace(is_redirect=True, headers={"Location": target}, close=lambda: None)

    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(Refused, match="only https"):
        download("https://example.com/f", tmp_path / "f.part", progress=False)
    assert asked == ["https://example.com/f"]
    assert list(tmp_path.iterdir()) == []


def test_a_redirect_to_a_file_of_this_machine_is_refused_in_tests_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PAUSE", 0.0)
    (tmp_path / "secret").write_text("secret")
    with serve_files() as server:
        server.redirects["f"] = (tmp_path / "secret").as_uri()
        file = RemoteFile(name="f", urls=(server.url("f"),), sha256="0" * 64)
        with pytest.raises(PerturbedError, match="no source gave the file"):
            fetch_file(file, tmp_path / "data", allow_insecure=True, progress=False)
    assert not (tmp_path / "data/f").exists()


@pytest.mark.parametrize("host", ["example.com", "localhost.example.com", "0.0.0.0", "10.0.0.7:8000", "node12"])
def test_a_key_travels_over_https_or_stays_on_this_machine(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"provider": "openai", "model": "m"}
    for address in (f"http://{host}/v1", f"ftp://{host}/v1", f"file:///{host}"):
        with pytest.raises(ConfigError, match=r"only https|whole address"):
            parse(JudgeSpec, {**spec, "base_url": address}, "judge")
    for address in (f"https://{host}/v1", "http://localhost:8000/v1", "http://127.0.0.1/v1", "http://[::1]:8000/v1"):
        assert parse(JudgeSpec, {**spec, "base_url": address}, "judge").base_url == address
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://{host}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    with pytest.raises(JudgeError, match=r"only https.*OPENAI_BASE_URL"):
        OpenAIProvider(JudgeSpec(provider="openai", model="m"))


@pytest.mark.parametrize(
    "uri",
    ["http://example.com/soma", "tiledb://me/x", "ftp://h/x", "file:///data", "https://me:pw@h/x", "s3://b/x?sig=1"],
)
def test_a_census_store_is_a_folder_or_comes_over_https_or_s3(uri: str) -> None:
    cells = {"kind": "query", "organism": "mus_musculus", "census_version": "2023-12-15"}
    with pytest.raises(ConfigError, match=r"only https|without user, password"):
        parse(CensusCard, {"cells": {**cells, "uri": uri}}, "card.yaml")
    for fine in ("/data/soma", "soma", "s3://bucket/soma/", "https://example.com/soma"):
        parse(CensusCard, {"cells": {**cells, "uri": fine}}, "card.yaml")


# --- names that reach a shell -------------------------------------------------------------------------------------


def in_a_shell(options: str, folder: Path) -> list[str]:
    """The words that a shell makes of a piece of a command."""
    script = f"{sys.executable} -c 'import sys, json; print(json.dumps(sys.argv[1:]))' {options}"
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    import json

    return list(json.loads(done.stdout))


def base_config(**changes: object) -> dict[str, object]:
    statistics = {"primary_method": "mean_effect", "primary_baseline": "no_change", "baselines": ["no_change"]}
    found = {"dataset": ["tiny"], "cards": [str(ROOT / "tests/configs/cards")], "methods": ["no_change", "mean_effect"]}
    return {**found, "method_files": [str(ROOT / "config/methods")], "statistics": statistics, **changes}


@pytest.mark.parametrize("group", [name for name in PERTURBED if "\n" not in name])
def test_groups_of_gradient_cases_are_words_and_not_commands(group: str, tmp_path: Path) -> None:
    heads = {"perturbed": {"column": "perturbation", "positive": ["G00"]}}
    case = {
        "dataset": "tiny", "split": "zero_shot", "method": "headed", "unperturbed": {"values": ["control"]},
        "moves": [{"targets": ["perturbed"]}], "perturbed": {"values": ["G00"]}, "groups": "batch",
        "masked_groups": True, "judged": [group, "other group"], "seeds": 1,
    }  # fmt: skip
    variants = {"headed": {"method": "nb_vae", "params": {"heads": heads}}}
    plan = Plan(base_config(gradients={"flow": case}, variants=variants))
    parts = plan.gradients.judged("flow")
    for part, judged in parts.items():
        assert part.replace("_", "").isalnum(), "a folder's name"
        options = plan.gradients.options(SimpleNamespace(case="flow", part=part), SimpleNamespace())
        assert in_a_shell(options, tmp_path) == ["--judged", judged]
    assert harm_done(tmp_path) == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [*PERTURBED, "a.b", "", "."])
@pytest.mark.parametrize(
    "place",
    [
        lambda name: {"dataset": [name]},
        lambda name: {"methods": [name, "no_change", "mean_effect"]},
        lambda name: {"splits": {name: {"kind": "unseen_combo"}}},
        lambda name: {"variants": {name: {"method": "additive"}}},
        lambda name: {"studies": {name: {"kind": "comparison", "title": "t", "splits": ["zero_shot"],
                                         "methods": ["no_change"], "metrics": ["rmse"]}}},
    ],
    ids=["dataset", "methods", "splits", "variants", "studies"],
)  # fmt: skip
def test_names_of_a_config_become_no_paths_or_commands(
    place: Callable[[str], dict[str, object]], name: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="is no usable name") as error:
        Plan(base_config(**place(name)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*PERTURBED, "a b", ".", "a\n"])
def test_a_methods_environment_is_a_word(name: str) -> None:
    with pytest.raises(ConfigError, match="environment"):
        parse(MethodSpec, {"title": "t", "implementation": "m:C", "environment": name}, "m.yaml")


def test_methods_of_studies_and_cases_are_words_too(tmp_path: Path) -> None:
    shutil.copy(ROOT / "config/methods/additive.yaml", tmp_path / "a;touch harm.yaml")
    study = {"kind": "comparison", "title": "t", "splits": ["zero_shot"], "metrics": ["rmse"]}
    files = [str(tmp_path), str(ROOT / "config/methods")]
    with pytest.raises(ConfigError, match="is no usable name"):
        Plan(base_config(method_files=files, studies={"s": {**study, "methods": ["a;touch harm"]}}))


UNQUOTED = {
    "made by a rule: `results` or `data` (`test_folders_of_a_config_are_words`), plain names and words of ours": """
        input.cells input.config input.enrichment input.features input.figures input.flows input.leakage input.model
        input.parts input.prediction input.prepared input.raw input.scores input.split input.table input.tables
        input.truth output.cells output.config output.details output.enrichment output.features output.gene_sets
        output.history output.html output.judgement output.leakage output.model output.prediction output.prepared
        output.raw output.scores output.sets output.split output.store output.table output.tables output.truth
        params.cache params.checkpoint params.stem log""",
    "plain names: `perturbed.config.check_plain`, or a number": """
        wildcards.census wildcards.dataset wildcards.decoder wildcards.environment wildcards.fold wildcards.library
        wildcards.method wildcards.seed wildcards.split""",
    "options of a command, in which the plan has quoted what is not made by a rule": """
        params.details params.files params.gene_sets params.history params.libraries params.models params.noise_free
        params.options params.planted params.probe params.program params.published params.store params.truth""",
    "a number, or one of a few words that a `Literal` or the rule itself lists": """
        params.device params.figure params.kind params.memory_gb params.top params.verb threads""",
}
"""What may stand in a command without `:q`, and why. Look at where it comes from before you add to it."""


def placeholders() -> dict[str, str]:
    """What is filled into the commands of all rules, and the file of each."""
    found = {}
    for path in [ROOT / "Snakefile", *(ROOT / "workflow/rules").glob("*.smk")]:
        for shell in re.findall(r"^ *shell:\n((?: *[\"#].*\n)+)", path.read_text(), flags=re.MULTILINE):
            found.update(dict.fromkeys(re.findall(r"(?<!\{)\{([^{}]+)\}(?!\})", shell), path.name))
    return found


def test_all_that_reaches_a_shell_is_quoted_or_known_to_be_plain() -> None:
    found = placeholders()
    known = {name for names in UNQUOTED.values() for name in names.split()}
    bare = {name for name in found if not name.endswith(":q")}
    assert len(found) > 60, "the commands are not found any more"
    assert {name: found[name] for name in bare - known} == {}, "quote it with :q, or say in UNQUOTED why it is plain"
    assert known - bare == set(), "no command holds these any more"


def test_no_rule_has_a_command_beside_its_shell() -> None:
    """Code in rules would start processes past the test above."""
    for path in (ROOT / "workflow/rules").glob("*.smk"):
        code = path.read_text()
        assert not re.search(r"^\s*(run|script|notebook|wrapper):", code, flags=re.MULTILINE), path.name
        assert len(re.findall(r"^\s*shell:$", code, flags=re.MULTILINE)) == code.count("shell:"), path.name


# --- secrets ------------------------------------------------------------------------------------------------------


def test_no_variable_of_the_environment_reaches_a_record(tmp_path: Path) -> None:
    """A stage run by hand, with a secret around: neither its output, its record nor what it says holds it."""
    secret = "sk-never-to-be-seen-4712"
    card = (ROOT / "tests/configs/cards/tiny.yaml").read_text()
    call = [sys.executable, "-m", "perturbed.cli", "simulate", "--dataset", "tiny", "--card", card]
    call += ["--out", "raw.h5ad", "--truth", "truth.h5ad"]
    env = {**os.environ, "OPENAI_API_KEY": secret, "PERTURBED_TEST_SECRET": secret}
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "raw.h5ad.provenance.json").is_file()
    said = [done.stdout, done.stderr, *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())]
    assert not [text for text in said if secret.encode() in text]


@pytest.mark.parametrize("key", ["results", "data"])
@pytest.mark.parametrize("path", ["a b", "$(touch harm)", "a;touch harm", "-rf", "a'b", "a\nb", "~/x", ""])
def test_folders_of_a_config_are_words(key: str, path: str) -> None:
    with pytest.raises(ConfigError, match=rf"config: {key}: .*holds what a shell acts on") as error:
        Plan(base_config(**{key: path}))
    assert "\n" not in str(error.value)


def test_side_files_are_words(tmp_path: Path) -> None:
    card = (ROOT / "tests/configs/cards/tiny.yaml").read_text() + 'files: {gene_sets: "a b; $(touch harm).gmt"}\n'
    (tmp_path / "odd.yaml").write_text(card)
    plan = Plan(base_config(dataset=["odd"], cards=[str(tmp_path)], methods=["no_change", "mean_effect", "sena"]))
    options = plan.side.options(SimpleNamespace(dataset="odd", method="sena"))
    assert in_a_shell(options, tmp_path) == ["--file", "gene_sets=a b; $(touch harm).gmt"]
    assert harm_done(tmp_path) == []


def test_a_key_too_short_to_be_hidden_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "abcdefg")
    with pytest.raises(JudgeError, match=r"JUDGE_KEY holds is no key.*key_env: null") as error:
        read_key("JUDGE_KEY")
    assert "abcdefg" not in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setenv("JUDGE_KEY", "abcdefgh")
    assert hider(read_key("JUDGE_KEY"))("a key: abcdefgh") == "a key: ***"


def test_an_address_with_a_password_is_refused_without_telling_it() -> None:
    card = {"kind": "url", "files": [{"name": "f", "urls": "https://me:hunter2@example.com/f", "sha256": "0" * 64}]}
    with pytest.raises(ConfigError, match="names a user or password") as error:
        parse(Card, {"source": card}, "card.yaml")
    assert "hunter2" not in str(error.value)


def test_names_of_axis_cases_become_no_paths_or_commands() -> None:
    arms = {arm: {"column": "disease", "values": [arm]} for arm in ("unperturbed", "perturbed")}
    case = {"cells": "islets_simulated_demo", "model": "islets_simulated_demo", **arms}
    folders = {key: [str(ROOT / f"config/{name}")] for key, name in
               (("census_cards", "census"), ("model_cards", "models"), ("gene_set_cards", "gene_sets"))}  # fmt: skip
    for odd in (
        {"cells": "../x"}, {"model": "a;b"}, {"model_cells": "a b;x"}, {"gene_sets": ["$(x)"]},
        {"flows": [{"gene": "../x"}]},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=r"is no usable name|cannot name a file"):
            Plan(base_config(axes={"a": {**case, **odd}}, **folders))
