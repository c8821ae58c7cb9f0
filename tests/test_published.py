import math

from codec.published import PUBLISHED

CODES = {  # codebooks, entries each, frames a second
    ("DAC", 6.0): (12, 1024, 50),
    ("EnCodec", 6.0): (8, 1024, 75),
    ("EnCodec", 1.5): (2, 1024, 75),
    ("Mimi, 8 codebooks", 1.1): (8, 2048, 12.5),
    ("BigCodec", 1.04): (1, 8192, 80),
    ("X-codec 2", 0.8): (1, 65536, 50),
    ("Mimi, 16 codebooks", 2.2): (16, 2048, 12.5),
    ("Qwen3-TTS tokenizer, 12.5 Hz", 2.2): (16, 2048, 12.5),
}
RANGES = {"wer": (0, 100), "stoi": (0, 1), "pesq_wb": (1, 4.65), "similarity": (-1, 1), "utmos": (1, 5)}


def test_every_row_says_what_it_is_where_it_is_from_and_how_it_was_measured():
    texts = {"system", "test_set", "source", "url", "protocol", "note"}
    for row in PUBLISHED:
        assert row.keys() == texts | RANGES.keys() | {"kbps"}
        assert all(isinstance(row[key], str) and row[key] and "\n" not in row[key] for key in texts)
        assert row["url"].startswith("https://arxiv.org/abs/")


def test_every_value_is_in_its_metric_s_range_or_absent():
    for row in PUBLISHED:
        values = {key: row[key] for key in RANGES if row[key] is not None}
        assert values and all(RANGES[key][0] <= value <= RANGES[key][1] for key, value in values.items())


def test_bitrates_are_those_of_the_codes_and_no_system_is_there_twice():
    assert sorted((row["system"], row["kbps"]) for row in PUBLISHED) == sorted(CODES)
    for (_, kbps), (n_codebooks, entries, frames_hz) in CODES.items():
        assert math.isclose(kbps, n_codebooks * math.log2(entries) * frames_hz / 1000)
