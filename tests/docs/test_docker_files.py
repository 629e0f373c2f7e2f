"""The pins, promises and scripts of docker/ as far as they can be checked without an engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
SERVICES: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
SCRIPTS = ["docker/start-engine", "docker/milvus-wheel/ready", ".ci/run"]


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, **options)  # noqa: S603


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_limited_and_on_loopback(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    assert bool(service.get("ports")) != (service.get("profiles") == ["ray"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service["volumes"]
    assert {"mem_limit", "cpus", "pids_limit", "stop_grace_period"} <= service.keys()
    assert "no-new-privileges:true" in service["security_opt"]


@pytest.mark.parametrize("name", ["milvus", "qdrant"])
def test_a_health_check_asks_for_readiness(name: str) -> None:
    check = " ".join(SERVICES[name]["healthcheck"]["test"])
    assert re.search("collections/list|readyz", check)
    assert "healthz" not in check


def test_only_the_databases_are_started_when_none_is_named() -> None:
    assert [name for name in SERVICES if not SERVICES[name].get("profiles")] == ["milvus", "qdrant"]


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_what_the_monitoring_mounts_is_there(name: str) -> None:
    service = SERVICES[name]
    assert service["profiles"] == ["monitoring"]
    assert re.search("/-/ready|/api/health", " ".join(service["healthcheck"]["test"]))
    sources = [volume.split(":")[0] for volume in service["volumes"]]
    mounted = [source for source in sources if source.startswith("./")]
    assert mounted
    assert all((DOCKER / source).exists() for source in mounted)


@pytest.mark.parametrize("name", ["ray-head", "ray-worker"])
def test_nodes_of_a_cluster_share_a_token_and_their_files(name: str) -> None:
    service = SERVICES[name]
    assert service["environment"]["RAY_AUTH_MODE"] == "token"
    assert service["volumes"] == ["ray:/work"]  # the home of the image's user: its token is there
    trainer = (DOCKER / "trainer" / "Dockerfile").read_text()
    assert "--home-dir /work" in trainer
    assert "ARG EXTRAS=" in trainer
    assert "scale" in service["build"]["args"]["EXTRAS"].split(",")
    assert service["image"] == f"amips-ray:{version('amips-plugins')}"
    (command,) = service["command"]
    assert "exec ray start" in command
    assert ("get-auth-token --generate > /dev/null &&" in command) == (name == "ray-head")


def test_the_wheels_version_is_the_same_everywhere() -> None:
    script = (DOCKER / "start-engine").read_text()
    version = re.search(r"VERSION=(\S+)", script)
    assert version is not None
    for path in ("pyproject.toml", "docker/milvus-wheel/Dockerfile", "docker/compose.yaml"):
        found = re.findall(r"(?:milvus==|amips-milvus:)([\d.]+\d)", (ROOT / path).read_text())
        assert set(found) == {version[1]}, path


@pytest.mark.parametrize("image", ["milvus-wheel", "trainer"])
def test_an_image_does_not_run_as_root(image: str) -> None:
    lines = (DOCKER / image / "Dockerfile").read_text().splitlines()
    last_stage = lines[max(n for n, line in enumerate(lines) if line.startswith("FROM ")) :]
    users = [line.split()[1] for line in last_stage if line.startswith("USER ")]
    assert users
    assert users[-1] != "root"


def test_the_build_context_has_what_the_package_is_built_from() -> None:
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    assert {"pyproject.toml", "README.md", "LICENSE", "amips_plugins", "adapters", "export"} <= kept
    assert all((ROOT / name).exists() for name in kept)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_can_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert run("bash", "-n", ROOT / script).returncode == 0


def test_without_an_engine_the_script_says_why(tmp_path: Path) -> None:
    # Nothing of Docker and nothing to install it with is on this PATH.
    for tool in ("bash", "dirname", "mktemp", "rm", "id", "timeout"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = run(tmp_path / "bash", DOCKER / "start-engine", env={"PATH": str(tmp_path)})
    assert done.returncode == 1
    assert "containers cannot be used: no Docker engine answers" in done.stderr


def test_the_wheels_settings_are_filled_in() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from unpack import PLACEHOLDER, _setting\n"
        "print(PLACEHOLDER.sub(_setting, sys.stdin.read()))"
    )
    template = "port: {{ proxy_port(int): 19530 }}\ndir: {{ etcd_data_dir }}\nca:  {{ ca: ca.pem }}"
    done = run(sys.executable, "-B", "-c", program, DOCKER / "milvus-wheel", input=template)
    expected = "port: 19530\ndir: /var/lib/milvus/etcd\nca:  ca.pem"
    assert done.stdout.strip() == expected
