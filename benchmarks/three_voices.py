"""Choose between codecs, or see what of an error costs what, on phrases of three voices that no training heard.

    python benchmarks/three_voices.py data/wide/speech/manifest.jsonl base runs/a runs/b     # whole
    python benchmarks/three_voices.py data/wide/speech/manifest.jsonl base --half --parts    # one part at a time

Codecs of 24 kHz: `base`, the package's own, or what `Codec.from_pretrained` takes. The voices are those that
`base_speech.py --wide` validates on: 50 Danish phrases, 30 of an Italian man, 30 of a Russian woman (`--half`: every other
one). Phonemes are compared with those heard in the uncoded phrases. `--parts` puts the original's magnitudes, or phases, or
levels of bands, in place of the output's: what would be won if the codec had no error there. Needs `make eval`.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codec.audio import read_segment, resample_array
from codec.data import read_manifest
from codec.judges import Clip, DistillMosJudge, PesqJudge, PhonemeJudge, SignalJudge, StoiJudge, Undefined
from codec.model import Codec
from codec.spectral import mel_filterbank

RATE = 24000
VOICES = {"da": 50, "as_it_IT_m_Carlo": 30, "as_ru_RU_f_IvrvoiceRU": 30}
SHOWN = {"pesq_wb": 2, "stoi": 3, "distillmos": 2, "snr_db": 1, "amplitude_ratio": 2, "phoneme_error": 3}  # digits
N_FFT, HOP = 512, 128
WINDOW = torch.hann_window(N_FFT)
LEVELS = ((20, 7), (40, 7), (20, 3), (40, 3), (40, 1))  # mel bands, spectra that are averaged
Codes = Callable[[Tensor], Tensor]  # wav [1, 1, T] to wav_hat [1, 1, T]


def read_phrases(manifest: Path, half: bool) -> list[tuple[str, np.ndarray]]:
    """(voice, samples) of phrases of 1 to 6 s, the same at every call."""
    utterances, phrases = read_manifest(manifest, "val", RATE), []
    for voice, n in VOICES.items():
        those = [u for u in utterances if u.speaker == voice and RATE < u.n_samples < 6 * RATE]
        if len(those) < n:
            raise ValueError(f"{manifest}: {len(those)} phrases of {voice}; expected {n} or more, made as base_speech.py says")
        picked = np.random.default_rng(7).permutation(len(those))[:n]
        phrases += [(voice, read_segment(those[i].path, 0, those[i].n_samples)) for i in picked]
    return phrases[::2] if half else phrases


class Jury:
    """The judges, and what they keep of every phrase."""

    def __init__(self, phrases: list[tuple[str, np.ndarray]]):
        self.judges = [PesqJudge(), StoiJudge(), DistillMosJudge(), SignalJudge(16000), PhonemeJudge()]
        self.cases, clip = [], Clip("", None, None)
        for voice, samples in phrases:
            wav = resample_array(samples, RATE, 16000)
            kept = [judge.prepare(wav, clip) for judge in self.judges]
            self.cases.append((voice, torch.from_numpy(samples)[None, None], len(wav), kept))

    @torch.no_grad()
    def hear(self, codec: Codes) -> dict[str, dict[str, float]]:
        """Voice to means of all metrics, of `codec` on wavs [1, 1, T]; phoneme errors are of all its phrases together."""
        answers = defaultdict(lambda: defaultdict(list))
        for voice, wav, length, kept in self.cases:
            output = np.ascontiguousarray(resample_array(codec(wav)[0, 0].numpy(), RATE, 16000)[:length])
            for judge, known in zip(self.judges, kept, strict=True):
                try:
                    answer = judge.judge(known, output)
                except Undefined:
                    continue
                for metric, value in answer.items():
                    if not isinstance(value, str):
                        answers[voice][metric].append(value)
        return {voice: {metric: statistics.fmean(values) for metric, values in of_voice.items()}
                | {"phoneme_error": sum(of_voice["phoneme_errors"]) / sum(of_voice["phonemes"])}
                for voice, of_voice in answers.items()}  # fmt: skip


# ------------------------------------------------------------------------------ parts of the error


def spectrum(wav: Tensor) -> Tensor:
    """wav [1, 1, T] to complex [1, F, T']."""
    return torch.stft(wav[0], N_FFT, HOP, window=WINDOW, return_complex=True)


def sound(spectra: Tensor, length: int) -> Tensor:
    """Complex [1, F, T'] to wav [1, 1, length]."""
    return torch.istft(spectra, N_FFT, HOP, window=WINDOW, length=length)[None]


def parts_of(codec: Codec) -> Iterator[tuple[str, Codes]]:
    """The codec with one kind of error taken away, each with its name."""

    def coded(wav: Tensor) -> Tensor:
        return codec(wav).wav_hat

    def unquantized(wav: Tensor) -> Tensor:
        return codec.decoder(codec.encoder(codec._pad(wav)))[..., : wav.shape[-1]]

    def true_phases(wav: Tensor) -> Tensor:
        return sound(torch.polar(spectrum(coded(wav)).abs(), spectrum(wav).angle()), wav.shape[-1])

    def true_magnitudes(wav: Tensor) -> Tensor:
        return sound(torch.polar(spectrum(wav).abs(), spectrum(coded(wav)).angle()), wav.shape[-1])

    yield "nothing", coded
    yield "the codes: latents unquantized", unquantized
    yield "phases", true_phases
    yield "magnitudes", true_magnitudes
    for n_bands, n_spectra in LEVELS:
        filters = mel_filterbank(RATE, N_FFT, n_bands)  # [F, bands]
        shares = filters / filters.sum(1, keepdim=True).clamp(min=1e-9)
        touched = (filters.sum(1) > 0)[None, :, None]

        def power(spectra: Tensor, filters: Tensor = filters, n: int = n_spectra) -> Tensor:
            bands = filters.T @ spectra.abs().square()  # [1, bands, T']
            return F.avg_pool1d(bands, n, 1, n // 2, count_include_pad=False)

        def true_levels(wav: Tensor, power=power, shares: Tensor = shares, touched: Tensor = touched) -> Tensor:
            truth, output = spectrum(wav), spectrum(coded(wav))
            gains = ((power(truth) + 1e-7) / (power(output) + 1e-7)).sqrt().clamp(0.05, 20)
            return sound(torch.where(touched, output * (shares @ gains.log()).exp(), output), wav.shape[-1])

        ms = 1000 * (n_spectra * HOP) / RATE
        yield f"levels in {n_bands} bands of {'each spectrum' if n_spectra == 1 else f'{ms:.0f} ms'}", true_levels


# ------------------------------------------------------------------------------ the table


def row(name: str, voices: dict[str, dict[str, float]]) -> str:
    """Markdown: Danish / Italian / Russian in each cell."""
    cells = [" / ".join(f"{voice[key]:.{digits}f}" for voice in voices.values()) for key, digits in SHOWN.items()]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("codecs", nargs="+")
    parser.add_argument("--half", action="store_true", help="every other phrase")
    parser.add_argument("--parts", action="store_true", help="one kind of error at a time taken away")
    args = parser.parse_args()
    torch.set_num_threads(2)
    try:
        jury = Jury(read_phrases(args.manifest, args.half))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"| {'replaced by the original' if args.parts else 'codec'} | {' | '.join(SHOWN)} |")
    print("|---" * (len(SHOWN) + 1) + "|")
    for name in args.codecs:
        codec = (Codec.from_pretrained() if name == "base" else Codec.from_pretrained(name)).eval()
        systems = parts_of(codec) if args.parts else [(name, lambda wav, codec=codec: codec(wav).wav_hat)]
        for part, system in systems:
            print(row(part, jury.hear(system)), flush=True)


if __name__ == "__main__":
    main()
