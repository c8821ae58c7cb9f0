"""Clean read sentences to test on: Debian's festvox-ru, one man, 620 sentences, 1.7 h at 16 kHz (BSD-like licence).

    python benchmarks/evaluation/fetch_russian.py OUT_DIR

leaves OUT_DIR/manifest.jsonl, all of it of the split "test", wav/ as recorded, and transcripts.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import soundfile as sf

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
from fetch_speech import download  # noqa: E402

PACKAGE = "festvox-ru"
FILE = "festvox-ru_0.5+dfsg-6_all.deb"
SHA256 = "21ef3f0f2978ecf2e2eddb367cb0ff4a72572196d28dc69feb84f4177af5e6c4"
VOICE = "usr/share/festival/voices/russian/msu_ru_nsh_clunits"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    out_dir = parser.parse_args().out_dir
    if out_dir.exists():
        parser.error(f"{out_dir}: is there already; remove it")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".russian_", dir=out_dir.parent) as temporary:
        package = download(Path(temporary), PACKAGE, FILE, SHA256)
        subprocess.run(["dpkg", "-x", package, temporary], check=True)
        staged = Path(temporary, "staged")
        n_files = lay_out(Path(temporary, VOICE), staged)
        os.rename(staged, out_dir)
    print(f"{out_dir}: {n_files} sentences")
    return 0


def lay_out(voice: Path, out_dir: Path) -> int:
    """Move VOICE/wav to OUT_DIR/wav and write the manifest and the transcripts beside it; the number of sentences."""
    texts = read_texts((voice / "etc/txt.done.data").read_text(encoding="utf-8"))
    out_dir.mkdir()
    shutil.move(voice / "wav", out_dir / "wav")
    rows, transcripts = [], []
    for path in sorted((out_dir / "wav").glob("*.wav")):
        info, name = sf.info(path), f"wav/{path.name}"
        rows.append({"path": name, "speaker": "ru", "split": "test", "sample_rate": info.samplerate, "n_samples": info.frames,
                     "language": "ru", "source": name, "start_s": 0.0})  # fmt: skip
        if path.stem in texts:
            transcripts.append({"path": name, "text": texts[path.stem], "words": [], "language": "ru"})
    for name, lines in (("manifest.jsonl", rows), ("transcripts.jsonl", transcripts)):
        (out_dir / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return len(rows)


def read_texts(lines: str) -> dict[str, str]:
    """{name: text} of lines `( NAME "TEXT" )`, without the + before a stressed vowel."""
    return {name: text.replace("+", "") for name, text in re.findall(r'^\(\s*(\S+)\s+"(.*)"\s*\)\s*$', lines, re.MULTILINE)}


if __name__ == "__main__":
    sys.exit(main())
