"""Locks, conda environments and container recipes agree with pyproject.toml and with each other."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from perturbed.models.spec import load_method_spec

ROOT = Path(__file__).parents[1]
ENVS = ROOT / "envs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.11", "3.12", "3.13")
LOCKS = sorted(path.stem for path in ENVS.glob("*.lock"))


def load_conda(folder: Path) -> ModuleType:
    """The script `conda.py` of a folder as a module."""
    spec = importlib.util.spec_from_file_location("conda_script", folder / "conda.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(lock: str, python: str) -> dict[str, str]:
    """Versions that a lock pins on Linux with this Python, by package."""
    machine = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    machine |= {"platform_machine": "x86_64", "platform_system": "Linux", "extra": ""}
    found: dict[str, str] = {}
    for line in (ENVS / f"{lock}.lock").read_text().splitlines():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(machine):
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"{lock}.lock: {line} is no pin"
            assert found.setdefault(canonicalize_name(requirement.name), specifier.version) == specifier.version
    return found


def unmet(requirements: list[str], pinned: dict[str, str], python: str) -> list[str]:
    """Requirements that a lock does not meet."""
    wanted = [Requirement(text) for text in requirements]
    machine = {"python_version": python, "python_full_version": f"{python}.9"}
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate(machine)]
    return [
        str(one)
        for one in wanted
        if not one.specifier.contains(pinned.get(canonicalize_name(one.name), "0.0.0.dev0"), prereleases=True)
        or canonicalize_name(one.name) not in pinned
    ]


def listed(name: str) -> list[str]:
    """Requirements of `NAME.in`."""
    lines = (ENVS / f"{name}.in").read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


# --- locks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("python", PYTHONS)
def test_the_locks_meet_pyproject(python: str) -> None:
    dependencies = PROJECT["project"]["dependencies"]
    assert unmet(dependencies, pins("core", python), python) == []
    assert unmet([*dependencies, *PROJECT["dependency-groups"]["dev"]], pins("dev", python), python) == []
    for name in set(LOCKS) - {"core", "dev"}:
        assert unmet(listed(name), pins(name, python), python) == [], name


def test_a_lock_that_does_not_meet_them_is_noticed() -> None:
    """Else the test above would show nothing."""
    assert unmet(["pandas>=99", "numpy>=2", "nothing-of-this-name"], pins("core", "3.11"), "3.11") == [
        "pandas>=99",
        "nothing-of-this-name",
    ]


@pytest.mark.parametrize("python", PYTHONS)
def test_the_locks_agree_where_they_name_the_same_package(python: str) -> None:
    """Files go to and fro between the environments, and the tests judge what users install."""
    core = pins("core", python)
    for name in set(LOCKS) - {"core"}:
        other = pins(name, python)
        assert {package: (core[package], other[package]) for package in core.keys() & other.keys()} == {
            package: (core[package], core[package]) for package in core.keys() & other.keys()
        }, name
    assert core.keys() <= pins("dev", python).keys()


def test_every_lock_can_be_made_anew() -> None:
    script = (ENVS / "lock.sh").read_text()
    assert [name for name in LOCKS if f"envs/{name}.lock" not in script] == []


def test_every_environment_that_a_method_names_has_a_lock() -> None:
    methods = ROOT / "config/methods"
    named = {load_method_spec(path.stem, [methods]).environment for path in methods.glob("*.yaml")} - {""}
    assert "gears" in named
    assert named <= set(LOCKS)


# --- conda --------------------------------------------------------------------------------------------------------


def test_the_conda_environments_are_those_of_the_locks() -> None:
    assert load_conda(ENVS).main(["--check"]) == 0, "run envs/conda.py"
    for name in set(LOCKS) - {"dev"}:
        environment = yaml.safe_load((ENVS / f"{name}.yaml").read_text())
        *packages, pip = environment["dependencies"]
        assert pip["pip"] == (ENVS / f"{name}.lock").read_text().splitlines()
        (python,) = [text.partition("=")[2] for text in packages if text.startswith("python=")]
        assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(python)
        # Snakemake copies the file elsewhere before conda reads it.
        assert not [line for line in pip["pip"] if line.startswith(("-r", "-e", "."))]


def test_drift_is_noticed_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ENVS, tmp_path / "envs")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    script = load_conda(tmp_path / "envs")
    with open(tmp_path / "envs/core.lock", "a") as lock:
        lock.write("new-package==1.0\n")
    assert script.main(["--check"]) == 1
    assert "envs/core.yaml differs from envs/core.lock; run envs/conda.py" in capsys.readouterr().err
    assert script.main([]) == 0
    assert script.main(["--check"]) == 0
    assert "- new-package==1.0\n" in (tmp_path / "envs/core.yaml").read_text()
    (tmp_path / "pyproject.toml").write_text('[project]\nrequires-python = ">=3.12,<3.14"\n')
    with pytest.raises(SystemExit, match=r"requires-python .* leaves Python 3\.11 out"):
        script.main(["--check"])


def test_the_environment_of_every_rule_exists() -> None:
    found = 0
    for path in sorted(ROOT.glob("workflow/rules/*.smk")):
        for named in re.findall(r"conda:\s*\n\s*\"([^\"]+)\"", path.read_text()):
            assert (path.parent / named).resolve().is_file(), f"{path.name}: {named}"
            assert (path.parent / named).with_suffix(".post-deploy.sh").resolve().is_file(), f"{path.name}: {named}"
            found += 1
    rules = sum(len(re.findall(r"\bshell:", path.read_text())) for path in ROOT.glob("workflow/rules/*.smk"))
    assert found == rules, "a rule that runs a command names no environment"


def test_the_package_is_installed_from_the_checkout_alone(tmp_path: Path) -> None:
    script = str(ENVS / "core.post-deploy.sh")
    done = subprocess.run(["bash", script], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"perturbed: {tmp_path} is no checkout of perturbed")


@pytest.mark.parametrize("script", sorted(ENVS.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0


# --- containers ---------------------------------------------------------------------------------------------------


def instructions(recipe: Path) -> list[list[str]]:
    """Instructions of a Dockerfile as words, continued lines joined."""
    text = re.sub(r"\\\n", " ", recipe.read_text())
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip() and line[0] != "#"]


def within(path: str, copied: list[str]) -> bool:
    return any(path == one or path.startswith(f"{one.rstrip('/')}/") for one in copied)


def test_the_container_recipe_copies_what_exists_and_installs_the_lock() -> None:
    lines = instructions(ENVS / "Dockerfile")
    copies = [words[1:] for words in lines if words[0] == "COPY"]
    sources = [source for *of_one, _ in copies for source in of_one]
    for source in sources:
        assert (ROOT / source).exists(), f"COPY {source}"
    runs = [index for index, words in enumerate(lines) if words[:3] == ["RUN", "envs/install.sh", "core"]]
    assert len(runs) == 1
    before = [source for words in lines[: runs[0]] if words[0] == "COPY" for source in words[1:-1]]
    built_from = {PROJECT["project"]["readme"], "pyproject.toml", "envs/core.lock", "envs/install.sh", "src"}
    assert built_from <= set(before), "the install needs files that are not copied yet"
    for needed in ("Snakefile", "workflow/rules/common.smk", "config/config.yaml", "profiles/local/config.yaml"):
        assert within(needed, sources), needed
    assert not [words for words in lines if words[0] == "RUN" and "pip" in words], "packages come from the lock alone"


def test_the_build_sees_only_what_is_copied() -> None:
    ignored = (ENVS / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copies = [words[1:-1] for words in instructions(ENVS / "Dockerfile") if words[0] == "COPY"]
    wanted = {source.partition("/")[0] for of_one in copies for source in of_one}
    assert "*" in ignored
    assert kept == wanted


def test_the_recipe_for_clusters_copies_what_exists_and_installs_the_lock() -> None:
    text = (ENVS / "apptainer.def").read_text()
    files = re.search(r"^%files\n((?:    .*\n)+)", text, flags=re.MULTILINE)
    post = re.search(r"^%post\n((?:    .*\n)+)", text, flags=re.MULTILINE)
    assert files is not None and post is not None
    pairs = [line.split() for line in files[1].splitlines()]
    for source, target in pairs:
        assert (ROOT / source).exists(), source
        assert target == f"/opt/perturbed/{source}"
    needed = {PROJECT["project"]["readme"], "pyproject.toml", "envs/core.lock", "envs/install.sh", "src"}
    assert needed <= {source for source, _ in pairs}
    assert "/opt/perturbed/envs/install.sh core\n" in post[1]


def test_the_recipes_run_the_python_of_the_locks() -> None:
    for recipe in ("Dockerfile", "apptainer.def"):
        (version,) = re.findall(r"^(?:FROM|From:) python:(\d+\.\d+)-", (ENVS / recipe).read_text(), flags=re.MULTILINE)
        assert version == load_conda(ENVS).PYTHON
        assert f"PYTHON=/usr/local/bin/python{version}" in (ENVS / recipe).read_text()
