"""What is said in the phrases of demo/fetch_speech.py, for the word error rate.

    python benchmarks/evaluation/texts.py data/demo/speech

writes transcripts.jsonl beside the manifest of prepared phrases. Phrases with digits, and those that the preparation
cut in several utterances, have no line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from codec.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "benchmarks/distillation")]
from fetch_speech import download  # noqa: E402
from speech import read_texts  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phrases", type=Path, help="as prepare_speaker_data.py wrote them")
    phrases = parser.parse_args().phrases
    rows = [json.loads(line) for line in (phrases / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as temporary:
        package = download(Path(temporary))
        subprocess.run(["dpkg", "-x", package, temporary], check=True)
        texts = read_texts(Path(temporary, "usr/share/tuxpaint/stamps"))
    lines = match(rows, texts)
    path = phrases / "transcripts.jsonl"
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    print(f"{path}: {len(lines)} of {len(rows)} phrases")
    return 0


def match(rows: list[dict], texts: dict[str, str]) -> list[dict]:
    """Lines of transcripts, of the utterances that are a whole phrase; a speaker's name is the language."""
    cuts = Counter(row["source"] for row in rows)
    whole = [row for row in rows if row["source"] in texts and cuts[row["source"]] == 1]
    return [{"path": row["path"], "text": texts[row["source"]], "words": [], "language": row["speaker"]} for row in whole]


if __name__ == "__main__":
    sys.exit(main())
