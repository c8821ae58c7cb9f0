"""The codec: pads, encodes, quantizes, decodes, trims. It does not train."""

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codec.checkpoint import find_checkpoint, load_into, load_tensors
from codec.config import ModelConfig, parse_config
from codec.decoder import build_decoder
from codec.encoder import build_encoder
from codec.layers import remove_weight_norm
from codec.rvq import QuantizerOutput, build_quantizer


class CodecOutput(NamedTuple):
    wav_hat: Tensor  # [B, 1, T]
    z: Tensor  # [B, D, T'], before quantization
    quantized: QuantizerOutput


class Codec(nn.Module):
    """wav [B, 1, T] -> encoder -> z [B, D, T'] -> residual VQ -> codes [B, N, T'] -> decoder -> wav_hat [B, 1, T]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config.encoder, config.latent_dim)
        self.quantizer = build_quantizer(config.quantizer, config.latent_dim)
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
    def receptive_field_samples(self) -> int:
        """Samples of input that one frame of codes can depend on."""
        return int(self.encoder.reach_samples) + 1

    @property
    def model_id(self) -> str:
        """16 hex digits of the codebooks' content: two models with the same id read each other's codes."""
        codebooks = self.quantizer.codebooks.detach().float().cpu().contiguous()
        head = f"{self.sample_rate}:{self.hop_length}:{tuple(codebooks.shape)}".encode()
        return hashlib.sha256(head + codebooks.numpy().tobytes()).hexdigest()[:16]

    @classmethod
    def from_pretrained(cls, path: str | Path, which: str = "latest") -> "Codec":
        """A trained codec for inference: eval mode, weight norm folded.

        Args:
            path: a run folder, or one of its checkpoints.
            which: "latest" or "best", where path is a run folder.
        Raises:
            ValueError: no checkpoint there, or its tensors do not fit its config; one line.
        """
        folder = find_checkpoint(path, which)
        config_path = folder / "config.yaml"
        if not config_path.is_file():
            raise ValueError(f"{config_path}: missing, expected beside model.safetensors; copy the run's config there")
        codec = cls(parse_config(config_path.read_text(), str(config_path)).model)
        weights = folder / "model.safetensors"
        load_into(codec, load_tensors(weights), str(weights))
        with torch.enable_grad():  # without grad mode the folded weights would become buffers
            remove_weight_norm(codec)
        return codec.eval().requires_grad_(False)

    def forward(self, wav: Tensor, n_codebooks: int | None = None) -> CodecOutput:
        """Code and decode. The quantizer runs in fp32 under autocast too.

        Args:
            wav: [B, 1, T], any T > 0; padded with zeros to whole frames, and the output trimmed to T.
            n_codebooks: use only the first so many; default all.
        """
        z = self.encoder(self._pad(wav))
        with torch.autocast(wav.device.type, enabled=False):
            quantized = self.quantizer(z.float(), n_codebooks)
        wav_hat = self.decoder(quantized.z_q)[..., : wav.shape[-1]]
        return CodecOutput(wav_hat.float(), z, quantized)

    def encode(self, wav: Tensor, n_codebooks: int | None = None) -> Tensor:
        """wav [B, 1, T], all items of the same length, to codes [B, N, ceil(T / hop_length)]."""
        return self.quantizer(self.encoder(self._pad(wav)).float(), n_codebooks).codes

    def decode(self, codes: Tensor, n_samples: int | None = None) -> Tensor:
        """codes [B, n, T'] to wav_hat [B, 1, T' x hop_length], trimmed to n_samples where given."""
        return self.decoder(self.quantizer.decode(codes))[..., :n_samples]

    def encode_long(self, wav: Tensor, n_codebooks: int | None = None, chunk_frames: int = 1000) -> Tensor:
        """`encode` in bounded memory: chunks with as much context as the encoder can see, so the codes are the same."""
        wav, hop = self._pad(wav), self.hop_length
        context = math.ceil(self.encoder.reach_samples / hop) + 1
        chunks, n_frames = [], wav.shape[-1] // hop
        for start in range(0, n_frames, chunk_frames):
            first, end = max(start - context, 0), min(start + chunk_frames, n_frames)
            codes = self.encode(wav[..., first * hop : (end + context) * hop], n_codebooks)
            chunks.append(codes[..., start - first : end - first])
        return torch.cat(chunks, -1)

    def decode_long(self, codes: Tensor, n_samples: int | None = None, chunk_frames: int = 1000) -> Tensor:
        """`decode` in bounded memory, with the decoder's context around each chunk."""
        hop, n_frames = self.hop_length, codes.shape[-1]
        context = math.ceil(self.decoder.reach_frames) + 1
        chunks = []
        for start in range(0, n_frames, chunk_frames):
            first, end = max(start - context, 0), min(start + chunk_frames, n_frames)
            wav_hat = self.decode(codes[..., first : end + context])
            chunks.append(wav_hat[..., (start - first) * hop : (end - first) * hop])
        return torch.cat(chunks, -1)[..., :n_samples]

    def _pad(self, wav: Tensor) -> Tensor:
        if wav.ndim != 3 or wav.shape[1] != 1 or wav.shape[2] == 0:
            raise ValueError(f"codec input has shape {list(wav.shape)}, expected [B, 1, T] with T > 0; mix to mono first")
        return F.pad(wav, (0, -wav.shape[-1] % self.hop_length))
