"""The wheel holds all that an installation needs: it serves without the checkout that it was built from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout. It is built from a copy, since setuptools leaves a folder `build` where it works."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("serve_app", "configs", "cluster"):
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / file, source)
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", out, source], check=True, timeout=300)
    (built,) = out.glob("serve_app-*.whl")
    return built


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "serve_app").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {f"serve_app/configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.yaml")}
    observability = REPOSITORY / "cluster/observability"
    made = [*observability.glob("rules.yml"), *observability.glob("dashboards/*.json")]
    expected |= {f"serve_app/observability/{path.relative_to(observability).as_posix()}" for path in made}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert {"serve_app/py.typed", "serve_app/configs/tiny.yaml", "serve_app/gateway/page/index.html"} <= packed


@pytest.mark.slow
def test_an_installed_wheel_makes_a_video_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True, timeout=300)
    # The interpreter behind the virtual environment: it does not read the .pth file by which a checkout is installed.
    python = str(Path(sys._base_executable).resolve())  # type: ignore[attr-defined]
    paths = (str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "WAN_SERVE_HOME": "home"}

    def run(program: str, *arguments: str) -> str:
        command = [python, "-c", program, *arguments]
        done = subprocess.run(command, env=environment, cwd=elsewhere, capture_output=True, text=True, timeout=1000)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    found = run("import sys, serve_app; print(serve_app.__file__, *sys.path, *map(str, sys.meta_path), sep='\\n')")
    assert found.startswith(str(target))
    assert str(REPOSITORY) not in found.splitlines() and "__editable__" not in found

    wan_serve = "from serve_app.cli import main; main()"
    run(wan_serve, "manifests", "--config", "a14b-hosts", "-o", "manifests")
    assert run(wan_serve, "check", "tiny").endswith(f"{target / 'serve_app' / 'configs' / 'tiny.yaml'}: fine\n")
    run(wan_serve, "demo")
    (video,) = (elsewhere / "out").glob("video_*.mp4")
    assert video.read_bytes()[4:8] == b"ftyp"
    assert (elsewhere / "home" / "jobs.db").is_file()
