import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from codec.data import read_manifest
from codec.words import read_words

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "benchmarks" / "evaluation")]
import fetch_programs  # noqa: E402
import fetch_russian  # noqa: E402
import fetch_speech  # noqa: E402
import texts  # noqa: E402

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb")


def build_package(folder: Path, name: str, files: dict[str, str]) -> None:
    root = folder / "tree" / name
    control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    for path, text in {"DEBIAN/control": control, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
        (root / path).chmod(0o755)
    subprocess.run(["dpkg-deb", "--build", "-Znone", root, folder / f"{name}_1_all.deb"], check=True, capture_output=True)


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> list[tuple[str, ...]]:
    """A mirror with two packages; what apt-get was asked for."""
    asked = []

    def apt(*arguments: str, folder: Path) -> str:
        asked.append(arguments)
        if arguments[0] == "--simulate":
            return "NOTE: only a simulation\nInst libsay1 (1 Debian [all])\nInst say-tool (1 Debian [all])\nConf say-tool (1)\n"
        for name in arguments[1:]:
            shutil.copy(tmp_path / "mirror" / f"{name}_1_all.deb", folder)
        return ""

    say = '#!/bin/sh\nlib=$(ls ${LD_LIBRARY_PATH%%:*})\necho "$lib: $*"\n'
    build_package(tmp_path / "mirror", "say-tool", {"usr/bin/say-tool": say, "usr/share/doc/x": ""})
    build_package(tmp_path / "mirror", "libsay1", {"usr/lib/arch/libsay.so.1": "", "usr/lib/arch/sub/libmore-1.so": ""})
    monkeypatch.setattr(fetch_programs, "apt", apt)
    return asked


@needs_dpkg
def test_a_fetched_program_runs_with_its_libraries_from_wherever_the_folder_lies(mirror, tmp_path, capsys):
    tools = tmp_path / "a b" / "tools"
    assert fetch_programs.main([str(tools), "say-tool"]) == 0
    assert capsys.readouterr().out == f"say-tool: {tools / 'bin' / 'say-tool'}\n"
    assert mirror[-1] == ("download", "libsay1", "say-tool")
    tools.rename(tmp_path / "moved")
    output = subprocess.run([tmp_path / "moved/bin/say-tool", "x y", "z"], capture_output=True, text=True, check=True)
    assert output.stdout == "libsay.so.1\nsub: x y z\n"
    assert "root/usr/lib/arch:$root/usr/lib/arch/sub exec" in (tmp_path / "moved/bin/say-tool").read_text()
    assert not list((tmp_path / "a b").iterdir())


@needs_dpkg
def test_what_is_there_or_on_the_path_is_not_fetched_again(mirror, tmp_path, capsys):
    assert fetch_programs.main([str(tmp_path / "tools"), "say-tool"]) == 0
    n_asked = len(mirror)
    assert fetch_programs.main([str(tmp_path / "tools"), "say-tool"]) == 0
    assert fetch_programs.main([str(tmp_path / "none"), "sh", "ls"]) == 0
    assert len(mirror) == n_asked and not (tmp_path / "none").exists()
    assert "sh: installed on this system" in capsys.readouterr().out


@needs_dpkg
def test_a_fetch_that_fails_leaves_the_old_folder_and_nothing_else(mirror, tmp_path, capsys):
    tools = tmp_path / "out" / "tools"
    assert fetch_programs.main([str(tools), "say-tool"]) == 0
    assert fetch_programs.main([str(tools), "say-tool", "absent-tool"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fetch_programs: absent-tool: brought no program") and error.count("\n") == 1
    assert (tools / "bin/say-tool").is_file() and [path.name for path in tools.parent.iterdir()] == ["tools"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert fetch_programs.main([str(tmp_path / "mine"), "say-tool"]) == 2
    assert "is in the way" in capsys.readouterr().err and (tmp_path / "mine" / "thesis.tex").is_file()


def test_without_apt_it_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert fetch_programs.main([str(tmp_path / "tools"), "opus-tools", "speex"]) == 2
    error = capsys.readouterr().err
    assert "no apt-get on this system; get opus-tools, speex" in error and error.count("\n") == 1
    assert not (tmp_path / "tools").exists()


def put_apt_get(folder: Path, body: str) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "apt-get").write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n{body}\n')
    (folder / "bin" / "apt-get").chmod(0o755)


def test_package_lists_are_made_in_the_folder_where_the_systems_are_of_no_use(tmp_path, monkeypatch):
    put_apt_get(tmp_path, 'case "$*" in *apt_lists*download*) echo "$PWD"; exit 0;; *update) exit 0;; esac; exit 100')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert fetch_speech.apt("download", "x", folder=Path("folder")) == f"{tmp_path / 'folder'}\n"
    first, update, second = (tmp_path / "asked").read_text().splitlines()
    lists = f"-o Dir::State::Lists={tmp_path}/folder/apt_lists -o Dir::Cache={tmp_path}/folder/apt_lists"
    always = "-qq -o Acquire::http::Timeout=30"
    assert first == f"{always} download x" and update == f"{always} {lists} update" and second == f"{always} {lists} download x"
    assert (tmp_path / "folder/apt_lists/partial").is_dir()


def test_apt_that_fails_twice_is_quoted(tmp_path, monkeypatch):
    put_apt_get(tmp_path, 'echo "W: odd" >&2; echo "E: Unable to locate package x" >&2; exit 100')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    with pytest.raises(ValueError, match="^apt-get: E: Unable to locate package x; is there a network[?]$"):
        fetch_speech.apt("download", "x", folder=tmp_path)


def test_russian_sentences_become_a_test_set_with_texts_free_of_stress_marks(tmp_path):
    voice = tmp_path / "voice"
    (voice / "etc").mkdir(parents=True)
    (voice / "wav").mkdir()
    for name, seconds in (("ru_0002", 2), ("ru_0001", 1)):
        sf.write(voice / "wav" / f"{name}.wav", np.zeros(16000 * seconds), 16000, subtype="PCM_16")
    text = '( ru_0001 "Она завела, прядь вол+ос." )\n( ru_0002 "Он сказал: "да+"." )\n( ru_0003 "нет" )\n'
    (voice / "etc/txt.done.data").write_text(text, encoding="utf-8")
    assert fetch_russian.lay_out(voice, tmp_path / "out") == 2
    utterances = read_manifest(tmp_path / "out/manifest.jsonl", "test", 16000)
    assert [(u.name, u.n_samples) for u in utterances] == [("wav/ru_0001.wav", 16000), ("wav/ru_0002.wav", 32000)]
    assert all(u.path.is_file() for u in utterances)
    said = read_words(tmp_path / "out/transcripts.jsonl")
    assert {name: transcript.text for name, transcript in said.items()} == {
        "wav/ru_0001.wav": "Она завела, прядь волос.", "wav/ru_0002.wav": 'Он сказал: "да".'}  # fmt: skip
    assert '"language": "ru"' in (tmp_path / "out/transcripts.jsonl").read_text()


def test_only_phrases_that_were_kept_whole_have_a_text(tmp_path):
    rows = [{"path": f"wav/{name}.wav", "speaker": "es", "source": f"es/{source}.ogg"}
            for name, source in (("a", "cat"), ("b", "dog_0"), ("c", "dog_0"), ("d", "unknown"))]  # fmt: skip
    lines = texts.match(rows, {"es/cat.ogg": "Un gato", "es/dog_0.ogg": "Un perro y otro"})
    assert lines == [{"path": "wav/a.wav", "text": "Un gato", "words": [], "language": "es"}]
    (tmp_path / "t.jsonl").write_text(json.dumps(lines[0]))
    assert read_words(tmp_path / "t.jsonl")["wav/a.wav"].text == "Un gato"
