"""A training loss on what a frozen speech recogniser hears: hidden states of Whisper's encoder (`whisper`)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.spectral import stft
from codec.teachers import load_pretrained


class WhisperLoss(nn.Module):
    """L1 distance of hidden states, in units of each channel's spread over the frames of the batch, mean over layers.

    Spectra count a lost consonant as the few quiet frames that it is; a recogniser as another word. It says nothing of what
    a recogniser does not need, so it goes beside spectra and adversary, at about their gradient.

    The items of a batch are put one after the other, as many as fit into the 30 s that Whisper takes, and the encoder runs on
    so much alone: 6 s are a fifth of the frames of one padded window. Its log mel spectra are computed at the codec's own
    rate, with windows and hops of the same duration, so that their bins are the same frequencies and nothing is resampled.

    A codec trained with it is no longer judged by that Whisper: `evaluate_codec.py --asr_model` should name another.

    Args:
        source: folder or hub id of a Whisper, with its preprocessor_config.json.
        layers: hidden states that are compared; 0 is the input of the first layer, the last is after the final norm.
        sample_rate: Hz of the codec.
        bf16: run the encoder under bf16 autocast.

    Raises:
        ValueError: no such model, not a Whisper, or without these layers; one line.

    Source: Radford et al. 2023 (Whisper); frozen speech encoders as losses: Hsieh et al. 2021, "Improving perceptual quality
        by phone-fortified perceptual loss"; of a codec: Parker et al. 2024, "Scaling transformers for low-bitrate high-quality
        speech coding".
    """

    def __init__(self, source: str, layers: tuple[int, ...], sample_rate: int, bf16: bool = False):
        super().__init__()
        from transformers import AutoFeatureExtractor, AutoModel  # takes seconds

        try:
            model = load_pretrained(AutoModel, source, dtype=torch.float32)
            extractor = load_pretrained(AutoFeatureExtractor, source)
        except ValueError as error:
            raise ValueError(f"losses.whisper_model={source} cannot be loaded; benchmarks/distillation/teachers.py makes one, "
                             f"loss_weights.whisper=0 does without ({error})") from None  # fmt: skip
        if model.config.model_type != "whisper":
            raise ValueError(f"losses.whisper_model={source}: a model of type {model.config.model_type!r}, expected whisper")
        n_layers = model.config.encoder_layers
        if not layers or any(not 0 <= layer <= n_layers for layer in layers):
            raise ValueError(f"losses.whisper_layers={[*layers]}, expected some of 0 to {n_layers}, the states of {source}")
        self.layers, self.bf16 = layers, bf16
        self.encoder = model.get_encoder().eval().requires_grad_(False)
        self.most = self.encoder.config.max_source_positions
        window = round(sample_rate * extractor.n_fft / extractor.sampling_rate)
        self.hop = round(sample_rate * extractor.hop_length / extractor.sampling_rate)
        # in the units of theirs: a longer window of the same duration sums up more samples
        self.register_buffer("window", torch.hann_window(window) * extractor.n_fft / window)
        self.register_buffer("filters", torch.tensor(extractor.mel_filters, dtype=torch.float32))  # [F, n_mels]
        self.register_buffer("positions", self.encoder.embed_positions.weight.clone())

    def forward(self, wav: Tensor, wav_hat: Tensor) -> Tensor:
        """Distance of wav_hat [B, 1, T], which receives gradient, from wav [B, 1, T]; of each item at most the first 30 s."""
        with torch.no_grad():
            mel = self.log_mel(wav)
            top = mel.amax()  # Whisper takes 80 dB below the loudest of a recording, here of the batch
            targets = self.states(mel, top)
        distances = []
        for target, state in zip(targets, self.states(self.log_mel(wav_hat), top), strict=True):
            distances.append(((state - target).abs() / target.flatten(0, 1).std(0).clamp(min=1e-3)).mean())
        return torch.stack(distances).mean()

    def log_mel(self, wav: Tensor) -> Tensor:
        """wav [B, 1, T] to the logarithm (base 10) of mel power [B, n_mels, T'], T' even."""
        power = torch.view_as_real(stft(wav.squeeze(1), self.window, self.hop, center=True)).square().sum(-1)
        n_bins, n_frames = self.filters.shape[0], wav.shape[-1] // self.hop // 2 * 2
        power = F.pad(power[:, :n_frames, :n_bins], (0, max(n_bins - power.shape[-1], 0)))  # a codec of less than 16 kHz
        return (power @ self.filters).clamp(min=1e-10).log10().transpose(1, 2)

    def states(self, mel: Tensor, top: Tensor) -> list[Tensor]:
        """Of log mel [B, n_mels, T']: for each layer [rows, frames of a row, D]."""
        mel = ((mel.maximum(top - 8) + 4) / 4)[..., : 2 * self.most]
        n_items, n_each = len(mel), mel.shape[-1] // 2
        rows = next(n for n in range(1, n_items + 1) if n_items % n == 0 and n_items // n * n_each <= self.most)
        mel = mel.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2)  # [rows, n_mels, T' of the items of a row]
        n = mel.shape[-1] // 2
        self.encoder.config.max_source_positions = n  # or it asks for 30 s
        self.encoder.embed_positions = nn.Embedding.from_pretrained(self.positions[:n])
        with torch.autocast(mel.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.encoder(mel, output_hidden_states=True)
        states = (*out.hidden_states[:-1], out.last_hidden_state)  # of these the last is after the norm for certain
        return [states[layer].float() for layer in self.layers]
