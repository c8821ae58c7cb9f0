"""The field's published numbers for neural codecs: quoted, with their sources, never measured here.

They stand beside a report's own table, not in it: test set, recogniser and speaker model differ between papers and from ours.
"""

from __future__ import annotations

LLASA = {
    "test_set": "LibriSpeech test-clean, 2620 utterances",
    "source": "Ye et al. 2025 (Llasa, X-codec 2), Table 1",
    "url": "https://arxiv.org/abs/2502.04128",
    "protocol": "WER by HuBERT large fine-tuned on LibriSpeech (hubert-large-ls960-ft), text through Whisper's normaliser; "
    "uncoded speech has WER 1.96 and UTMOS 4.09. The authors' code computes similarity by a WavLM large speaker verifier.",
    "note": "Not confirmed: that the table's similarity is by that verifier; how 24 kHz codecs were brought to 16 kHz.",
}
QWEN = {
    "test_set": "not stated",
    "source": "Hu et al. 2026 (Qwen3-TTS), README, table of semantic-related speech tokenizers",
    "url": "https://arxiv.org/abs/2601.15621",
    "protocol": "No WER; speaker model and resampling are not stated.",
    "note": "Not confirmed: the test set, probably LibriSpeech test-clean, as the table's row of X-codec 2 equals Llasa's.",
}
COLUMNS = ("system", "kbps", "wer", "stoi", "pesq_wb", "similarity", "utmos")  # wer in percent; None: not published
ROWS = [
    ("DAC", 6.0, 2.00, 0.95, 4.01, 0.95, 4.00, LLASA),
    ("EnCodec", 6.0, 2.15, 0.94, 2.77, 0.89, 3.09, LLASA),
    ("EnCodec", 1.5, 4.90, 0.85, 1.56, 0.60, 1.58, LLASA),
    ("Mimi, 8 codebooks", 1.1, 2.96, 0.91, 2.25, 0.73, 3.56, LLASA),
    ("BigCodec", 1.04, 2.76, 0.93, 2.68, 0.84, 4.11, LLASA),
    ("X-codec 2", 0.8, 2.47, 0.92, 2.43, 0.82, 4.13, LLASA),
    ("Mimi, 16 codebooks", 2.2, None, 0.94, 2.88, 0.87, 3.87, QWEN),
    ("Qwen3-TTS tokenizer, 12.5 Hz", 2.2, None, 0.96, 3.21, 0.95, 4.16, QWEN),
]
PUBLISHED: list[dict] = [dict(zip(COLUMNS, row)) | paper for *row, paper in ROWS]
