"""The `codec` command: encode, decode, reconstruct, info, convert, prior, features, align, probe, doctor."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from codec import align, doctor, prior, probe, teachers
from codec.audio import load_audio, save_audio
from codec.bitstream import CodecFileHeader, is_codec_file, read_codes, read_header, write_codes
from codec.card import n_weights
from codec.checkpoint import load_state
from codec.convert import convert as convert_weights
from codec.model import Codec
from codec.pretrained import BASE, read_json, resolve

USER_ERROR = 2
CODEC_HELP = "a run, checkpoint or pretrained folder, or a hub id"
OR_BASE = " (default: the model of this package, which can be called base)"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code, or 2 (doctor: 3) after one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError) as error:
        print(f"codec: {error}", file=sys.stderr)
        return getattr(options, "user_error", USER_ERROR)


def encode(options: argparse.Namespace) -> None:
    """Audio file to codec file."""
    codec = _load(options)
    known = None if options.packed else prior.load(resolve(options.checkpoint, options.which), codec)
    wav = load_audio(options.input, codec.sample_rate)
    gain = codec.gain(wav[None])
    codes = codec.encode_long((gain * wav).to(options.device), _n_codebooks(options, codec))[0]
    header = CodecFileHeader(
        sample_rate=codec.sample_rate,
        hop_length=codec.hop_length,
        n_samples=wav.shape[-1],
        n_codebooks=codes.shape[0],
        codebook_size=codec.codebook_size,
        n_frames=codes.shape[1],
        model_id=codec.model_id,
        gain=round(gain.item(), 4),
    )
    header = write_codes(options.output, codes, header, known)
    print(f"{options.output}: {_rate_line(options.output, header)}")


def decode(options: argparse.Namespace) -> None:
    """Codec file to audio file."""
    header, codec = read_header(options.input), _load(options)
    if header.model_id != codec.model_id:
        raise ValueError(
            f"{options.input}: coded by model {header.model_id}, {options.checkpoint} is model "
            f"{codec.model_id}; decode with the checkpoint that coded it"
        )
    for name, limit in (("n_codebooks", codec.n_codebooks), ("codebook_size", codec.codebook_size)):
        if getattr(header, name) > limit:
            raise ValueError(f"{options.input}: {name}={getattr(header, name)}, the model has {limit}")
    known = prior.load(resolve(options.checkpoint, options.which), codec) if header.prior else None
    codes, _ = read_codes(options.input, known)
    wav_hat = codec.decode_long(codes[None].to(options.device), header.n_samples)[0]
    save_audio(options.output, wav_hat / header.gain, codec.sample_rate)
    print(f"{options.output}: {wav_hat.shape[-1] / codec.sample_rate:.2f} s at {codec.sample_rate} Hz")


def reconstruct(options: argparse.Namespace) -> None:
    """Audio file through the codec to audio file."""
    codec = _load(options)
    n_codebooks = _n_codebooks(options, codec)
    wav = load_audio(options.input, codec.sample_rate)
    gain = codec.gain(wav[None])
    codes = codec.encode_long((gain * wav).to(options.device), n_codebooks)
    save_audio(options.output, codec.decode_long(codes, wav.shape[-1])[0] / gain[0].to(options.device), codec.sample_rate)
    seconds, kbps = wav.shape[-1] / codec.sample_rate, _kbps(codec, n_codebooks)
    print(f"{options.output}: {seconds:.2f} s at {codec.sample_rate} Hz, {kbps:.2f} kbps")


def info(options: argparse.Namespace) -> None:
    """Print what a checkpoint or a codec file is."""
    if options.path.is_file() and is_codec_file(options.path):
        lines = _file_lines(options.path)
    else:
        lines = _checkpoint_lines(resolve(options.path, options.which))
    for name, value in lines.items():
        print(f"{name:<16}{value}")


def convert(options: argparse.Namespace) -> None:
    """Weights of transformers' DAC, EnCodec or Mimi to ours, ours to theirs, or a run to a folder to publish."""
    print(convert_weights(options.source, options.output, options.to, options.which, options.compact))


def _file_lines(path: Path) -> dict[str, str]:
    """Description of a codec file."""
    header = read_header(path)
    return {
        "codec file": str(path),
        "model": header.model_id,
        "sample rate": f"{header.sample_rate} Hz",
        "frame rate": f"{header.sample_rate / header.hop_length:g} Hz (hop length {header.hop_length})",
        "codebooks": f"{header.n_codebooks} x {header.codebook_size} entries",
        "frames": str(header.n_frames),
        "codes": f"entropy coded by prior {header.prior}" if header.prior else "packed",
        "gain": f"{20 * math.log10(header.gain):+.1f} dB before coding",
        "content": _rate_line(path, header),
    }


def _checkpoint_lines(folder: Path) -> dict[str, str]:
    """Description of a checkpoint or pretrained folder."""
    codec = Codec.from_pretrained(folder)
    counts = {name: n_weights(getattr(codec, name).state_dict()) for name in ("encoder", "quantizer", "decoder")}
    counts["total"] = sum(counts.values())
    rates = [f"{n}: {_kbps(codec, n):.4g}" for n in range(1, codec.n_codebooks + 1)]
    about = load_state(folder) if (folder / "state.json").is_file() else read_json(folder / "config.json")
    known = prior.load(folder, codec)
    context_ms = 1000 * codec.receptive_field_samples / codec.sample_rate
    return {
        "checkpoint": str(folder),
        "model": codec.model_id,
        "step": str(about.get("step", "unknown")),
        "parameters": ", ".join(f"{name} {n:,}" for name, n in counts.items()),
        "sample rate": f"{codec.sample_rate} Hz",
        "frame rate": f"{codec.frame_rate_hz:g} Hz (hop length {codec.hop_length})",
        "codebooks": f"{codec.n_codebooks} x {codec.codebook_size} entries{_groups(codec)}",
        "kbps": "  ".join(rates) + "  (by number of codebooks)",
        "files": f"entropy coded by prior {known.id}" if known else "packed",
        "level": "any" if codec.config.level_db is None else f"recordings are brought to {codec.config.level_db:g} dB RMS",
        "receptive field": f"{context_ms:.1f} ms of input a frame" if math.isfinite(context_ms) else "the whole past",
    }


def _groups(codec: Codec) -> str:
    """What kinds of codebooks there are, if of several kinds."""
    quantizer = codec.config.quantizer
    if quantizer.type != "ema" or not quantizer.n_first:
        return ""
    counts = {"semantic": quantizer.n_semantic, "prosodic": quantizer.n_prosodic,
              "acoustic": quantizer.n_codebooks - quantizer.n_first}  # fmt: skip
    return f" ({', '.join(f'{count} {kind}' for kind, count in counts.items() if count)})"


def _kbps(codec: Codec, n_codebooks: int) -> float:
    """Bitrate of the first so many codebooks."""
    return codec.bitrate_kbps * n_codebooks / codec.n_codebooks


def _rate_line(path: Path, header: CodecFileHeader) -> str:
    """Duration, size and true bitrate of a codec file, its header and checksum included."""
    seconds, n_bytes = header.n_samples / header.sample_rate, Path(path).stat().st_size
    return f"{seconds:.2f} s in {n_bytes} bytes, {8 * n_bytes / seconds / 1000:.2f} kbps"


def _load(options: argparse.Namespace) -> Codec:
    """The codec that the options name."""
    codec = Codec.from_pretrained(options.checkpoint, options.which)
    try:
        return codec.to(options.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {options.device}: {str(error).splitlines()[0]}; try cpu") from None


def _n_codebooks(options: argparse.Namespace, codec: Codec) -> int:
    """How many codebooks to use."""
    if options.n_codebooks is None:
        return codec.n_codebooks
    if not 1 <= options.n_codebooks <= codec.n_codebooks:
        raise ValueError(f"--n_codebooks {options.n_codebooks}: expected 1 to {codec.n_codebooks}")
    return options.n_codebooks


def _parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="codec", description="Speech to codes and back.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    audio_in, audio_out = "audio file, any rate and channels", ".wav or .flac file, at the model's rate"
    for run, help_in, help_out in (
        (encode, audio_in, "codec file"),
        (decode, "codec file", audio_out),
        (reconstruct, audio_in, audio_out),
    ):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.add_argument("input", type=Path, help=help_in)
        command.add_argument("output", type=Path, help=help_out)
        command.add_argument("--checkpoint", default=BASE, help=CODEC_HELP + OR_BASE)
        command.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
        if run is encode:
            command.add_argument("--packed", action="store_true",
                                 help="every code in the same number of bits, though the codec has a prior (`codec prior`)")
        if run is not decode:
            command.add_argument("--n_codebooks", type=int, help="use only the first so many (default all)")
        _add_which(command)
        command.set_defaults(run=run)
    command = commands.add_parser("info", help=info.__doc__, description=info.__doc__)
    command.add_argument("path", type=Path, nargs="?", default=BASE, help=f"codec file, or {CODEC_HELP}{OR_BASE}")
    _add_which(command)
    command.set_defaults(run=info)
    command = commands.add_parser("convert", help=convert.__doc__, description=convert.__doc__)
    command.add_argument("output", type=Path, metavar="OUT", help="new folder")
    command.add_argument("--from", dest="source", required=True, metavar="FOLDER_OR_HUB_ID",
                         help=f"transformers' weights, or {CODEC_HELP}")  # fmt: skip
    command.add_argument("--to", choices=("codec", "transformers"), default="codec", help="who shall load it (default codec)")
    command.add_argument("--compact", action="store_true", help="fp16, with the config and discriminators of a run beside")
    _add_which(command)
    command.set_defaults(run=convert)
    for module in (prior, teachers, align, probe, doctor):
        module.add_command(commands)
    return parser


def _add_which(command: argparse.ArgumentParser) -> None:
    """--which, of every command that may be given a run."""
    command.add_argument("--which", choices=("latest", "best"), default="latest", help="checkpoint of a run")


if __name__ == "__main__":
    sys.exit(main())
