"""`codec features` with tiny models of transformers' own classes, saved to disk: values by hand, windows, resume, bad input."""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from codec import teachers
from codec.audio import load_audio
from codec.data import read_manifest
from codec.features import FeatureStore, feature_path, read_header
from codec.teachers import SpeechTeacher, TextTeacher, batches_by_length, receptive_field, token_spans

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)  # WavLM's: 320 and 400 samples
TEXTS = ["Le chat dort, là-bas!", "una casa grande", "the cat sat on the mat", "నేను వచ్చాను"]


def save_wavlm(folder: Path, norm: str) -> Path:
    torch.manual_seed(5)
    config = WavLMConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=[8] * 7, conv_kernel=KERNELS,
        conv_stride=STRIDES, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, num_buckets=16, max_bucket_distance=32,
        feat_extract_norm=norm, do_stable_layer_norm=norm == "layer", conv_bias=True, initializer_range=0.5,
    )  # fmt: skip
    WavLMModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=norm == "layer").save_pretrained(folder)
    return folder


def save_qwen(folder: Path, max_tokens: int = 64) -> Path:
    torch.manual_seed(6)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:3], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    config = Qwen2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16, vocab_size=300,
        max_position_embeddings=max_tokens, initializer_range=0.5,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wavlm")
    return {norm: save_wavlm(folder / norm, norm) for norm in ("layer", "group")}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    return save_qwen(tmp_path_factory.mktemp("llm") / "qwen")


@pytest.fixture
def speech(tmp_path) -> Path:
    """Four utterances at 24 kHz, one in a folder of its own, and words for each."""
    rng = np.random.default_rng(3)
    lines, words = [], []
    for i, text in enumerate(TEXTS):
        name, n_samples = f"{'fr/' if i == 0 else ''}{i}.wav", 12000 + 3001 * i
        (tmp_path / name).parent.mkdir(exist_ok=True)
        sf.write(tmp_path / name, 0.1 * rng.standard_normal(n_samples), 24000, subtype="PCM_16")
        split = ("train", "val")[i % 2]
        lines.append({"path": name, "speaker": "s", "split": split, "sample_rate": 24000, "n_samples": n_samples})
        spoken = text.split()
        edges = np.linspace(0.05, n_samples / 24000 - 0.02, len(spoken) + 1)
        timed = [{"word": w, "start": a, "end": b} for w, a, b in zip(spoken, edges[:-1], edges[1:])]
        words.append({"path": name, "text": text, "words": timed})
    write_lines(tmp_path / "words.jsonl", words)
    return write_lines(tmp_path / "manifest.jsonl", lines)


def write_lines(path: Path, entries: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def features(*arguments: str | Path) -> None:
    """As the command line does it."""
    parser = argparse.ArgumentParser()
    teachers.add_command(parser.add_subparsers())
    options = parser.parse_args(["features", *map(str, arguments)])
    options.run(options)


def noise(n_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n_samples).astype(np.float32)


def by_hand(folder: Path, wav: np.ndarray) -> tuple[torch.Tensor, ...]:
    """All hidden states of one utterance, [N, D] each."""
    wav = (wav - wav.mean()) / np.sqrt(wav.var() + 1e-7)
    with torch.inference_mode():
        states = WavLMModel.from_pretrained(folder).eval()(torch.from_numpy(wav)[None], output_hidden_states=True)
    return tuple(state[0] for state in (*states.hidden_states[:-1], states.last_hidden_state))


# ---- speech -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("layer", [None, "1", "mean"])
def test_wavlm_features_are_the_models_own(tmp_path, speech, wavlm, norm, layer, capsys):
    out = tmp_path / "out"
    features(speech, out, "--speech", wavlm[norm], *([] if layer is None else ["--layer", layer]))
    store = FeatureStore(out)
    assert (store.kind, store.dim, store.frame_s, store.first_centre_s) == ("frames", 16, 0.02, 0.0125)
    for entry in read_lines(speech):
        wav = load_audio(tmp_path / entry["path"], 16000)[0].numpy()
        states = by_hand(wavlm[norm], wav)
        expected = {None: states[-1], "1": states[1], "mean": torch.stack(states).mean(0)}[layer]
        got = load_file(feature_path(out, entry["path"]))["features"]
        assert got.dtype == torch.float16 and len(got) == (len(wav) - 400) // 320 + 1
        torch.testing.assert_close(got.float(), expected, atol=4e-3, rtol=4e-3)
    line = capsys.readouterr().out
    assert "4 utterances, 0.00 h, dim 16, 4" in line and line.endswith(f"constant loss {store.constant_loss:.3f}, 0 skipped\n")
    utterances, rate = teachers._read_utterances(speech)
    assert store.check(utterances, rate) == 0 and not (out / "building.json").exists()


def test_a_batch_equals_its_parts_and_padding_would_change_group_norm(wavlm):
    wavs = [noise(n, seed=n) for n in (16000, 9000, 12345, 4001)]
    for norm in ("layer", "group"):
        teacher = SpeechTeacher(str(wavlm[norm]), -1, "cpu", 100.0, 16000)
        alone = [teacher.compute([wav])[0] for wav in wavs]
        for together, one in zip(teacher.compute(wavs), alone):
            torch.testing.assert_close(together, one, atol=1e-3, rtol=1e-3)
    teacher.batch_s = 100.0  # the wrong version: group norm, padded
    assert (teacher.compute(wavs)[3] - alone[3]).abs().max() > 0.05


@pytest.mark.parametrize("n_samples", [4 * 16000 + 1, 6 * 16000 + 7777])
def test_long_audio_in_windows_has_the_frames_of_one_pass(wavlm, monkeypatch, n_samples):
    wav = noise(n_samples)
    teacher = SpeechTeacher(str(wavlm["layer"]), 0, "cpu", 4.0, 16000)  # hidden state 0 sees eight frames
    whole = teacher.compute([wav])[0]
    monkeypatch.setattr(teachers, "WINDOW_S", 3)
    monkeypatch.setattr(teachers, "CONTEXT_S", 1)
    assert max(w.end - 320 * w.origin for w in teacher._windows(0, n_samples)) <= 3 * 16000
    cut, short = teacher.compute([wav, wav[:5000]])
    torch.testing.assert_close(cut, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(short, teacher.compute([wav[:5000]])[0], atol=1e-4, rtol=1e-4)
    parts = teacher.compute([wav[: 100 * 320 + 80], wav[100 * 320 :]])  # the wrong version: no context
    assert (torch.cat(parts) - whole).abs().max() > 0.1


@pytest.mark.parametrize("kernels, strides", [(KERNELS, STRIDES), ((10, 3, 2), (5, 2, 2)), ((7,), (3,))])
def test_a_click_moves_the_frames_that_are_centred_around_it(kernels, strides):
    stride, field = receptive_field(kernels, strides)
    convolutions = [torch.nn.Conv1d(1, 1, kernel, step, bias=False) for kernel, step in zip(kernels, strides)]
    for convolution in convolutions:
        torch.nn.init.ones_(convolution.weight)
    wav = torch.zeros(1, 1, 8 * field)
    wav[..., 4 * field] = 1.0
    touched = torch.nn.Sequential(*convolutions)(wav)[0, 0].nonzero().flatten()
    centres = touched * stride + field / 2
    assert (centres[0] + centres[-1] - 2 * (4 * field + 0.5)).abs() <= stride  # around the middle of the click
    assert len(touched) in (math.ceil(field / stride), field // stride)
    if kernels == KERNELS:
        assert (stride, field) == (320, 400)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> Path:
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("whisper")
    config = WhisperConfig(
        d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1,
        encoder_ffn_dim=8, decoder_ffn_dim=8, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, init_std=0.5,
    )  # fmt: skip
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def test_whisper_frames_are_those_inside_the_audio_and_the_last_is_normalised(tmp_path, speech, whisper):
    features(speech, tmp_path / "out", "--speech", whisper)
    store = FeatureStore(tmp_path / "out")
    assert (store.frame_s, store.first_centre_s) == (0.02, 0.0)
    wav = load_audio(tmp_path / "1.wav", 16000)[0].numpy()
    mel = WhisperFeatureExtractor()(wav, sampling_rate=16000, return_tensors="pt")["input_features"]
    with torch.inference_mode():
        expected = WhisperModel.from_pretrained(whisper).get_encoder()(mel).last_hidden_state[0, : math.ceil(len(wav) / 320)]
    got = load_file(feature_path(tmp_path / "out", "1.wav"))["features"].float()
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
    assert store.check(*teachers._read_utterances(speech)) == 0


def test_a_click_is_in_the_middle_of_the_whisper_frames_that_hear_it(whisper):
    teacher = SpeechTeacher(str(whisper), 0, "cpu", 60.0, 16000)
    wavs = [1e-4 * noise(32000), 1e-4 * noise(32000)]
    for wav, frame in zip(wavs, (20, 70)):
        wav[frame * 320] = 1.0  # frame j is centred at 0.02 j s
    a, b = teacher.compute(wavs)
    moved = ((a - b).abs().amax(1) > 1e-3).nonzero().flatten().tolist()
    assert {18, 19, 20, 21, 22} >= {frame for frame in moved if frame < 45} >= {19, 20, 21}
    energy = (a - b).square().sum(1)[:45]
    assert (energy * torch.arange(45)).sum() / energy.sum() == pytest.approx(20, abs=0.5)


def test_whisper_in_windows_keeps_every_frame(whisper):
    teacher = SpeechTeacher(str(whisper), 0, "cpu", 30.0, 16000)
    n_samples = 31 * 16000 + 5
    wav = 0.1 * noise(n_samples)
    rows = teacher.compute([wav])[0]
    assert len(rows) == math.ceil(n_samples / 320)
    last = teacher.compute([wav[24 * 16000 :]])[0]  # where the second window starts: 1500 - 2 x 100 frames less context
    torch.testing.assert_close(rows[1300:], last[100:])


# ---- text -------------------------------------------------------------------------------------------------

def test_qwen_features_are_the_models_own_at_the_times_of_the_words(tmp_path, speech, qwen):
    out = tmp_path / "out"
    features(speech, out, "--text", qwen, "--words", tmp_path / "words.jsonl")
    model = Qwen2ForCausalLM.from_pretrained(qwen).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(qwen)
    for entry in read_lines(tmp_path / "words.jsonl"):
        ids = tokenizer(entry["text"], return_tensors="pt")["input_ids"]
        with torch.inference_mode():  # no word stands first: what does draws attention, and says nothing of itself
            first = torch.tensor([[tokenizer.eos_token_id]])
            states = model(torch.cat([first, ids], 1), output_hidden_states=True).hidden_states[-2][0, 1:]
            wrong = model(ids, output_hidden_states=True).hidden_states[-2][0]
        got = load_file(feature_path(out, entry["path"]))
        words = {i: word for i, word in enumerate(entry["words"])}
        pieces, owners, character = [tokenizer.decode([i]) for i in ids[0]], [], 0
        if "�" in "".join(pieces):  # a Telugu character takes several tokens: those all have its span
            assert (got["spans"][1:, 0] >= got["spans"][:-1, 0]).all() and len(got["spans"]) > len(entry["text"])
            continue
        for piece in pieces:  # token to word, by counting the spaces before its first letter
            first_letter = next((j for j, letter in enumerate(piece) if letter.isalnum()), None)
            owners.append(None if first_letter is None else entry["text"][: character + first_letter].count(" "))
            character += len(piece)
        kept = [i for i, owner in enumerate(owners) if owner is not None]
        assert len(kept) == len(got["features"]) and len(words) == len({owners[i] for i in kept})
        torch.testing.assert_close(got["features"].float(), states[kept], atol=4e-3, rtol=4e-3)
        assert not torch.allclose(got["features"].float(), wrong[kept], atol=4e-2)
        for (start_s, end_s), i in zip(got["spans"].tolist(), kept):
            word = words[owners[i]]
            assert word["start"] - 1e-6 <= start_s < end_s <= word["end"] + 1e-6
    utterances, rate = teachers._read_utterances(speech)
    store = FeatureStore(out)
    assert (store.kind, store.dim, store.check(utterances, rate)) == ("tokens", 16, 0)
    assert store.targets(utterances[0], 0, 6, 1920, rate).mask.tolist() == [0.0] + [1.0] * 5  # 40 ms: before the first word


def test_tokens_span_their_characters_and_special_ones_are_left_out():
    character_s = np.array([[0.0, 0.1], [0.1, 0.2], [np.nan, np.nan], [0.5, 0.7]])
    kept, spans = token_spans([(0, 0), (0, 2), (2, 3), (2, 4), (0, 0)], character_s)
    assert kept == [1, 3] and spans == [(0.0, 0.2), (0.5, 0.7)]


def test_text_longer_than_the_model_takes_goes_in_windows_of_which_half_is_context(tmp_path):
    teacher = TextTeacher(str(save_qwen(tmp_path / "short", max_tokens=8)), -2, "cpu", {}, 24000)
    ids = torch.arange(30) + 5
    rows = teacher._long(ids)
    assert len(rows) == 30
    torch.testing.assert_close(rows[:8], teacher._encode([ids[:8]])[0])
    torch.testing.assert_close(rows[8:12], teacher._encode([ids[4:12]])[0][4:])
    torch.testing.assert_close(rows[28:], teacher._encode([ids[24:]])[0][4:])
    torch.testing.assert_close(teacher._long(ids[:5]), teacher._encode([ids[:5]])[0])


def test_texts_in_a_batch_equal_texts_alone(qwen):
    teacher = TextTeacher(str(qwen), "mean", "cpu", {}, 24000)
    rows = [torch.arange(n) + n for n in (3, 17, 9)]
    for together, ids in zip(teacher._encode(rows), rows):
        torch.testing.assert_close(together[: len(ids)], teacher._encode([ids])[0], atol=1e-4, rtol=1e-4)


# ---- runs -------------------------------------------------------------------------------------------------

def test_batches_stay_within_the_budget_of_padded_seconds():
    lengths = [3.0, 1.0, 50.0, 2.0, 2.0]
    assert batches_by_length(lengths, 7.0) == [[1, 3, 4], [0], [2]]
    assert batches_by_length(lengths, 0.0) == [[1], [3], [4], [0], [2]]
    assert batches_by_length([], 7.0) == []


def test_an_interrupted_run_goes_on_and_shards_add_up(tmp_path, speech, wavlm, monkeypatch):
    out = tmp_path / "out"
    write = SpeechTeacher.write

    def fail_at_the_third(self, utterance, folder, rows):
        if len(list(out.rglob("*.safetensors"))) == 2:
            raise KeyboardInterrupt
        write(self, utterance, folder, rows)

    monkeypatch.setattr(SpeechTeacher, "write", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        features(speech, out, "--speech", wavlm["layer"])
    monkeypatch.setattr(SpeechTeacher, "write", write)
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert len(kept) == 2 and not (out / "teacher.json").exists()
    with pytest.raises(ValueError, match="holds features of .*'layer': -1.*expected .*'layer': 1.*name another folder"):
        features(speech, out, "--speech", wavlm["layer"], "--layer", "1")
    features(speech, out, "--speech", wavlm["layer"], "--shard", "1/2")
    assert not (out / "teacher.json").exists()
    features(speech, out, "--speech", wavlm["layer"], "--shard", "2/2")
    features(speech, out, "--speech", wavlm["layer"])
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert FeatureStore(out).check(*teachers._read_utterances(speech)) == 0
    with pytest.raises(ValueError, match="'teacher': 'layer'.*'teacher': 'group'"):  # the names of the folders
        features(speech, out, "--speech", wavlm["group"])


def test_newer_words_make_new_features(tmp_path, speech, qwen):
    out, words = tmp_path / "out", tmp_path / "words.jsonl"
    arguments = (speech, out, "--text", qwen, "--words", words)
    features(*arguments)
    path = feature_path(out, "1.wav")
    before, written = load_file(path)["spans"], path.stat().st_mtime_ns
    features(*arguments)
    assert path.stat().st_mtime_ns == written
    entries = read_lines(words)
    entries[1]["words"][0]["start"] = 0.08
    write_lines(words, entries)
    os.utime(words, ns=(written + 10**9, written + 10**9))
    features(*arguments)
    assert load_file(path)["spans"][0, 0] == pytest.approx(0.08) != before[0, 0]


def test_a_bad_utterance_is_skipped_with_a_line_and_tried_again(tmp_path, speech, wavlm, capsys):
    out, bad = tmp_path / "out", tmp_path / "2.wav"
    whole = bad.read_bytes()
    bad.write_bytes(b"not audio")
    features(speech, out, "--speech", wavlm["layer"])
    captured = capsys.readouterr()
    assert "codec features: skipped: " in captured.err and "2.wav" in captured.err and "1 skipped" in captured.out
    utterances, rate = teachers._read_utterances(speech)
    assert FeatureStore(out).check(utterances, rate) == 1
    assert "2.wav" in read_header(feature_path(out, "2.wav")).metadata["skipped"]
    bad.write_bytes(whole)
    features(speech, out, "--speech", wavlm["layer"])
    assert FeatureStore(out).check(utterances, rate) == 0


def test_audio_of_another_length_or_too_short_is_skipped(tmp_path, speech, wavlm, capsys):
    sf.write(tmp_path / "1.wav", np.zeros(9000), 24000)
    lines = read_lines(speech)
    sf.write(tmp_path / "2.wav", np.zeros(500), 24000)
    lines[2]["n_samples"] = 500
    features(write_lines(speech, lines), tmp_path / "out", "--speech", wavlm["layer"])
    errors = capsys.readouterr().err
    assert "1.wav: 0.375 s of audio, the manifest says 0.625 s" in errors
    assert "2.wav: 334 samples at 16000 Hz, the teacher needs 400" in errors


def test_words_that_do_not_fit_are_skipped_and_more_than_half_end_the_run(tmp_path, speech, qwen, capsys):
    words = tmp_path / "words.jsonl"
    entries = read_lines(words)
    entries[1]["words"][-1]["end"] = 99.0
    entries[2]["text"] = "etwas ganz anderes ohne Bezug"
    write_lines(words, entries)
    features(speech, tmp_path / "out", "--text", qwen, "--words", words)
    errors = capsys.readouterr().err
    assert "1.wav" in errors and "outside the audio" in errors and "2.wav: the transcript does not match its words" in errors
    utterances, rate = teachers._read_utterances(speech)
    assert FeatureStore(tmp_path / "out").check(utterances, rate) == 2
    write_lines(words, entries[:3])
    with pytest.raises(ValueError, match="3 of 4 utterances were skipped"):
        features(speech, tmp_path / "out2", "--text", qwen, "--words", words)
    assert "3.wav: no words" in capsys.readouterr().err and not (tmp_path / "out2" / "teacher.json").exists()


def test_what_the_user_gets_wrong_is_one_clear_line(tmp_path, speech, wavlm, qwen):
    out, words = tmp_path / "out", tmp_path / "words.jsonl"
    for arguments, complaint in (
        (["--text", qwen], "--words: belongs to --text"),
        (["--speech", wavlm["layer"], "--words", words], "--words: belongs to --text"),
        (["--speech", tmp_path / "none"], "did not load it"),
        (["--speech", qwen], "model_type 'qwen2', expected WavLM, HuBERT, wav2vec 2.0 or Whisper"),
        (["--text", wavlm["layer"], "--words", words], "AutoTokenizer did not load it"),
        (["--speech", wavlm["layer"], "--layer", "3"], "--layer 3: .* has hidden states 0 to 2, or -3 to -1"),
        (["--text", qwen, "--words", words, "--layer", "-5"], "--layer -5: .* 0 to 3"),
        (["--speech", wavlm["layer"], "--device", "tpu9"], "--device tpu9: .*; try cpu"),
    ):
        with pytest.raises(ValueError, match=complaint) as error:
            features(speech, out, *arguments)
        assert "\n" not in str(error.value) and not out.exists()
    with pytest.raises(ValueError, match="no such manifest"):
        features(tmp_path / "none.jsonl", out, "--speech", wavlm["layer"])
    broken = tmp_path / "broken.jsonl"
    broken.write_text(speech.read_text().replace('"n_samples": 15001', ""))
    with pytest.raises(ValueError, match="broken.jsonl:2: not a JSON object"):
        features(broken, out, "--speech", wavlm["layer"])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no utterances"):
        features(tmp_path / "empty.jsonl", out, "--speech", wavlm["layer"])


@pytest.mark.parametrize("arguments", [["--shard", "0/2"], ["--shard", "2"], ["--layer", "last"], ["--text", "x"]])
def test_options_that_make_no_sense_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        features("m.jsonl", "out", "--speech", "teacher", *arguments)
    assert "expected" in capsys.readouterr().err or arguments[0] == "--text"


# ---- pitch ------------------------------------------------------------------------------------------------

def test_pitch_features_follow_a_known_pitch_every_10_ms_and_silence_is_unvoiced(tmp_path):
    half = np.arange(12000) / 24000
    wav = np.concatenate([sum(np.sin(2 * np.pi * 150 * k * half) / k for k in range(1, 8)) * 0.1, np.zeros(12001)])
    sf.write(tmp_path / "a.wav", wav, 24000, subtype="PCM_16")
    line = {"path": "a.wav", "speaker": "s", "split": "train", "sample_rate": 24000, "n_samples": len(wav)}
    features(write_lines(tmp_path / "manifest.jsonl", [line]), tmp_path / "out", "--pitch")
    rows = load_file(tmp_path / "out" / "a.safetensors")["features"].float().numpy()
    assert rows.shape == (101, 39)
    assert (rows[5:45, :-1].argmax(1) == round(12 * np.log2(150 / 60))).all() and (rows[5:45, -1] == 0).all()
    assert (rows[60:, -1] == 1).all() and not rows[60:, :-1].any()
    store = FeatureStore(tmp_path / "out")
    utterance = read_manifest(tmp_path / "manifest.jsonl", "train", 24000)[0]
    assert store.check([utterance], 24000) == 0
    values, mask = store.targets(utterance, 0, len(wav) // 480, 480, 24000)
    assert mask.all() and values[5:20, :-1].argmax(1).unique().tolist() == [16]
