"""Fetch programs of Debian's without being root: the classical codecs to compare with, the browser of the page's test.

    python demo/fetch_programs.py .tools opus-tools codec2 speex chromium-headless-shell

leaves OUT_DIR/usr as the packages have it, with the libraries that this system lacks, and in OUT_DIR/bin a starter for
each program. What $PATH has already is not fetched. apt-get checks what it downloads against Debian's signatures.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fetch_speech import apt

# One of these on $PATH, or the first in OUT_DIR/bin, stands for the package; others have a program of their own name.
PROGRAMS = {
    "opus-tools": ("opusenc",),
    "codec2": ("c2enc",),
    "speex": ("speexenc",),
    "chromium-headless-shell": ("chromium-headless-shell", "chromium"),
}
# In usr/bin lie scripts that name the real place of these with a path from the root.
ELSEWHERE = ("usr/lib/chromium/chromium-headless-shell",)
STARTER = """#!/bin/sh
root=$(dirname "$(dirname "$(readlink -f "$0")")")
LD_LIBRARY_PATH={libraries} exec "$root/{program}" "$@"
"""


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0 when every program is there, 2 with one line on stderr otherwise."""
    parser = argparse.ArgumentParser(description="Fetch Debian programs into a folder, without being root.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("packages", nargs="+", metavar="PACKAGE")
    args = parser.parse_args(arguments)
    try:
        absent = [package for package in args.packages if not any(map(shutil.which, programs(package)))]
        if not all((args.out_dir / "bin" / programs(package)[0]).is_file() for package in absent):
            fetch(args.out_dir, absent)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"fetch_programs: {error}", file=sys.stderr)
        return 2
    for package in args.packages:
        starter = args.out_dir / "bin" / programs(package)[0]
        print(f"{package}: {starter if package in absent else 'installed on this system'}")
    return 0


def programs(package: str) -> tuple[str, ...]:
    return PROGRAMS.get(package, (package,))


def fetch(out_dir: Path, packages: list[str]) -> None:
    """Download and unpack packages and what they need; OUT_DIR is replaced whole or not at all.

    Raises:
        ValueError: no apt, no network, no such package or program in it, or OUT_DIR is something else.
    """
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise ValueError(f"no {tool} on this system; get {', '.join(packages)} another way and onto $PATH")
    if out_dir.exists() and not (out_dir / "bin").is_dir():
        raise ValueError(f"{out_dir}: is in the way and not from here (no bin/); remove it")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".programs_", dir=out_dir.parent) as temporary:
        folder, staged = Path(temporary), Path(temporary, "staged")
        folder.chmod(0o755)  # apt drops to its own user
        download(folder, packages)
        for archive in sorted(folder.glob("*.deb")):
            subprocess.run(["dpkg", "-x", archive, staged], check=True)
        write_starters(staged)
        for package in packages:
            if not (staged / "bin" / programs(package)[0]).is_file():
                raise ValueError(f"{package}: brought no program {programs(package)[0]}; is it installed but not on $PATH?")
        if out_dir.exists():
            os.rename(out_dir, folder / "old")
        os.rename(staged, out_dir)


def download(folder: Path, packages: list[str]) -> None:
    """The .deb files of the packages and of every library they need that is not installed."""
    plan = apt("--simulate", "--no-install-recommends", "install", *packages, folder=folder)
    apt("download", *re.findall(r"^Inst (\S+)", plan, re.MULTILINE), folder=folder)


def write_starters(root: Path) -> None:
    """ROOT/bin/NAME for each program in ROOT/usr/bin: it runs it with the libraries of ROOT, wherever ROOT lies."""
    folders = sorted({path.parent.relative_to(root) for path in root.rglob("*.so*")})
    libraries = ":".join(f"$root/{folder}" for folder in folders)
    (root / "bin").mkdir(parents=True, exist_ok=True)
    paths = [*sorted((root / "usr/bin").glob("*")), *(root / place for place in ELSEWHERE)]
    for path in filter(Path.is_file, paths):
        starter = root / "bin" / path.name
        starter.write_text(STARTER.format(libraries=libraries, program=path.relative_to(root)))
        starter.chmod(0o755)


if __name__ == "__main__":
    sys.exit(main())
