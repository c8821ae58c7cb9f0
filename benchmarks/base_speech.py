"""The speech that the package's own model was trained on: three Debian packages of spoken phrases, words and letters.

    python benchmarks/base_speech.py data/base/raw
    python prepare_speaker_data.py data/base/raw data/base/speech --sample_rate 24000 --metadata data/base/raw/metadata.csv \\
        --min_s 0.3 --no_balance

tuxpaint-stamps-default (GPL-2); klettres-data (GPL-2+); ktuberling-data (GPL-2+, some CC), its ogg files from 22.05 kHz on. es
and el are left out of all three, for tests. A language of a package counts as a speaker; Danish of tuxpaint is for validation.
"""

import csv
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import soundfile as sf

from codec.files import write_atomically

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
import fetch_speech  # noqa: E402

TEST_LANGUAGES = ("es", "el")
PACKAGES = {  # short name: package, folder of languages in it, file, sha256
    "kl": ("klettres-data", "usr/share/klettres", "klettres-data_4%3a22.12.3-1_all.deb",
           "1186d257a19e84230856baea0b0b1ded8be9195080fcdb2588970b5cd937f5a8"),
    "kt": ("ktuberling-data", "usr/share/ktuberling/sounds", "ktuberling-data_4%3a22.12.3-1_all.deb",
           "fba44c875bfa31ea488dadd9263e87a4dcaea0bd47d28817f6c0dc6d2af970ed"),
}  # fmt: skip
LEAST_RATE = 22050


def lay_out(languages: Path, prefix: str, out_dir: Path) -> list[tuple[str, str, str]]:
    """Copy LANG/FOLDERS/NAME to OUT_DIR/PREFIX_LANG/FOLDERS-NAME; returns rows of the metadata."""
    rows = []
    for folder in sorted(path for path in languages.iterdir() if path.is_dir() and "@" not in path.name):
        speaker = f"{prefix}_{folder.name}"
        for source in sorted(folder.rglob("*.ogg") if folder.name not in TEST_LANGUAGES else ()):
            if sf.info(source).samplerate >= LEAST_RATE:
                target = out_dir / speaker / "-".join(source.relative_to(folder).parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
                rows.append((target.relative_to(out_dir).as_posix(), speaker, "train"))
    return rows


def main() -> None:
    out_dir = Path(sys.argv[1])
    if not (out_dir / "metadata.csv").is_file():
        fetch_speech.fetch(out_dir)
    with open(out_dir / "metadata.csv", encoding="utf-8") as file:
        rows = [tuple(row) for row in list(csv.reader(file))[1:] if row[2] != "test" and "_" not in row[1]]
    for language in TEST_LANGUAGES:
        shutil.rmtree(out_dir / language, ignore_errors=True)
    for prefix, (package, folder, file, sha256) in PACKAGES.items():
        with tempfile.TemporaryDirectory() as temporary:
            archive = fetch_speech.download(Path(temporary), package, file, sha256)
            subprocess.run(["dpkg", "-x", archive, f"{temporary}/unpacked"], check=True)
            rows += lay_out(Path(temporary, "unpacked", folder), prefix, out_dir)
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("path", "speaker", "split"), *rows])
    write_atomically(out_dir / "metadata.csv", text.getvalue())
    print(f"{out_dir}: {len(rows)} recordings of {len({row[1] for row in rows})} groups")


if __name__ == "__main__":
    main()
