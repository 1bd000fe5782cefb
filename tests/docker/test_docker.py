"""Container files, as far as they can be looked at without Docker."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.programs import CHECKOUT, script
from uoe_parallel.config.load import load_config
from uoe_parallel.doctor.program import parse_arguments as parse_doctor_arguments
from uoe_parallel.parallel.layout import layout_faults
from uoe_parallel.pretrain import parse_arguments

DOCKERFILES = sorted((CHECKOUT / "docker").glob("Dockerfile.*"))
COMPOSE = CHECKOUT / "docker" / "compose.yaml"
IMAGES_FOLDER = "/opt/uoe"

every_file = pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)


def _instructions(file: Path) -> list[tuple[str, str]]:
    """(name, arguments) of each, of all stages."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line]


def _final_stage(file: Path) -> dict[str, str]:
    """The last of each instruction there."""
    stage: dict[str, str] = {}
    for name, arguments in _instructions(file):
        stage = {} if name == "FROM" else {**stage, name: arguments}
    return stage


def _copied(file: Path) -> list[str]:
    """What a file takes from the checkout."""
    copies = [arguments.split() for name, arguments in _instructions(file) if name == "COPY"]
    return [source for words in copies if words[0][:2] != "--" for source in words[:-1]]


def _is_sent(source: str) -> bool:
    """Whether .dockerignore lets Docker see it: the last rule that fits decides."""
    sent = True
    for rule in (CHECKOUT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#") and fnmatch(source, rule.removeprefix("!")):
            sent = rule.startswith("!")
    return sent


def test_there_are_both_images() -> None:
    assert [file.name for file in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


@every_file
def test_the_linter_has_nothing_to_say(file: Path) -> None:
    linted = subprocess.run(
        [script("hadolint"), "--failure-threshold", "style", file],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (linted.returncode, linted.stdout) == (0, "")


@every_file
def test_files_that_are_copied_exist_and_are_sent(file: Path) -> None:
    copied = _copied(file)
    assert {"uoe_parallel", "configs", "launch", "requirements.txt"} <= set(copied)
    for source in copied:
        assert (CHECKOUT / source).exists(), source
        assert _is_sent(source), source
    assert (
        not _is_sent("runs") and not _is_sent(".git") and not _is_sent("uoe_parallel/__pycache__")
    )


@every_file
def test_bases_are_pinned_and_stages_are_two(file: Path) -> None:
    bases = [arguments.split()[0] for name, arguments in _instructions(file) if name == "FROM"]
    assert len(bases) == 2
    for base in bases:
        assert re.fullmatch(r"[\w/]+:[\w.-]+@sha256:[0-9a-f]{64}", base), base


@every_file
def test_an_image_starts_as_nobody_special_with_the_doctor(file: Path) -> None:
    final = _final_stage(file)
    assert int(final["USER"]) > 0
    assert final["WORKDIR"] == IMAGES_FOLDER
    command = yaml.safe_load(final["CMD"])
    assert command[:3] == ["python", "-m", "uoe_parallel.doctor"]
    parse_doctor_arguments(command[3:])


@every_file
def test_what_is_installed_is_pinned(file: Path) -> None:
    """By requirements.txt, and Apex by its revision: the index has another project of that name."""
    text = " && ".join(arguments for name, arguments in _instructions(file) if name == "RUN")
    for installed in re.findall(r"pip install ([^&;]+)", text):
        assert re.search(r"requirements?\b|--no-deps", installed), installed
        assert not re.search(r"(^|\s)apex\b", installed)
    if file.name == "Dockerfile.cuda":
        assert re.search(r"ARG APEX_REVISION=[0-9a-f]{40}\n", file.read_text())
        assert "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install" in text


def _services() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())["services"]


def test_compose_s_nodes_train_together() -> None:
    nodes = {name: one for name, one in _services().items() if name.startswith("node")}
    assert len(nodes) == 2
    corpus = _services()["corpus"]["command"][-1]
    script_text = (CHECKOUT / "launch" / "torchrun.sh").read_text()
    for name, node in nodes.items():
        assert node["hostname"] == name
        variables = node["environment"]
        assert all(f"# {variable} " in script_text for variable in variables)
        assert variables["PET_NNODES"] == "2" and variables["PET_NPROC_PER_NODE"] == "1"
        assert variables["PET_RDZV_ENDPOINT"].partition(":")[0] in nodes
        assert node["command"][:2] == ["bash", "launch/torchrun.sh"]
        parsed = parse_arguments(node["command"][2:])
        checks = [partial(layout_faults, world_size=2)]
        config = load_config(CHECKOUT / parsed.config, parsed.overrides, checks)
        assert config.data.train == f"{corpus}/train"
        for path in (config.run_dir, corpus):
            assert f"{IMAGES_FOLDER}/{path}".startswith(_shared_folder(node))


def _shared_folder(node: dict[str, Any]) -> str:
    [(volume, folder)] = [mount.split(":") for mount in node["volumes"]]
    assert volume == "runs"
    return folder


def test_compose_names_what_is_there() -> None:
    compose, services = yaml.safe_load(COMPOSE.read_text()), _services()
    for service in services.values():
        assert set(service.get("depends_on", {})) <= services.keys()
        assert set(service.get("networks", [])) <= compose["networks"].keys()
        assert {mount.split(":")[0] for mount in service["volumes"]} <= compose["volumes"].keys()
    build = services["corpus"]["build"]
    context = (COMPOSE.parent / build["context"]).resolve()
    assert context == CHECKOUT and (context / build["dockerfile"]).exists()
    assert set(build["args"]) <= {"TORCH_INDEX"}
    assert (CHECKOUT / services["corpus"]["command"][1]).exists()
