import csv
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "demo"))
import fetch_speech  # noqa: E402


def make_stamps(folder: Path) -> Path:
    for name in ("a/cat_desc_es.ogg", "b/cat_desc_es.ogg", "a/cat_desc_ru.ogg", "a/cat.ogg", "a/cat_desc.ogg",
                 "a/cat_desc_lt.ogg", "a/cat_desc_da.ogg", "a/cat_es.ogg"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_phrases_are_laid_out_by_language_and_the_test_languages_never_train(tmp_path):
    assert fetch_speech.lay_out(make_stamps(tmp_path / "stamps"), tmp_path / "out") == 4
    with open(tmp_path / "out" / "metadata.csv", newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"es/a-cat.ogg", "es/b-cat.ogg", "ru/a-cat.ogg", "da/a-cat.ogg"}
    assert all((tmp_path / "out" / path).is_file() for path in rows)
    assert rows["es/b-cat.ogg"] == {"path": "es/b-cat.ogg", "speaker": "es", "split": "test"}
    assert rows["ru/a-cat.ogg"]["split"] == "train" and rows["da/a-cat.ogg"]["split"] == "val"


def test_fetching_again_does_nothing_and_without_apt_names_the_way_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "metadata.csv").touch()
    monkeypatch.setenv("PATH", "/nonexistent")
    assert fetch_speech.main([str(tmp_path / "done")]) == 0
    assert fetch_speech.main([str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "no apt-get" in error and "make demo DATA=folder" in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_changed_package_is_refused_and_another_version_only_warned_of(tmp_path, monkeypatch, capsys):
    def mirror_with(folder: Path, name: str) -> Path:
        folder.mkdir()
        monkeypatch.setattr(fetch_speech, "apt", lambda *_, folder: (folder / name).write_bytes(b"x"))
        return folder

    with pytest.raises(ValueError, match="sha256 .* expected 6db6c1bf"):
        fetch_speech.download(mirror_with(tmp_path / "changed", fetch_speech.PINNED_FILE))
    other = "tuxpaint-stamps-default_2030.01.01-1_all.deb"
    assert fetch_speech.download(mirror_with(tmp_path / "other", other)).name == other
    assert "warning" in capsys.readouterr().err
