"""Fetch real human speech for the demo: the spoken phrases of Debian's tuxpaint-stamps-default (GPL-2).

    python demo/fetch_speech.py OUT_DIR

leaves OUT_DIR/<language>/NAME.ogg (about 7,000 phrases, 3 hours, nine languages) and OUT_DIR/metadata.csv
with the split. es and el are only ever tested on; that languages differ does not prove that speakers do.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "tuxpaint-stamps-default"
PINNED_FILE = "tuxpaint-stamps-default_2022.06.04-1_all.deb"
PINNED_SHA256 = "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34"
SPLITS = {
    "be": "train",
    "bg": "train",
    "ca": "train",
    "fr": "train",
    "ro": "train",
    "ru": "train",
    "da": "val",
    "el": "test",
    "es": "test",
}
OWN_DATA = "run the demo on recordings of your own: make demo DATA=folder"


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 when OUT_DIR is there, 2 with one line on stderr otherwise."""
    parser = argparse.ArgumentParser(description="Fetch human speech for the demo from a Debian mirror.")
    parser.add_argument("out_dir", type=Path)
    out_dir = parser.parse_args(arguments).out_dir
    try:
        if (out_dir / "metadata.csv").is_file():
            print(f"{out_dir}: already there")
        else:
            fetch(out_dir)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"fetch_speech: {error}; or {OWN_DATA}", file=sys.stderr)
        return 2
    return 0


def fetch(out_dir: Path) -> None:
    """Download, check, unpack and lay out the speech; OUT_DIR appears whole or not at all.

    Raises:
        ValueError: no apt, no mirror, a package that is not the pinned one, or OUT_DIR in the way.
    """
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise ValueError(f"no {tool} on this system")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir}: is in the way and not from here (no metadata.csv); remove it")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".speech_", dir=out_dir.parent) as temporary:
        package = download(Path(temporary))
        unpacked, staged = Path(temporary, "unpacked"), Path(temporary, "staged")
        subprocess.run(["dpkg", "-x", package, unpacked], check=True)
        n_files = lay_out(unpacked / "usr/share/tuxpaint/stamps", staged)
        staged.chmod(0o755)
        if out_dir.exists():
            out_dir.rmdir()
        os.rename(staged, out_dir)
    print(f"{out_dir}: {n_files} phrases in {len(SPLITS)} languages")


def download(folder: Path, package: str = PACKAGE, file: str = PINNED_FILE, sha256: str = PINNED_SHA256) -> Path:
    """The .deb file of a package in `folder`, checked against the pinned hash; another version only warns."""
    folder.chmod(0o755)  # apt drops to its own user
    print(f"downloading {package} with apt-get", flush=True)
    apt("download", package, folder=folder)
    path = next(folder.glob(f"{package}_*.deb"))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if path.name != file:
        message = f"the mirror has {path.name}, not {file}; figures may differ"
        print(f"fetch_speech: warning: {message}", file=sys.stderr)
    elif found != sha256:
        raise ValueError(f"{path.name}: sha256 {found}, expected {sha256}; try another mirror")
    return path


def lay_out(stamps: Path, out_dir: Path) -> int:
    """Move FOLDERS/NAME_desc_LANG.ogg to OUT_DIR/LANG/FOLDERS-NAME.ogg and write metadata.csv.

    Sound effects (no `_desc_`), phrases without a language and languages of under two minutes stay behind.

    Returns:
        Number of phrases.
    """
    rows = []
    for language, split in sorted(SPLITS.items()):
        (out_dir / language).mkdir(parents=True)
        for source in sorted(stamps.rglob(f"*_desc_{language}.ogg")):
            name = "-".join(source.relative_to(stamps).parts).removesuffix(f"_desc_{language}.ogg")
            target = Path(language, f"{name}.ogg")
            shutil.move(source, out_dir / target)
            rows.append((target.as_posix(), language, split))
    if not rows:
        raise ValueError(f"{PACKAGE} holds no spoken phrases any more")
    with open(out_dir / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "speaker", "split"), *rows])
    return len(rows)


def apt(*arguments: str, folder: Path) -> str:
    """What apt-get says, run quietly in a folder; where it fails, run once more with fresh package lists.

    The fresh lists lie in the folder as well: nobody has to be root.

    Raises:
        ValueError: it failed again.
    """
    result = _apt_get(*arguments, folder=folder)
    if result.returncode:
        lists = (folder / "apt_lists").resolve()
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options = ("-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={lists}")
        _apt_get(*options, "update", folder=folder)
        result = _apt_get(*options, *arguments, folder=folder)
    if result.returncode:
        raise ValueError(f"apt-get: {''.join(result.stderr.strip().splitlines()[-1:])}; is there a network?")
    return result.stdout


def _apt_get(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    command = ["apt-get", "-qq", "-o", "Acquire::http::Timeout=30", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
