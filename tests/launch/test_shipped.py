"""A configuration by its path or by the name under which it ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.errors import ConfigError
from serve_app.launch import shipped

TINY = Path(__file__).parents[2] / "configs/tiny.yaml"


@pytest.mark.parametrize("given", ["tiny", "tiny.yaml", "configs/tiny.yaml"])
def test_a_shipped_file_is_found_from_any_folder(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.config_file(Path(given)).samefile(TINY)


@pytest.mark.parametrize("given", ["tiny", "tiny.yaml", "configs/tiny.yaml"])
def test_the_users_own_file_comes_first(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(given)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert shipped.config_file(path) == path


@pytest.mark.parametrize("given", ["my/tiny.yaml", "/absent/configs/tiny.yaml", "mine.yaml", "tiny.json"])
def test_another_path_is_left_to_whoever_reads_it(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped.config_file(Path(given)) == Path(given)


def test_an_unknown_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^tinny: there is no such file, expected a file or one of a14b-.*, tiny$"):
        shipped.config_file(Path("tinny"))


def test_an_installed_package_holds_the_files_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").touch()
    assert shipped.names() == ["mine"] and shipped.config_file(Path("mine")) == tmp_path / "configs" / "mine.yaml"
