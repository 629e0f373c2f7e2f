"""Unpack the server that the PyPI wheel ``milvus`` holds: ``python3 unpack.py VERSION FOLDER``.

FOLDER gets ``bin/`` (the server and its libraries) and ``configs/``. This runs where the image is
built rather than in the image, so that pip's own settings for this machine apply. Needs the
standard library and pip only.
"""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

DATA = "/var/lib/milvus"
SETTINGS = {
    "etcd_data_dir": f"{DATA}/etcd",
    "etcd_log_path": "stdout",
    "local_storage_dir": f"{DATA}/data",
    "rocksmq_data_dir": f"{DATA}/rocksmq",
    "system_log_path": "",
}
PLACEHOLDER = re.compile(r"\{\{\s*(\w+)(?:\(\w+\))?\s*(?::\s*(.*?))?\s*\}\}")


def unpack(version: str, folder: Path) -> None:
    """Download the wheel of that version and unpack the server into the folder."""
    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        # The wheel is tagged for Linux on x86_64 and for any Python 3.
        pip += ["--only-binary=:all:", "--dest", download, f"milvus=={version}"]
        subprocess.run(pip, check=True, stdin=subprocess.DEVNULL)  # noqa: S603
        (wheel,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            _binaries(archive, folder / "bin")
            configs = folder / "configs"
            configs.mkdir(parents=True, exist_ok=True)
            template = archive.read("milvus/data/config.yaml.template").decode()
            (configs / "milvus.yaml").write_text(PLACEHOLDER.sub(_setting, template))
            (configs / "glog.conf").write_text("--logtostderr=true\n")


def _binaries(archive: zipfile.ZipFile, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in archive.namelist():
        path = PurePosixPath(name)
        if path.parts[:3] == ("milvus", "data", "bin") and path.suffix == ".lzma":
            target = folder / path.stem
            with lzma.open(archive.open(name)) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
            target.chmod(0o755)


def _setting(match: re.Match[str]) -> str:
    name, default = match.groups()
    return str(SETTINGS.get(name, default or ""))


if __name__ == "__main__":
    unpack(sys.argv[1], Path(sys.argv[2]))
