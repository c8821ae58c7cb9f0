"""Judges of coded speech: the real packages on known changes, the text side exactly, and audio that has no score."""

import functools
import importlib.util
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import speech_like

from codec import judges
from codec.judges import METRICS, POOLED, Clip, Undefined

RATE = 16000
CLIP = Clip("a.wav", "ёж, бежит", "ru")
LISTENERS = (judges.PesqJudge, judges.StoiJudge, judges.VisqolJudge, judges.DistillMosJudge, judges.DnsmosJudge,
             judges.SpeakerJudge, judges.PhonemeJudge)  # fmt: skip
KINDS = (*LISTENERS, judges.PitchJudge, judges.SignalJudge)


@functools.cache
def build(kind):
    if kind in (judges.PitchJudge, judges.SignalJudge):
        return kind(RATE)
    return kind()


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def judge(request):
    if missing := judges.absent(request.param.metrics[0], None):
        pytest.skip(missing)
    return build(request.param)


def judge_of(metric):
    if missing := judges.absent(metric, None):
        pytest.skip(missing)
    return build(next(kind for kind in KINDS if metric in kind.metrics))


def scores(judge, wav, wav_hat):
    return judge.judge(judge.prepare(wav, CLIP), wav_hat)


@pytest.fixture(scope="module")
def wav():
    return speech_like(3 * RATE, RATE)


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(1).standard_normal(3 * RATE).astype(np.float32)


# ---- the table --------------------------------------------------------------------------------------------

def test_every_metric_has_one_judge_and_says_which_way_is_good():
    given = [metric for kind in (*KINDS, judges.WhisperJudge) for metric in kind.metrics]
    assert sorted(given) == sorted(METRICS)
    assert {metric.better for metric in METRICS.values()} == {"higher", "lower", "one", "zero"}
    assert {metric.package for metric in METRICS.values()} - {""} == judges.NEEDS.keys()
    assert POOLED.keys() <= METRICS.keys() and not METRICS.keys() & {key for keys in POOLED.values() for key in keys}


def test_only_the_judges_that_are_needed_are_built():
    opened = judges.open_judges({"snr_db", "dc_offset", "log_f0_rmse"}, 24000, None)
    assert [type(judge) for judge in opened] == [judges.PitchJudge, judges.SignalJudge]
    assert all(judge.sample_rate == 24000 and judge.rate_hz is None for judge in opened)
    assert judges.open_judges(set(), 24000, None) == []


def test_what_is_absent_is_said_with_how_to_get_it(monkeypatch):
    assert judges.absent("snr_db", None) == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("pesq", "ai_edge_litert") else name)
    assert judges.absent("pesq_wb", None) == "pip install pesq"
    assert judges.absent("visqol", None) == "pip install 'visqol-python[lattice]'"  # visqol alone scores too high
    assert (judges.absent("wer", "folder"), judges.absent("wer", None)) == ("", "--asr_model FOLDER")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert judges.absent("cer", None) == "pip install faster-whisper, and --asr_model FOLDER"


# ---- known changes ----------------------------------------------------------------------------------------

def test_the_uncoded_audio_itself_has_the_best_scores(judge, wav):
    perfect = {"pesq_wb": 4.644, "stoi": 1, "estoi": 1, "speaker_similarity": 1, "phoneme_error": 0, "log_f0_rmse": 0,
               "voicing_error": 0, "mel_db": 0, "stft_db": 0, "amplitude_ratio": 1}  # fmt: skip
    result = scores(judge, wav, wav)
    assert result.keys() >= set(judge.metrics)
    for metric in perfect.keys() & result.keys():
        assert result[metric] == pytest.approx(perfect[metric], abs=1e-3), metric
    if "visqol" in result:
        assert result["visqol"] > 3.5  # real speech has 4.5
    if "snr_db" in result:  # no number to average
        assert result["snr_db"] == result["si_sdr_db"] == "without limit: there is no error"


def test_6_db_less_is_an_amplitude_of_a_half_and_no_other_word_or_voice(judge, wav):
    result = scores(judge, wav, wav * np.float32(10 ** (-6 / 20)))
    expected = {"amplitude_ratio": 0.501, "pesq_wb": 4.644, "stoi": 1, "estoi": 1, "phoneme_error": 0,
                "speaker_similarity": 1, "log_f0_rmse": 0, "snr_db": 6.04}  # fmt: skip
    for metric in expected.keys() & result.keys():
        assert result[metric] == pytest.approx(expected[metric], abs=2e-3), metric
    if "mel_db" in result:
        assert 1 < result["mel_db"] <= 6.01 and result["si_sdr_db"] > 100


@pytest.mark.parametrize("metric", ["pesq_wb", "stoi", "estoi", "visqol", "dnsmos_bak", "speaker_similarity",
                                    "mel_db", "stft_db", "snr_db", "si_sdr_db"])  # fmt: skip
def test_more_noise_is_worse(metric, wav, noise):
    judge = judge_of(metric)
    kept = judge.prepare(wav, CLIP)
    values = [judge.judge(kept, wav + level * noise)[metric] for level in (0.0003, 0.01, 0.1)]
    assert sorted(values, reverse=METRICS[metric].better == "higher") == values
    assert abs(values[0] - values[2]) > 0.05 * abs(values[0])


def test_signal_metrics_are_what_a_hand_computes(wav, noise):
    result = scores(judges.SignalJudge(RATE), wav, wav + 0.01 * noise + np.float32(0.02))
    error = 0.01 * noise.astype(float) + 0.02
    assert result["snr_db"] == pytest.approx(10 * math.log10(np.square(wav).sum() / np.square(error).sum()), abs=1e-3)
    assert result["dc_offset"] == pytest.approx((wav + error).mean(), abs=1e-6)
    assert result["si_sdr_db"] > result["snr_db"] + 5  # the offset is left out


def tone(hertz, seconds=2.0):
    t = np.arange(int(seconds * RATE)) / RATE
    return (0.1 * sum(np.sin(2 * np.pi * hertz * k * t) / k for k in range(1, 9))).astype(np.float32)


def test_pitch_error_is_in_semitones_and_voicing_error_a_share_of_time():
    judge = judges.PitchJudge(RATE)
    assert scores(judge, tone(150), tone(150 * 2 ** (3 / 12)))["log_f0_rmse"] == pytest.approx(3, abs=0.05)
    half = tone(150) * (np.arange(2 * RATE) < 1.5 * RATE)
    result = scores(judge, tone(150), half)
    assert result["voicing_error"] == pytest.approx(0.25, abs=0.02) and result["log_f0_rmse"] < 0.05
    result = scores(judge, tone(150), np.zeros(2 * RATE, np.float32))
    assert result["voicing_error"] > 0.98 and result["log_f0_rmse"] == "nothing is voiced on both sides"


def test_a_phoneme_error_comes_with_its_counts(wav):
    result = scores(judge_of("phoneme_error"), wav, np.zeros_like(wav))
    errors, count = (result[key] for key in POOLED["phoneme_error"])
    assert errors == count > 0 and result["phoneme_error"] == 1  # of silence nothing is heard


def test_visqol_has_the_lattice_model_without_which_scores_are_too_high(wav, noise):
    judge = judge_of("visqol")
    import visqol

    polynomial = visqol.VisqolApi()
    polynomial.create(mode="speech", use_lattice_model=False)
    output = wav + 0.003 * noise
    wrong = polynomial.measure_from_arrays(wav.astype(float), output.astype(float), RATE).moslqo
    assert abs(scores(judge, wav, output)["visqol"] - wrong) > 0.3


def test_dnsmos_in_one_window_is_that_of_the_package_in_many(wav):
    judge = judge_of("dnsmos")
    result, expected = scores(judge, wav, wav), judge.model(wav, RATE, False)
    for metric, key in (("dnsmos", "ovrl_mos"), ("dnsmos_sig", "sig_mos"), ("dnsmos_bak", "bak_mos")):
        assert result[metric] == pytest.approx(expected[key], abs=0.1)


def test_long_audio_is_judged_by_pesq_in_parts():
    judge = judge_of("pesq_wb")
    import pesq

    clean = speech_like(24 * RATE, RATE)
    noisy = clean.copy()
    noisy[: 9 * RATE] += 0.01 * np.random.default_rng(0).standard_normal(9 * RATE).astype(np.float32)
    halves = [pesq.pesq(RATE, *pair, "wb") for pair in zip(np.split(clean, 2), np.split(noisy, 2))]
    assert scores(judge, clean, noisy)["pesq_wb"] == pytest.approx(np.mean(halves), abs=1e-3)
    assert halves[0] < halves[1] - 0.5


# ---- audio without a score --------------------------------------------------------------------------------

def odd_pairs():
    wav = speech_like(RATE, RATE)
    silence, constant, broken = np.zeros_like(wav), np.full_like(wav, 0.3), wav.copy()
    broken[100] = np.nan
    return {"silent reference": (silence, wav), "silent output": (wav, silence), "both silent": (silence, silence),
            "constant output": (wav, constant), "loud": (wav, 9 * wav),
            "NaN in the output": (wav, broken), "NaN in the reference": (broken, wav), "empty": (wav[:0], wav[:0]),
            "0.01 s": (wav[:160], wav[:160]), "0.1 s": (wav[:1600], wav[:1600]), "0.3 s": (wav[:4800], wav[:4800])}  # fmt: skip


@pytest.mark.parametrize("name", odd_pairs())
def test_odd_audio_gives_numbers_or_reasons(judge, name):
    try:
        result = scores(judge, *odd_pairs()[name])
    except Undefined as error:
        assert str(error) and "\n" not in str(error)
        return
    assert "NaN in the output" != name and result.keys() >= set(judge.metrics)
    for value in result.values():
        assert value if isinstance(value, str) else math.isfinite(value)


@pytest.mark.parametrize("metric", ["pesq_wb", "stoi", "visqol", "speaker_similarity", "phoneme_error", "log_f0_rmse"])
def test_a_silent_reference_has_no_score(metric):
    judge = judge_of(metric)
    with pytest.raises(Undefined, match="uncoded audio is silent"):
        judge.prepare(np.zeros(RATE, np.float32), CLIP)


def test_levels_of_silence_say_why_they_are_undefined(wav):
    judge = judges.SignalJudge(RATE)
    result = scores(judge, np.zeros_like(wav), wav)
    assert result["snr_db"] == result["amplitude_ratio"] == "the uncoded audio is silent" and result["mel_db"] > 1
    result = scores(judge, wav, np.zeros_like(wav))
    assert (result["snr_db"], result["amplitude_ratio"], result["si_sdr_db"]) == (0, 0, "one side is silent")


# ---- words ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("Прядь волнистых вол+ос, за ухо.", "прядь волнистых волос за ухо"),
    ("+Ёж — не за́мок", "еж не замок"),
    ("It's  7,5 %\n(l’école)!", "its 7 5 lécole"),
    ("2+2 C++", "2 2 c"),
    ("ﬁn ①", "fin 1"),
    ("తెలుగు, भाषा।", "తెలుగు भाषा"),  # vowel signs are marks, not punctuation
    ("E\u0301te\u0301", "été"),
    ("...", ""),
])  # fmt: skip
def test_text_is_compared_without_punctuation_case_and_stress(text, expected):
    assert judges.normalise_text(text) == expected
    assert judges.normalise_text(expected) == expected


def levenshtein(a, b):
    @functools.cache
    def distance(i, j):
        if 0 in (i, j):
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return distance(len(a), len(b))


def test_edit_distance_is_the_textbook_recursion():
    rng = np.random.default_rng(0)
    pairs = [["".join(rng.choice(list("abc"), rng.integers(0, 15))) for _ in range(2)] for _ in range(60)]
    assert all(judges.edit_distance(a, b) == levenshtein(a, b) for a, b in pairs)
    assert judges.edit_distance("kitten", "sitting") == 3 and judges.edit_distance(["a", "b"], ["b"]) == 1
    by_place = [sum(x != y for x, y in zip(a, b)) + abs(len(a) - len(b)) for a, b in pairs]  # known wrong
    assert any(wrong != levenshtein(a, b) for wrong, (a, b) in zip(by_place, pairs))


def test_rates_come_with_counts_that_pool_over_files():
    long = judges.error_rates("a b c d e f g h", "a b c d e f g h", "", "")
    short = judges.error_rates("ja", "nein so", "", "")
    assert (short["wer"], short["word_errors"], short["words"]) == (2, 2, 1)
    assert (short["chars"], short["char_errors"]) == (2, 7) and long["chars"] == 15  # spaces count
    errors, count = POOLED["wer"]
    pooled = (long[errors] + short[errors]) / (long[count] + short[count])
    assert pooled == pytest.approx(2 / 9) and (long["wer"] + short["wer"]) / 2 == 1  # the mean of rates is no rate
    assert judges.error_rates("", "ja", "_uncoded", "why") == {"wer_uncoded": "why", "cer_uncoded": "why"}


class SmallFakeWhisper:
    """Stands for faster-whisper's model: hears three words at a peak of 0.3, fewer below, in the language it is told."""

    supported_languages = ["ru", "es"]

    def __init__(self, folder, device, compute_type, cpu_threads):
        assert (device, cpu_threads) == ("cpu", 1)
        self.languages = []

    def transcribe(self, wav, language, beam_size, temperature, condition_on_previous_text, max_new_tokens):
        quiet, wav = np.r_[wav[:8000], wav[-8000:]], wav[8000:-8000]  # half a second on both sides
        assert not quiet.any() and max_new_tokens == min(round(20 + 60 * len(wav) / 16000), 430)  # its window of 30 s holds 448
        assert wav.dtype == np.float32 and (temperature, condition_on_previous_text) == (0.0, False)
        self.languages.append(language)
        words = " Ёж бежит, быстро".split(" ")[1 : 1 + round(3 * min(1, np.abs(wav).max() / 0.3))]
        return iter([SimpleNamespace(text=f" {word}") for word in words]), SimpleNamespace(language=language or "es")


@pytest.fixture
def whisper(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=SmallFakeWhisper))
    return judges.WhisperJudge("folder")


def test_what_is_heard_is_compared_with_the_text_and_with_the_uncoded_audio(whisper):
    wav = tone(150) * np.float32(0.3 / np.abs(tone(150)).max())
    same, quiet = scores(whisper, wav, wav), scores(whisper, wav, wav / 3)
    assert (same["wer"], same["wer_uncoded"], same["cer_uncoded"]) == (1 / 2, 0, 0)  # "быстро" is not in the text
    assert (quiet["wer"], quiet["word_errors"], quiet["words"]) == (1 / 2, 1, 2)
    assert (quiet["wer_uncoded"], quiet["word_errors_uncoded"], quiet["words_uncoded"]) == (2 / 3, 2, 3)
    assert quiet["cer"] == pytest.approx(6 / 8) and quiet["cer_uncoded"] == pytest.approx(13 / 15)
    assert scores(whisper, wav, 0 * wav)["wer"] == 1


@pytest.mark.parametrize(("heard", "kept"), [
    ("un agro a la izquierda y " * 9 + "un agro", "un agro a la izquierda y un agro"),
    ("означает и" + 50 * " истинный", "означает и истинный"),
    ("no no no sí", "no no no sí"),  # people do say things three times
    ("la las las las las letra", "la las letra"),
    ("a ab a ab a ab ab", "a ab a ab a ab ab"),
    ("తెలుగు " * 6 + "నా", "తెలుగు నా"),
    ("క క క కా", "క క క కా"),  # the last is another word
    ("", ""),
])  # fmt: skip
def test_what_whisper_repeats_without_end_counts_once(whisper, heard, kept):
    assert judges.said_once(heard.strip()) == kept
    whisper.model.transcribe = lambda wav, **options: (iter([SimpleNamespace(text=heard)]), SimpleNamespace(language="es"))
    assert whisper.prepare(tone(150), CLIP).heard == kept


def test_the_language_is_the_clips_else_the_one_of_the_uncoded_audio(whisper):
    for language in ("ru", "te", None):
        whisper.judge(whisper.prepare(tone(150), Clip("a", None, language)), tone(150))
    assert whisper.model.languages == ["ru", "ru", None, "es", None, "es"]


def test_without_a_text_or_a_word_the_rates_say_why(whisper):
    result = whisper.judge(whisper.prepare(tone(150), Clip("a", " ... ", "ru")), tone(150))
    assert result["wer"] == result["cer"] == "the file has no text" and result["wer_uncoded"] == 0
    result = whisper.judge(whisper.prepare(tone(150) / 100, CLIP), 3 * tone(150))
    assert result["wer_uncoded"] == "Whisper hears nothing in the uncoded audio" and result["wer"] == 1 / 2


def test_a_folder_without_a_whisper_is_a_plain_error(tmp_path):
    if missing := judges.absent("wer", str(tmp_path)):
        pytest.skip(missing)
    with pytest.raises(ValueError, match=r"^--asr_model .*expected a Whisper in CTranslate2's format$"):
        judges.WhisperJudge(str(tmp_path))


def test_judges_leave_no_gradient_and_no_second_thread(wav):
    threads = torch.get_num_threads()
    for kind in LISTENERS:
        if not judges.absent(kind.metrics[0], None):
            build(kind)
    assert torch.get_num_threads() == threads == 1
