"""Speech of eleven Debian packages, what the package's own model was trained and validated on, or of three of them.

    python benchmarks/base_speech.py data/wide/raw --wide       # 6.5 h to train on; without --wide three packages, 2.4 h

How it is prepared, and what is trained on it: train_base.sh.

es and el are left out of all, for tests. Where packages do not name who speaks, a language of a package counts as a speaker.
Validation: Danish of tuxpaint, and with --wide the Italian man and the Russian woman of Asterisk's prompts. Those
are of 16 kHz, the only ones below 22.05; `--wide` needs `make eval`, whose PyAV decodes them.
"""

import argparse
import csv
import io
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf

from codec.files import write_atomically

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
import fetch_speech  # noqa: E402

TEST_LANGUAGES = ("es", "el")
LEAST_RATE = 22050
G722_RATE = 16000
G722_LEAST_BYTES = 4000  # 0.5 s; silences are shorter or named so


@dataclass(frozen=True)
class Source:
    """A package of speech: its files lie below FOLDER."""

    prefix: str
    package: str
    folder: str
    file: str
    sha256: str
    speaker_at: int = 0  # which part of the path below `folder` names the speaker
    split: str = "train"


SOURCES = [
    Source("kl", "klettres-data", "usr/share/klettres", "klettres-data_4%3a22.12.3-1_all.deb",  # GPL-2+
           "1186d257a19e84230856baea0b0b1ded8be9195080fcdb2588970b5cd937f5a8"),
    Source("kt", "ktuberling-data", "usr/share/ktuberling/sounds", "ktuberling-data_4%3a22.12.3-1_all.deb",  # GPL-2+, some CC
           "fba44c875bfa31ea488dadd9263e87a4dcaea0bd47d28817f6c0dc6d2af970ed"),
]  # fmt: skip
WIDE_SOURCES = [
    Source("fi", "fillets-ng-data-cs", "usr/share/games/fillets-ng/sound", "fillets-ng-data-cs_1.0.1-1.1_all.deb",  # GPL-2
           "3ecef99b9456f1c80c9625c6f2418642b52d58e7167a46bad7a412db17991b14", speaker_at=-2),
    Source("fi", "fillets-ng-data-nl", "usr/share/games/fillets-ng/sound", "fillets-ng-data-nl_1.0.1-1.1_all.deb",  # GPL-2
           "afb4443fda9ab507dee578b75be857d121718a1cd6017a474f30e0eb13dc9d10", speaker_at=-2),
    Source("gc", "gcin-voice", "usr/share/gcin-voice/ogg", "gcin-voice_0~20170223-3_all.deb",  # LGPL-3, CC-BY-3
           "6a0353f0294d06f7bd901bada3d5d9eec63b66c2ec029f92da3124d93d45de70", speaker_at=-1),
    Source("hw", "hedgewars-data", "usr/share/games/hedgewars/Data/Sounds/voices", "hedgewars-data_1.0.2-6_all.deb",  # GFDL-1.3
           "722225903a72604403e6e0026e40e9a6953f47a74d94efc5f55504bc05bb4761"),
    *(Source("as", f"asterisk-core-sounds-{language}-g722", "usr/share/asterisk/sounds",  # CC-BY-SA-3.0, ru CC-BY-3.0
             f"asterisk-core-sounds-{language}-g722_1.6.1-1_all.deb", sha256, split=split)
      for language, split, sha256 in (
          ("en", "train", "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806"),
          ("fr", "train", "7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0"),
          ("it", "val", "46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016"),
          ("ru", "val", "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b"))),
]  # fmt: skip
NOT_SPEECH = ("Robot", "silence")  # a voice through a vocoder; files of nothing


def lay_out(unpacked: Path, source: Source, out_dir: Path) -> list[tuple[str, str, str]]:
    """Copy the speech of a package to OUT_DIR/PREFIX_SPEAKER/NAME, G.722 as wav; returns rows of the metadata."""
    rows, folder = [], unpacked / source.folder
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".ogg", ".g722")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = parts[source.speaker_at]
        rest = [part for i, part in enumerate(parts) if i != source.speaker_at % len(parts)]
        if set(name.split("_")) & set(TEST_LANGUAGES) or "@" in name or set(parts) & set(NOT_SPEECH):
            continue
        speaker = f"{source.prefix}_{name}"
        target = out_dir / speaker / ("-".join(rest) + path.suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".g722":
            if path.stat().st_size < G722_LEAST_BYTES:
                continue
            target = target.with_suffix(".wav")
            sf.write(target, decode_g722(path), G722_RATE)
        elif sf.info(path).samplerate >= LEAST_RATE:
            shutil.copy(path, target)
        else:
            continue
        rows.append((target.relative_to(out_dir).as_posix(), speaker, source.split))
    return rows


def decode_g722(path: Path) -> np.ndarray:
    """Samples (int16) at 16 kHz of a raw G.722 file."""
    import av

    with av.open(str(path), format="g722") as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--wide", action="store_true", help="eight more packages: other voices, not all well recorded")
    args = parser.parse_args()
    out_dir = args.out_dir
    if not (out_dir / "metadata.csv").is_file():
        fetch_speech.fetch(out_dir)
    with open(out_dir / "metadata.csv", encoding="utf-8") as file:
        rows = [tuple(row) for row in list(csv.reader(file))[1:] if row[2] != "test" and "_" not in row[1]]
    for language in TEST_LANGUAGES:
        shutil.rmtree(out_dir / language, ignore_errors=True)
    for source in SOURCES + WIDE_SOURCES * args.wide:
        with tempfile.TemporaryDirectory() as temporary:
            archive = fetch_speech.download(Path(temporary), source.package, source.file, source.sha256)
            subprocess.run(["dpkg", "-x", archive, f"{temporary}/unpacked"], check=True)
            rows += lay_out(Path(temporary, "unpacked"), source, out_dir)
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("path", "speaker", "split"), *rows])
    write_atomically(out_dir / "metadata.csv", text.getvalue())
    print(f"{out_dir}: {len(rows)} recordings of {len({row[1] for row in rows})} groups")


if __name__ == "__main__":
    main()
