"""The distribution: importing it stays light, its public names exist, and its data is in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import probe

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MODULES = sorted(path.stem for path in (ROOT / "probe").glob("[!_]*.py"))
HEAVY = {"torch", "plotly", "numpy", "xarray", "transformers", "pandas", "ipywidgets"}
IMPORT_SECONDS = 0.15


def in_new_python(code: str) -> str:
    """What a new interpreter prints that has loaded nothing yet."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_import_loads_nothing_heavy():
    loaded = set(in_new_python("import probe, sys; print(*sys.modules)").split())
    assert "probe" in loaded
    assert not loaded & HEAVY


def test_import_is_quick():
    # Processor time, because the clock also counts what else the machine does.
    code = "import time; start = time.process_time(); import probe; print(time.process_time() - start)"
    assert min(float(in_new_python(code)) for _ in range(3)) < IMPORT_SECONDS


LIGHT = ["attention_maps", "cli", "corpus", "prompts", "routing_stats", "store"]


@pytest.mark.parametrize("module", [f"probe.{name}" for name in LIGHT])
def test_module_loads_neither_torch_nor_plotly(module):
    loaded = set(in_new_python(f"import {module}, sys; print(*sys.modules)").split())
    assert not loaded & {"torch", "plotly", "transformers"}


@pytest.mark.parametrize("name", probe.__all__)
def test_public_name_resolves(name):
    assert getattr(probe, name) is getattr(probe, name)


def test_modules_are_there_by_attribute():
    names = in_new_python(f"import probe; print(*(getattr(probe, name).__name__ for name in {MODULES!r}))").split()
    assert names == [f"probe.{name}" for name in MODULES]


def test_dir_lists_what_is_public():
    assert {*probe.__all__, *MODULES} <= set(dir(probe))
    assert sorted(probe.__all__) == sorted({*probe._HOMES, "__version__"})


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'probe' has no attribute 'recrod'"):
        probe.recrod  # noqa: B018


def test_open_is_the_store_and_leaves_the_builtin_alone():
    assert probe.open is import_module("probe.store").open
    assert in_new_python("import io, probe; probe.open; print(open is io.open)").strip() == "True"


def test_constraints_pin_every_dependency_within_its_range():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    extras = [one for name, extra in PROJECT["optional-dependencies"].items() if name != "all" for one in extra]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
    assert not [name for name in versions if name.startswith("nvidia")]


def test_extra_all_brings_every_other_extra():
    extras = PROJECT["optional-dependencies"]
    named = re.fullmatch(r"llama4-probe\[(.*)\]", extras["all"][0])
    assert named and set(named[1].split(",")) == set(extras) - {"all"}


def test_makefile_names_a_wrong_python_in_one_line(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    old = tmp_path / "python2"
    old.write_text("#!/bin/sh\ncase $2 in *platform*) echo 3.9.1;; esac\n", "utf-8")
    old.chmod(0o755)
    for python, said in ((old, f"{old} is Python 3.9.1"), ("no-such-python", "there is no no-such-python")):
        made = subprocess.run(
            ["make", "--no-print-directory", "test", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert made.returncode == 2
        assert made.stdout == ""
        (line,) = made.stderr.splitlines()
        assert f"probe needs Python 3.11 or newer and {said}; choose another: make PYTHON=python3.12" in line
    assert not (tmp_path / ".venv").exists()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Names of the files in the wheel and in the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    return in_wheel, in_sdist


def test_package_data_is_in_wheel_and_sdist(distributions):
    paths = [path for path in (ROOT / "probe").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    data = {path.relative_to(ROOT).as_posix() for path in paths}
    assert {"probe/py.typed", "probe/assets/corpus/heldout.jsonl", "probe/assets/corpus/LICENSE.md"} <= data
    for names in distributions:
        assert data <= names


def test_wheel_holds_the_package_and_its_licences_and_nothing_else(distributions):
    in_wheel, in_sdist = distributions
    assert {name.split("/")[0] for name in in_wheel} == {"probe", f"llama4_probe-{probe.__version__}.dist-info"}
    licences = {name.partition(".dist-info/licenses/")[2] for name in in_wheel if ".dist-info/licenses/" in name}
    assert {"LICENSE", "probe/assets/corpus/LICENSE.md"} <= licences
    assert {"LICENSE", "README.md", "Makefile", "constraints.txt", "tests/test_packaging.py"} <= in_sdist


def test_citation_and_changelog_name_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == probe.__version__
    assert f"## {probe.__version__} " in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_second_make_installs_nothing(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    pip = tmp_path / ".venv" / "bin" / "pip"
    pip.write_text("#!/bin/sh\necho installing\n", "utf-8")
    pytest_stand_in = tmp_path / ".venv" / "bin" / "pytest"
    pytest_stand_in.write_text("#!/bin/sh\necho testing\n", "utf-8")
    for script in (pip, pytest_stand_in):
        script.chmod(0o755)

    def make_test():
        return subprocess.run(["make", "-s", "test"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert make_test() == "installing\ntesting\n"
    assert make_test() == "testing\n"
    later = (tmp_path / ".venv" / "installed").stat().st_mtime + 1
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert make_test() == "installing\ntesting\n"
