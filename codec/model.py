"""The codec: pads, encodes, quantizes, decodes, trims. It does not train."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.card import model_card, n_weights
from codec.checkpoint import inference_tensors, load_into
from codec.config import ModelConfig
from codec.decoder import build_decoder
from codec.encoder import build_encoder
from codec.layers import remove_weight_norm
from codec.metrics import peak, speech_level_db
from codec.pretrained import BASE, read_model, resolve, with_weight_norm, write_pretrained
from codec.rvq import QuantizerOutput, build_quantizer

MOST_GAIN_DB, PEAK_DB = 40.0, -1.0


class CodecOutput(NamedTuple):
    wav_hat: Tensor  # [B, 1, T]
    z: Tensor  # [B, D, T'], before quantization
    quantized: QuantizerOutput


class Codec(nn.Module):
    """wav [B, 1, T] -> encoder -> z [B, D, T'] -> residual VQ -> codes [B, N, T'] -> decoder -> wav_hat [B, 1, T]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config.encoder, config.latent_dim, config.sample_rate)
        causal = config.encoder.type == "conv" and config.encoder.causal
        self.quantizer = build_quantizer(config.quantizer, config.latent_dim, causal)
        self.decoder = build_decoder(config.decoder, config.latent_dim)
        self.sample_rate = config.sample_rate
        self.hop_length = config.encoder.hop_length
        self.n_codebooks = config.quantizer.n_codebooks
        self.codebook_size = config.quantizer.codebook_size

    @property
    def frame_rate_hz(self) -> float:
        return self.sample_rate / self.hop_length

    @property
    def bitrate_kbps(self) -> float:
        """With all codebooks, before entropy coding."""
        return self.frame_rate_hz * self.n_codebooks * math.log2(self.codebook_size) / 1000

    @property
    def receptive_field_samples(self) -> float:
        """Samples of input that one frame of codes can depend on; infinite for a model with an LSTM."""
        return self.encoder.receptive_field_samples + self.quantizer.reach_frames * self.hop_length

    @property
    def model_id(self) -> str:
        """16 hex digits of the codebooks' content: two models with the same id read each other's codes."""
        codebooks = self.quantizer.codebooks.detach().float().cpu().contiguous()
        head = f"{self.sample_rate}:{self.hop_length}:{tuple(codebooks.shape)}".encode()
        return hashlib.sha256(head + codebooks.numpy().tobytes()).hexdigest()[:16]

    @classmethod
    def from_pretrained(cls, path: str | Path = BASE, which: str = "latest") -> "Codec":
        """A trained codec for inference: eval mode, weight norm folded, averaged weights where the run kept them.

        Args:
            path: a run folder, one of its checkpoints, a pretrained folder, or an id on the Hugging Face hub; default: the
                model that comes with this package.
            which: "latest" or "best", where path is a run folder.
        Raises:
            ValueError: no codec there, or its tensors do not fit its config; one line.
        """
        folder = resolve(path, which)
        codec = cls(read_model(folder))
        load_into(codec, inference_tensors(folder), str(folder / "model.safetensors"))
        with torch.enable_grad():  # without grad mode the folded weights would become buffers
            remove_weight_norm(codec)
        return codec.eval().requires_grad_(False)

    def save_pretrained(self, path: str | Path, card: str | None = None) -> None:
        """Write a folder that `from_pretrained` reads here or, once uploaded, from the hub; training can go on from it.

        Args:
            path: a new folder, or an empty one.
            card: README.md of the folder; default: what the model is and how to use it, the rest left to fill in.
        Raises:
            ValueError: path holds something.
        """
        tensors = with_weight_norm(self.state_dict(), state_names(self.config))
        write_pretrained(path, self.config, tensors, card or model_card(self.config, n_weights(tensors)), {})

    def forward(self, wav: Tensor, n_codebooks: int | None = None) -> CodecOutput:
        """Code and decode. The quantizer runs in fp32 under autocast too.

        Args:
            wav: [B, 1, T], any T > 0; padded to whole frames, and the output trimmed to T.
            n_codebooks: use only the first so many; default all.
        """
        z = self.encoder(self._pad(wav))
        with torch.autocast(wav.device.type, enabled=False):
            quantized = self.quantizer(z.float(), n_codebooks)
        wav_hat = self.decoder(quantized.z_q)[..., : wav.shape[-1]]
        return CodecOutput(wav_hat.float(), z, quantized)

    def gain(self, wav: Tensor) -> Tensor:
        """What brings recordings wav [B, 1, T] to the level that the model was trained on [B, 1, 1], all ones without one.

        A model that has heard one level only codes others badly: encode `gain * wav`, divide what is decoded by it. The
        `codec` command and `evaluate_codec.py` do so. As in training data by `prepare_speaker_data.py`, no sample comes above
        `PEAK_DB`. One gain a recording, as in DAC's `compress` (Kumar et al. 2023): a stream's has to be known beforehand.
        """
        self._check(wav)
        if self.config.level_db is None:
            return wav.new_ones(len(wav), 1, 1)
        gain_db = self.config.level_db - speech_level_db(wav, self.sample_rate)
        gain_db = torch.minimum(gain_db, PEAK_DB - 20 * peak(wav).clamp(min=1e-9).log10())
        return (10 ** (gain_db.clamp(-MOST_GAIN_DB, MOST_GAIN_DB) / 20)).round(decimals=4).to(wav)[:, None, None]

    def encode(self, wav: Tensor, n_codebooks: int | None = None) -> Tensor:
        """wav [B, 1, T], all items of the same length, to codes [B, N, ceil(T / hop_length)]."""
        return self.quantizer.encode(self.encoder(self._pad(wav)).float(), n_codebooks)

    def decode(self, codes: Tensor, n_samples: int | None = None) -> Tensor:
        """codes [B, n, T'] to wav_hat [B, 1, T' x hop_length], trimmed to n_samples where given."""
        return self.decoder(self.quantizer.decode(codes))[..., :n_samples]

    def encode_long(self, wav: Tensor, n_codebooks: int | None = None, chunk_frames: int = 1000) -> Tensor:
        """`encode` in chunks with as much context as a frame can see, so the codes are the same.

        Memory does not grow with the length, but for the frames that an LSTM or a transformer takes: those are held whole.
        """
        wav, hop, more = self._pad(wav), self.hop_length, math.ceil(self.quantizer.reach_frames)
        context = math.ceil(self.encoder.reach_samples / hop) + 1
        if not len(self.encoder.tail):
            return in_chunks(lambda x: self.encode(x, n_codebooks), wav, hop, 1, chunk_frames, context + more)
        hop //= self.config.encoder.latent_stride
        frames = in_chunks(self.encoder.local, wav, hop, 1, chunk_frames, math.ceil(self.encoder.reach_samples / hop) + 1)
        z = self.encoder.tail(frames).float()
        return in_chunks(lambda x: self.quantizer.encode(x, n_codebooks), z, 1, 1, chunk_frames, more)

    def decode_long(self, codes: Tensor, n_samples: int | None = None, chunk_frames: int = 1000) -> Tensor:
        """`decode` in chunks, likewise."""
        hop, context = self.hop_length, math.ceil(self.decoder.reach_frames) + 1
        if not len(self.decoder.head):
            return in_chunks(self.decode, codes, 1, hop, chunk_frames, context)[..., :n_samples]
        hop //= self.config.decoder.latent_stride
        frames = self.decoder.head(self.quantizer.decode(codes))
        return in_chunks(self.decoder.local, frames, 1, hop, chunk_frames, context)[..., :n_samples]

    def _check(self, wav: Tensor) -> None:
        if wav.ndim != 3 or wav.shape[1] != 1 or wav.shape[2] == 0:
            raise ValueError(f"codec input has shape {list(wav.shape)}, expected [B, 1, T] with T > 0; mix to mono first")

    def _pad(self, wav: Tensor) -> Tensor:
        self._check(wav)
        return F.pad(wav, (0, -wav.shape[-1] % self.hop_length)) if self.config.pad_input else wav


def state_names(config: ModelConfig) -> dict[str, torch.Size]:
    """Names and shapes of a codec's tensors as it is trained; builds it without memory."""
    with torch.device("meta"):
        return {name: value.shape for name, value in Codec(config).state_dict().items()}


def in_chunks(
    function: Callable[[Tensor], Tensor], x: Tensor, size_in: int, size_out: int, chunk_frames: int, context: int
) -> Tensor:
    """`function(x)`, where a frame is `size_in` steps of x and `size_out` of the result and sees `context` frames aside."""
    pieces, n_frames = [], math.ceil(x.shape[-1] / size_in)
    for start in range(0, n_frames, chunk_frames):
        first, end = max(start - context, 0), min(start + chunk_frames, n_frames)
        y = function(x[..., first * size_in : (end + context) * size_in])
        pieces.append(y[..., (start - first) * size_out : (end - first) * size_out])
    return torch.cat(pieces, -1)
