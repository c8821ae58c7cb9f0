"""The study's speech: prepared phrases with a known text, joined to recordings of up to 28 s.

    python demo/fetch_speech.py data/study/raw
    python prepare_speaker_data.py data/study/raw data/study/phrases --sample_rate 16000 --min_s 0.5 --no_balance \
        --metadata data/study/raw/metadata.csv
    python benchmarks/distillation/speech.py data/study/phrases data/study/speech

Writes OUT_DIR/manifest.jsonl, wav/, and transcripts.jsonl for `codec align --transcripts`. Phrases last 1.5 s on average, and a
speech encoder that looks at 30 s is asked 20 times less often for joined ones. The texts are those of Debian's
tuxpaint-stamps-default; phrases with digits or cut in several utterances are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import soundfile as sf

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
from fetch_speech import download  # noqa: E402

GAP_S, LONGEST_S = 0.3, 28.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phrases", type=Path, help="as prepare_speaker_data.py wrote them, at 16 kHz")
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        package = download(Path(temporary))
        subprocess.run(["dpkg", "-x", package, temporary], check=True)
        texts = read_texts(Path(temporary, "usr/share/tuxpaint/stamps"))
    lines = [json.loads(line) for line in (args.phrases / "manifest.jsonl").read_text().splitlines()]
    cuts = Counter(line["source"] for line in lines)
    known = [line for line in lines if line["source"] in texts and cuts[line["source"]] == 1]
    groups = defaultdict(list)
    for line in known:
        groups[line["speaker"], line["split"]].append(line)
    (args.out_dir / "wav").mkdir(parents=True)
    manifest, transcripts = [], []
    for (language, split), members in sorted(groups.items()):
        for number, group in enumerate(joined(members)):
            name = f"wav/{language}_{number:03d}.wav"
            wav = join([sf.read(args.phrases / line["path"], dtype="float32")[0] for line in group])
            sf.write(args.out_dir / name, wav, 16000, subtype="PCM_16")
            manifest.append({"path": name, "speaker": language, "split": split, "sample_rate": 16000, "n_samples": len(wav)})
            transcripts.append({"path": name, "text": " ".join(texts[line["source"]] for line in group), "language": language})
    for name, rows in (("manifest.jsonl", manifest), ("transcripts.jsonl", transcripts)):
        (args.out_dir / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    hours = sum(row["n_samples"] for row in manifest) / 16000 / 3600
    print(f"{args.out_dir}: {len(known)} of {len(lines)} phrases in {len(manifest)} recordings, {hours:.2f} h")
    return 0


def read_texts(stamps: Path) -> dict[str, str]:
    """Text of a phrase by the source's name, LANGUAGE/FOLDERS-NAME.ogg, as demo/fetch_speech.py lays it out."""
    texts = {}
    for path in stamps.rglob("*.txt"):
        name = "-".join(path.relative_to(stamps).with_suffix("").parts)
        for language, text in re.findall(r"^([a-z]{2})\.utf8=(.+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            if not re.search(r"\d", text):
                texts[f"{language}/{name}.ogg"] = " ".join(text.split())
    return texts


def joined(lines: list[dict]) -> list[list[dict]]:
    """Phrases in order, in groups of up to LONGEST_S with the gaps."""
    groups, length_s = [[]], 0.0
    for line in lines:
        seconds = line["n_samples"] / line["sample_rate"] + GAP_S
        if groups[-1] and length_s + seconds > LONGEST_S:
            groups.append([])
            length_s = 0.0
        groups[-1].append(line)
        length_s += seconds
    return groups


def join(wavs: list[np.ndarray]) -> np.ndarray:
    gap = np.zeros(int(GAP_S * 16000), np.float32)
    return np.concatenate([piece for wav in wavs for piece in (wav, gap)])


if __name__ == "__main__":
    sys.exit(main())
