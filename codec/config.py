"""Configuration: one YAML file an experiment, spelled out whole, read into frozen dataclasses.

A section of the file is a dataclass here. An unknown key fails and names the nearest valid one.
`--set train.seed=1` overrides single values (list items by index: `phases.0.steps=100`).
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

# ----------------------------------------------------------------------------- model


@dataclass(frozen=True)
class TransformerConfig:
    """Causal transformer over latent frames, each seeing the last `window` frames (Mimi)."""

    n_layers: int
    n_heads: int
    ff_dim: int
    window: int  # frames, itself included
    layer_scale: float = 0.01  # where the gains of the residual branches start
    rope_theta: float = 10000.0


@dataclass(frozen=True, kw_only=True)
class ConvBodyConfig:
    """What convolutional encoders and decoders share. The defaults are DAC's; EnCodec and Mimi differ, see configs/."""

    type: Literal["conv"]
    strides: tuple[int, ...]
    dilations: tuple[int, ...] = (1, 3, 9)  # one residual unit each
    causal: bool = False
    pad_mode: Literal["zeros", "reflect", "replicate"] = "zeros"
    activation: Literal["snake", "elu"] = "snake"
    residual_kernel_size: int = 7
    residual_compress: int = 1  # inner width of a residual unit is its width divided by this
    residual_conv_shortcut: bool = False  # a pointwise convolution beside the unit instead of its input
    weight_norm: bool = True
    lstm_layers: int = 0  # over latent frames
    transformer: TransformerConfig | None = None  # over frames of prod(strides) samples
    latent_stride: int = 1  # one more learnt stride between transformer and quantizer

    @property
    def hop_length(self) -> int:
        return math.prod(self.strides) * self.latent_stride


@dataclass(frozen=True, kw_only=True)
class ConvEncoderConfig(ConvBodyConfig):
    encoder_dim: int  # channels after the first convolution; doubles at every stride
    last_kernel_size: int = 3


@dataclass(frozen=True, kw_only=True)
class ConvDecoderConfig(ConvBodyConfig):
    decoder_dim: int  # channels after the first convolution; halves at every stride
    last_kernel_size: int = 7
    output: Literal["scaled_tanh", "tanh", "linear"] = "scaled_tanh"
    output_padding: bool = True  # False: an odd stride loses a sample at the end, as in released DAC weights


@dataclass(frozen=True)
class SpectralConfig:
    """Both spectral bodies: STFT in (encoder) or inverse STFT out (decoder), ConvNeXt at frame rate."""

    type: Literal["spectral"]
    n_fft: int
    hop_length: int
    dim: int
    n_blocks: int
    expansion: int = 3
    kernel_size: int = 7


@dataclass(frozen=True)
class LappedConfig:
    """Both lapped bodies: a linear transform of overlapping frames and an envelope, ConvNeXt at frame rate beside them."""

    type: Literal["lapped"]
    window_length: int  # samples of a frame; those beyond hop_length are faded into its neighbours
    hop_length: int
    n_fft: int  # of the spectra that the envelope is of (encoder) and that are added (decoder)
    n_envelope: int  # so many last numbers of latent_dim tell the spectral envelope, the others the waveform
    dim: int
    n_blocks: int
    expansion: int = 3
    kernel_size: int = 7
    n_bands: int = 64  # mel bands that the encoder takes the envelope from
    n_spectra: int = 1  # of each frame, one after the other: 4 for frames of 20 ms: one every 5 ms, as short as a burst


@dataclass(frozen=True)
class EMAQuantizerConfig:
    """Euclidean residual VQ, codebooks by exponential moving average."""

    type: Literal["ema"]
    n_codebooks: int
    codebook_size: int
    codebook_dim: int  # lookup width; one projection in and out where it differs from latent_dim
    decay: float = 0.99
    dead_threshold: float = 0.1  # a code is dead below this share of its uniform use
    kmeans_frames: int = 16384  # latent frames gathered for the k-means start
    n_semantic: int = 0  # so many first codebooks code z beside the others, not before them (Mimi)
    n_prosodic: int = 0  # so many after these code what they leave over (Amy)
    semantic_blocks: int = 0  # ConvNeXt blocks between z and these two groups: a pathway of their own
    semantic_layer_scale: float = 0.0  # where their gains start: 0 leaves a codec that is given such blocks as it was
    semantic_inputs: Literal["shared", "own"] = "shared"  # own: each further codebook of the two groups has its projection of z
    semantic_gradient: float = 1.0  # share of the reconstruction's gradient that the (first) input of the two groups gets
    semantic_to_encoder: float = 1.0  # share of the gradient of these two groups that goes on into the encoder
    semantic_decay: float = 0.0  # of their codebooks; 0: as decay
    dropout: float = 0.0  # share of items of a batch that use a random number of codebooks
    dropout_counts: tuple[int, ...] = ()  # the numbers to draw from; empty: 1 to n_codebooks
    bypass: float = 0.0  # share of items whose latents pass unquantized; the codebooks learn from them all the same
    beam: int = 1  # sums of codes kept while one is searched for; codebooks that learn take the nearest code, a beam of 1

    @property
    def n_first(self) -> int:
        """Codebooks of the first of two residual VQs side by side."""
        return self.n_semantic + self.n_prosodic


@dataclass(frozen=True)
class FactorizedQuantizerConfig:
    """DAC's residual VQ: low-dimensional L2-normalised lookup, codebooks by gradient."""

    type: Literal["factorized"]
    n_codebooks: int
    codebook_size: int
    codebook_dim: int
    dropout: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    sample_rate: int
    latent_dim: int
    encoder: ConvEncoderConfig | SpectralConfig | LappedConfig
    quantizer: EMAQuantizerConfig | FactorizedQuantizerConfig
    decoder: ConvDecoderConfig | SpectralConfig | LappedConfig
    pad_input: bool = True  # zeros to whole frames before the encoder; False: every strided layer pads what it gets
    level_db: float | None = None  # RMS of the speech it trains on; `Codec.gain` brings recordings to it. None: as they are


# -------------------------------------------------------------------- discriminators


@dataclass(frozen=True)
class MSDConfig:
    type: Literal["msd"]
    n_scales: int = 3
    channels: tuple[int, ...] = (16, 64, 256, 1024, 1024, 1024)


@dataclass(frozen=True)
class MPDConfig:
    type: Literal["mpd"]
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)


@dataclass(frozen=True)
class MRDConfig:
    type: Literal["mrd"]
    windows: tuple[int, ...] = (2048, 1024, 512)
    channels: int = 32


@dataclass(frozen=True)
class MSSTFTConfig:
    type: Literal["msstft"]
    windows: tuple[int, ...] = (2048, 1024, 512, 256, 128)
    channels: int = 32


@dataclass(frozen=True)
class DiscriminatorsConfig:
    sets: tuple[MSDConfig | MPDConfig | MRDConfig | MSSTFTConfig, ...]
    normalize_input: bool = False  # DAC: no DC, peak 0.8


# ----------------------------------------------------------------- losses, optimizers


@dataclass(frozen=True)
class LossesConfig:
    """How each loss is computed. How much it counts is in `loss_weights`."""

    adversarial: Literal["hinge", "least_squares", "bce"] = "hinge"
    feat_relative: bool = False
    feat_flat: bool = False  # every layer counts alike, as in DAC; else every sub-discriminator
    mel_windows: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
    mel_bins: tuple[int, ...] = (5, 10, 20, 40, 80, 160, 320)
    mel_floor: float = 1e-5  # smallest magnitude told apart; a low one spends the gradient on silence
    msspec_windows: tuple[int, ...] = (64, 128, 256, 512, 1024)
    cspec_windows: tuple[int, ...] = (512, 1024)
    cspec_power: float = 0.3  # that compresses its magnitudes
    cspec_phase_share: float = 0.5  # of it that hears phases too
    bands_counts: tuple[int, ...] = (40, 20)  # mel bands of each scale
    bands_frames: tuple[int, ...] = (3, 7)  # over which each averages the power
    bands_window: int = 512
    bands_floor: float = 4.33e-3  # as mel_floor, of the RMS of noise
    whisper_model: str = ""  # folder or hub id
    whisper_layers: tuple[int, ...] = (2, 4, 6)  # hidden states of its encoder
    msspec_log_weight: Literal["sqrt", "one"] = "sqrt"  # of the log term: the root of half the window, or 1 (EnCodec)
    balancer: bool = False  # weights become shares of the gradient at the output; vq stays outside


@dataclass(frozen=True)
class TeacherConfig:
    """What the first codebooks are to tell, from features that `codec features` computed."""

    features: str  # its folder
    dim: int  # width of the teacher's features
    n_codebooks: int  # how many of the first codebooks, added up, are read
    head: Literal["linear", "mlp", "conv"] = "mlp"  # from codebook_dim to dim
    hidden_dim: int = 512  # of mlp and conv
    detach_first: int = 0  # the first so many of them are read but not taught: what they leave over shall tell it


@dataclass(frozen=True)
class DistillConfig:
    llm: TeacherConfig | None = None
    wavlm: TeacherConfig | None = None
    pitch: TeacherConfig | None = None


TEACHERS = tuple(f.name for f in dataclasses.fields(DistillConfig))


@dataclass(frozen=True)
class LossWeights:
    adv: float = 0.0
    feat: float = 0.0
    wave: float = 0.0
    scale: float = 0.0
    mel: float = 0.0
    msspec: float = 0.0
    cspec: float = 0.0
    bands: float = 0.0
    whisper: float = 0.0
    commit: float = 0.0
    codebook: float = 0.0
    llm: float = 0.0
    wavlm: float = 0.0
    pitch: float = 0.0

    @property
    def adversarial(self) -> bool:
        return self.adv > 0 or self.feat > 0


@dataclass(frozen=True)
class OptimConfig:
    lr_g: float
    lr_d: float
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 0.01  # on matrices and kernels only, not on biases, gains and snake alphas
    weight_decay_on: Literal["all", "transformer"] = "all"  # transformer: nowhere but in transformers (Mimi)
    ema_decay: float = 0.0  # of averaged weights, which validation and inference then use; 0: none are kept
    schedule: Literal["constant", "exponential", "cosine"] = "constant"
    gamma: float = 0.999996  # per step, exponential only
    min_lr_ratio: float = 0.0  # where the cosine ends, as a share of lr
    warmup_steps: int = 0
    max_grad_norm_g: float = 1000.0
    max_grad_norm_d: float = 10.0
    lr_scale_heads: float = 1.0  # of distillation heads, times lr_g
    lr_scale_projections: float = 1.0  # of the quantizer's projections and semantic blocks, times lr_g


# ---------------------------------------------------------------------- data, training


@dataclass(frozen=True)
class DataConfig:
    manifest: str
    segment_samples: int
    batch_size: int  # segments per update, all ranks together
    segments_per_epoch: int
    speaker_balanced: bool = False  # False: every second of audio is as likely as any other
    speeds: tuple[float, ...] = ()  # training segments are resampled to one of these, as 0.9 (longer and lower); empty: 1
    n_workers: int = 2  # loader processes per rank
    val_segments: int = 64
    val_segment_samples: int = 0  # 0: as segment_samples


@dataclass(frozen=True)
class TrainConfig:
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    log_every: int = 20
    val_every: int = 1000
    checkpoint_every: int = 1000
    keep_last: int = 3
    max_minutes: float = 0.0  # 0: no limit; else save and leave after this long
    max_skipped_in_row: int = 10  # non-finite updates in a row that stop the run
    # Run, checkpoint, pretrained folder or hub id whose weights a new run starts from. Of ema codebooks there may be more or
    # fewer than there: new ones at the end start on what those before them leave over.
    init_from: str = ""
    refit_frames: int = 0  # with init_from: its Euclidean codebooks are fitted anew to so many latents, before the first update
    # With init_from, and where that brings no discriminators like ours: so many updates at the start of the first
    # adversarial phase train the discriminators alone. They count as steps of that phase.
    disc_warmup_steps: int = 0
    # Parts of the codec that stay as they are: encoder, decoder, quantizer.semantic, ..., with the codebooks in them;
    # codebooks.0 for the first codebook alone.
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True)
class DoctorConfig:
    """What watches over the run; its verdicts come with every validation."""

    watch_every: int = 100  # updates between two looks at gradients and codebooks
    stop_on: Literal["never", "critical"] = "never"  # critical: save and leave where two validations agree on it


@dataclass(frozen=True)
class PhaseConfig:
    name: str
    steps: int
    set: dict[str, Any] = field(default_factory=dict)  # dotted keys under loss_weights and most under optim


@dataclass(frozen=True)
class Config:
    name: str
    model: ModelConfig
    discriminators: DiscriminatorsConfig
    losses: LossesConfig
    loss_weights: LossWeights
    optim: OptimConfig
    data: DataConfig
    train: TrainConfig
    phases: tuple[PhaseConfig, ...]
    distill: DistillConfig = field(default_factory=DistillConfig)
    doctor: DoctorConfig = field(default_factory=DoctorConfig)

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


# ------------------------------------------------------------------------ reading YAML


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; PyYAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"line {node.start_mark.line + 1}: key '{key}' stands twice; keep one")
        return super().construct_mapping(node, deep=deep)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `a.b=c` overrides, check everything.

    Args:
        path: the YAML file.
        overrides: items such as `train.seed=1`; values are YAML, list items go by index.
    Raises:
        ValueError: one line that names file, key, what was found, what was expected.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such config file; see configs/ for examples")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text; expected a YAML config") from None
    return parse_config(text, str(path), overrides)


def parse_config(text: str, where: str, overrides: list[str] | None = None) -> Config:
    """As `load_config`, from the text of a YAML file; `where` names it in errors."""
    try:
        raw = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: is {type(raw).__name__}, expected sections such as model: and data:")
    for item in overrides or []:
        _override(raw, item)
    config = _build(Config, raw, where, "")
    _validate(config, where)
    return config


def to_dict(config: Any) -> dict:
    """A (part of a) config as plain dicts, lists and scalars: what YAML and JSON can hold."""
    return _plain(dataclasses.asdict(config))


def dump_config(config: Config) -> str:
    """The resolved config as YAML text; `parse_config` of it gives an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def model_config(raw: dict, where: str) -> ModelConfig:
    """The `model` section alone, from plain dicts and checked, as the config.json of published weights holds it."""
    model = _build(ModelConfig, raw, where, "model.")
    validate_model(model, where)
    return model


def phase_config(config: Config, index: int) -> Config:
    """The config as phase `index` changes it. Overrides are per phase, not cumulative."""
    raw = to_dict(config)
    for key, value in config.phases[index].set.items():
        section, name = key.split(".")
        raw[section][name] = value
    return _build(Config, raw, f"phase '{config.phases[index].name}'", "")


def phase_at(config: Config, step: int) -> int:
    """Index of the phase that holds update number `step` (from 0)."""
    end = 0
    for index, phase in enumerate(config.phases):
        end += phase.steps
        if step < end:
            return index
    return len(config.phases) - 1


def has_term(config: Config, name: str) -> bool:
    """Whether a term of the loss has a weight, or a phase gives it one."""
    return getattr(config.loss_weights, name) > 0 or any(phase.set.get(f"loss_weights.{name}") for phase in config.phases)


def disc_warmup(config: Config, n_steps: int) -> range:
    """Updates that train discriminators alone: the first `n_steps` of the first phase with an adversarial loss."""
    first = 0
    for index, phase in enumerate(config.phases):
        if phase.steps and phase_config(config, index).loss_weights.adversarial:
            return range(first, first + min(n_steps, phase.steps))
        first += phase.steps
    return range(0)


# How a model is trained and used, not what it is: these may differ from those of the weights a run starts from.
NOT_OF_WEIGHTS = ["model.level_db", *(f"model.quantizer.{key}" for key in
                  ("decay", "semantic_decay", "semantic_layer_scale", "semantic_gradient", "semantic_to_encoder",
                   "dead_threshold", "kmeans_frames", "dropout", "dropout_counts", "bypass", "beam"))]  # fmt: skip


def model_differences(there: ModelConfig, here: ModelConfig) -> list[str]:
    """What keeps the weights of one model from fitting the other: `model.encoder.causal: true there, false here`."""
    a, b = _flat(to_dict(there), "model"), _flat(to_dict(here), "model")
    keys = [key for key in a | b if key not in NOT_OF_WEIGHTS and a.get(key) != b.get(key)]
    return [f"{key}: {json.dumps(a.get(key))} there, {json.dumps(b.get(key))} here" for key in keys]


def refuse_other_model(there: ModelConfig, here: ModelConfig, where: str, configs: str | Path) -> None:
    """Raise ValueError, in one line, where weights of the model `there` do not fit ours; name the `configs` they fit."""
    differences = model_differences(there, here)
    if differences:
        fitting = fitting_configs(there, configs)
        mend = f"use the model section of {' or '.join(fitting)}" if fitting else (
            "use the model section they came with, unless an older version wrote them")  # fmt: skip
        raise ValueError(f"{where}: holds another model ({'; '.join(differences[:3])}); {mend}")


def fitting_configs(model: ModelConfig, folder: str | Path) -> list[str]:
    """Config files of a folder that weights of `model` fit."""
    found = []
    for path in sorted(Path(folder).glob("*.yaml")):
        with contextlib.suppress(ValueError):  # somebody's unfinished config
            if not model_differences(model, load_config(path).model):
                found.append(str(path))
    return found


def can_grow(there: ModelConfig, here: ModelConfig) -> bool:
    """Whether weights can go on with another number of codebooks (`checkpoint.grow`): of a split quantizer with more prosodic
    or fewer acoustic ones, else with more or fewer at the end."""
    a, b = there.quantizer, here.quantizer
    if not a.type == b.type == "ema" or a.n_semantic != b.n_semantic:
        return False
    if not a.n_first and not b.n_first:
        return True
    if a.semantic_blocks not in (0, b.semantic_blocks) or a.semantic_inputs not in ("shared", b.semantic_inputs):
        return False
    return a.n_prosodic <= b.n_prosodic and a.n_codebooks - a.n_first >= b.n_codebooks - b.n_first


def grown(there: ModelConfig, here: ModelConfig) -> ModelConfig:
    """The model `there` with as many codebooks, semantic blocks and inputs as `here`."""
    keys = ("n_codebooks", "n_prosodic", "semantic_blocks", "semantic_inputs")
    same = {key: getattr(here.quantizer, key) for key in keys}
    return dataclasses.replace(there, quantizer=dataclasses.replace(there.quantizer, **same))


def trained_counts(config: ModelConfig) -> list[int]:
    """Numbers of codebooks that training drew; where it drew all, every halving of the whole number."""
    quantizer, n = config.quantizer, config.quantizer.n_codebooks
    if not quantizer.dropout:
        return [n]
    least = getattr(quantizer, "n_semantic", 0) + getattr(quantizer, "n_prosodic", 0)
    counts = getattr(quantizer, "dropout_counts", ()) or [count for count in halvings(n) if count > least]
    return sorted({n, *counts})


def halvings(n: int) -> list[int]:
    """n, n / 2, n / 4, ... rounded down to 1, ascending."""
    return [n // 2**i for i in range(n.bit_length())][::-1]


def _flat(section: dict, prefix: str) -> dict[str, Any]:
    """Values by dotted key; an absent section counts as null in each of its keys."""
    values = {}
    for key, value in section.items():
        values |= _flat(value, f"{prefix}.{key}") if isinstance(value, dict) else {f"{prefix}.{key}": value}
    return values


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _override(raw: dict, item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {item}: expected key=value, for example train.seed=1")
    node, parts = raw, key.split(".")
    try:
        for part in parts[:-1]:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        last = int(parts[-1]) if isinstance(node, list) else parts[-1]
        node[last] = yaml.safe_load(text)
    except (ValueError, IndexError, TypeError, AttributeError, yaml.YAMLError):
        raise ValueError(f"--set {item}: no such place in the config; keys look like data.batch_size") from None


def _build(kind: type, raw: Any, where: str, prefix: str) -> Any:
    """A dataclass from a dict, every key and type checked; `prefix` is the dotted path so far."""
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: {prefix.rstrip('.')}={raw!r}, expected a section with keys")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in raw:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1, 0.5)
            mend = f"did you mean {prefix}{near[0]}?" if near else f"valid: {', '.join(fields)}"
            raise ValueError(f"{where}: {prefix}{key} is not a known key; {mend}")
    hints, values = typing.get_type_hints(kind), {}
    for name, f in fields.items():
        if name in raw:
            values[name] = _convert(hints[name], raw[name], where, prefix + name)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: {prefix}{name} is missing; add it")
    return kind(**values)


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    """`value` as the annotated type, or a one-line error."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, key + ".")
    if origin in (types.UnionType, typing.Union):
        kinds = tuple(kind for kind in args if kind is not type(None))
        if value is None and len(kinds) < len(args):
            return None
        return _convert(kinds[0] if len(kinds) == 1 else _variant(kinds, value, where, key), value, where, key)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        item_hints = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(item_hints) == len(value):
            return tuple(_convert(h, v, where, f"{key}.{i}") for i, (h, v) in enumerate(zip(item_hints, value)))
    if origin is dict and isinstance(value, dict):
        return value
    if hint in (bool, str) and isinstance(value, hint):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)  # also "1e-4", which YAML 1.1 reads as a string
        except (TypeError, ValueError):
            pass
    expected = " | ".join(map(str, args)) if origin is Literal else getattr(hint, "__name__", str(hint))
    raise ValueError(f"{where}: {key}={value!r}, expected {'list' if origin is tuple else expected}")


def _variant(kinds: tuple[type, ...], value: Any, where: str, key: str) -> type:
    """The dataclass of a union whose `type:` is the given one."""
    by_type = {typing.get_args(typing.get_type_hints(kind)["type"])[0]: kind for kind in kinds}
    chosen = value.get("type") if isinstance(value, dict) else None
    if not isinstance(chosen, str) or chosen not in by_type:
        raise ValueError(f"{where}: {key}.type={chosen!r}, expected {' | '.join(by_type)}")
    return by_type[chosen]


# -------------------------------------------------------------------------- validation


# Key, lowest and highest value allowed (None: no limit). Sections that a config does not have are passed over.
MODEL_LIMITS = [  # keys under model
    ("sample_rate", 1, None), ("latent_dim", 1, None), ("level_db", -60, 0), ("encoder.encoder_dim", 1, None),
    ("decoder.decoder_dim", 1, None), ("quantizer.n_codebooks", 1, 1024),
    *[(f"{body}.{key}", low, high) for body in ("encoder", "decoder") for key, low, high in [
        ("last_kernel_size", 1, None), ("residual_kernel_size", 1, None), ("residual_compress", 1, None),
        ("lstm_layers", 0, 16), ("latent_stride", 1, None), ("transformer.n_layers", 1, 256),
        ("transformer.n_heads", 1, None), ("transformer.ff_dim", 1, None), ("transformer.window", 1, None),
        ("transformer.layer_scale", 0, 1000), ("transformer.rope_theta", 1, 10**12),
        ("n_fft", 2, None), ("n_envelope", 1, None), ("n_bands", 1, None), ("n_spectra", 1, None),
        ("dim", 1, None), ("n_blocks", 1, 256), ("expansion", 1, None), ("kernel_size", 1, None)]],
    ("quantizer.n_semantic", 0, None), ("quantizer.n_prosodic", 0, None), ("quantizer.semantic_blocks", 0, 64),
    ("quantizer.semantic_gradient", 0, 1), ("quantizer.semantic_to_encoder", 0, 1), ("quantizer.semantic_decay", 0, 1),
    ("quantizer.semantic_layer_scale", 0, 1), ("quantizer.bypass", 0, 1),
    ("quantizer.codebook_size", 2, None), ("quantizer.codebook_dim", 1, None),
    ("quantizer.decay", 0, 1), ("quantizer.dead_threshold", 0, 1), ("quantizer.dropout", 0, 1),
    ("quantizer.kmeans_frames", 1, None), ("quantizer.beam", 1, 1024),
]  # fmt: skip
LIMITS = [
    ("losses.mel_floor", 1e-12, None), ("losses.bands_floor", 1e-12, None), ("losses.bands_window", 4, None),
    ("losses.cspec_power", 0, 1), ("losses.cspec_phase_share", 0, 1),
    ("optim.lr_g", 0, None), ("optim.lr_d", 0, None),
    ("optim.weight_decay", 0, None), ("optim.gamma", 0, 1), ("optim.min_lr_ratio", 0, 1),
    ("optim.ema_decay", 0, 1), ("optim.warmup_steps", 0, None),
    ("optim.max_grad_norm_g", 0, None), ("optim.max_grad_norm_d", 0, None),
    ("optim.lr_scale_heads", 0, None), ("optim.lr_scale_projections", 0, None),
    *[(f"distill.{name}.{key}", 1, None) for name in TEACHERS for key in ("dim", "n_codebooks", "hidden_dim")],
    *[(f"distill.{name}.detach_first", 0, None) for name in TEACHERS],
    ("data.segment_samples", 1, None), ("data.batch_size", 1, None), ("data.segments_per_epoch", 1, None),
    ("data.n_workers", 0, None), ("data.val_segments", 1, None), ("data.val_segment_samples", 0, None),
    ("train.seed", 0, None), ("train.log_every", 1, None), ("train.val_every", 1, None),
    ("train.checkpoint_every", 1, None), ("train.keep_last", 1, None), ("train.max_minutes", 0, None),
    ("doctor.watch_every", 1, None), ("train.max_skipped_in_row", 1, None), ("train.disc_warmup_steps", 0, None),
    ("train.refit_frames", 0, None),
]  # fmt: skip

# Keys of optim that no phase can change.
WHOLE_RUN = ("betas", "weight_decay", "weight_decay_on", "ema_decay", "lr_scale_heads", "lr_scale_projections")


def _validate(config: Config, where: str) -> None:
    """Ranges, and rules that span keys."""
    validate_model(config.model, where)
    for key, low, high in LIMITS:
        _validate_range(config, key, low, high, f"{where}: ")
    for f in dataclasses.fields(LossWeights):
        if not 0 <= getattr(config.loss_weights, f.name) < math.inf:
            raise ValueError(f"{where}: loss_weights.{f.name}={getattr(config.loss_weights, f.name)}, expected at least 0")
    if not config.phases:
        raise ValueError(f"{where}: phases is empty; name at least one with its steps")
    if config.train.disc_warmup_steps and not config.train.init_from:
        raise ValueError(f"{where}: train.disc_warmup_steps={config.train.disc_warmup_steps} without train.init_from; a "
                         "codec that is new itself needs no warm-up: set it to 0")  # fmt: skip
    quantizer = config.model.quantizer
    searched = quantizer.type == "ema" and quantizer.beam > 1 and not quantizer.n_first
    kept = {"encoder", "quantizer"} <= {*config.train.freeze}  # or the codebooks would follow the encoder again
    if config.train.refit_frames and not (config.train.init_from and searched and kept):
        raise ValueError(f"{where}: train.refit_frames={config.train.refit_frames} is for weights of train.init_from whose "
                         "quantizer is ema with beam above 1 and n_semantic 0, and stays as it is: expected train.freeze="
                         f"[encoder,quantizer], got {[*config.train.freeze]}; or set it to 0")  # fmt: skip
    if 0 < config.train.refit_frames < quantizer.codebook_size:
        raise ValueError(f"{where}: train.refit_frames={config.train.refit_frames} are fewer than the "
                         f"{quantizer.codebook_size} entries of a codebook; 200000 is a good number")  # fmt: skip
    _validate_shapes(config, where)
    _validate_distillation(config, where)
    for index in range(len(config.phases)):
        _validate_phase(config, index, where)
    warmup, available = config.train.disc_warmup_steps, len(disc_warmup(config, config.total_steps))
    if warmup and warmup >= available:
        mend = f"that has {available} steps: expected fewer" if available else "and there is none: set it to 0"
        raise ValueError(f"{where}: train.disc_warmup_steps={warmup} begins the first phase that weighs adv or feat, {mend}")


def _validate_range(config: Any, key: str, low: float, high: float | None, at: str) -> None:
    """Refuse a value outside its limits; a key that the config does not have passes."""
    value = functools.reduce(lambda node, part: getattr(node, part, None), key.split("."), config)
    if value is not None and not low <= value <= (math.inf if high is None else high):
        raise ValueError(f"{at}{key}={value}, expected {f'at least {low}' if high is None else f'{low} to {high}'}")


def validate_model(model: ModelConfig, where: str) -> None:
    """Check a model section by itself: ranges, and rules that span its keys.

    Args:
        model: every value of the right type, as `model_config` gives it.
        where: names the file in errors.
    Raises:
        ValueError: one line with the key, what was found, what was expected.
    """
    for key, low, high in MODEL_LIMITS:
        _validate_range(model, key, low, high, f"{where}: model.")
    for name, body in (("encoder", model.encoder), ("decoder", model.decoder)):
        if body.type == "conv":
            _validate_conv_body(model, name, where)
        elif body.type == "lapped":
            _validate_lapped_body(model, name, where)
        elif not 0 < body.hop_length < body.n_fft or body.n_fft % 2 or not body.kernel_size % 2:
            raise ValueError(f"{where}: model.{name} has n_fft {body.n_fft}, hop_length {body.hop_length}, kernel_size "
                             f"{body.kernel_size}; expected an even n_fft above hop_length, and an odd kernel_size")
    if model.decoder.hop_length != model.encoder.hop_length:
        raise ValueError(f"{where}: model.decoder has hop_length {model.decoder.hop_length}, model.encoder "
                         f"{model.encoder.hop_length}; make them equal")  # fmt: skip
    quantizer = model.quantizer
    if quantizer.type == "ema":
        _validate_first_group(model, where)
    counts = getattr(quantizer, "dropout_counts", ())
    least = max(getattr(quantizer, "n_first", 1), 1)  # semantic and prosodic codebooks are never dropped
    if any(not least <= count <= quantizer.n_codebooks for count in counts):
        raise ValueError(f"{where}: model.quantizer.dropout_counts={list(counts)}, expected numbers from {least} to "
                         f"n_codebooks={quantizer.n_codebooks}")  # fmt: skip


def _validate_lapped_body(model: ModelConfig, name: str, where: str) -> None:
    """Rules of one lapped body, and of the two together: one transform there and back."""
    body, at = getattr(model, name), f"{where}: model.{name}"
    if not body.hop_length < body.window_length <= 2 * body.hop_length or body.window_length % 2 or body.hop_length % 2:
        raise ValueError(f"{at} has window_length {body.window_length}, hop_length {body.hop_length}; expected even numbers, "
                         "window_length above hop_length and at most twice as long")  # fmt: skip
    if not body.kernel_size % 2:
        raise ValueError(f"{at}.kernel_size={body.kernel_size}, expected an odd number")
    if body.hop_length % body.n_spectra:
        raise ValueError(f"{at}.n_spectra={body.n_spectra}, expected a divisor of hop_length={body.hop_length}")
    if body.n_fft * body.n_spectra < 2 * body.hop_length or body.n_fft % 2:
        raise ValueError(f"{at}.n_fft={body.n_fft}, expected an even number, at least {2 * body.hop_length // body.n_spectra}, "
                         "twice the samples between two spectra")  # fmt: skip
    shared = ("type", "window_length", "n_fft", "n_envelope", "n_spectra")
    if any(getattr(model.encoder, key, None) != getattr(model.decoder, key, None) for key in shared):
        raise ValueError(f"{where}: model.encoder and model.decoder are to be lapped both, with the same "
                         f"{', '.join(shared[1:])}")  # fmt: skip
    most = min(model.latent_dim - 1, body.n_spectra * body.n_bands)
    if body.n_envelope > most or model.latent_dim - body.n_envelope > body.window_length:
        raise ValueError(f"{at}.n_envelope={body.n_envelope}, expected at most {most}, and the rest of "
                         f"latent_dim={model.latent_dim} at most window_length={body.window_length}")  # fmt: skip


def _validate_first_group(model: ModelConfig, where: str) -> None:
    """Rules of the semantic and prosodic codebooks."""
    quantizer, at = model.quantizer, f"{where}: model.quantizer"
    if quantizer.n_first >= quantizer.n_codebooks:
        which = "n_semantic + n_prosodic" if quantizer.n_prosodic else "n_semantic"
        raise ValueError(f"{at}.{which}={quantizer.n_first}, expected less than n_codebooks={quantizer.n_codebooks}")
    defaults = {"n_prosodic": 0, "semantic_blocks": 0, "semantic_layer_scale": 0, "semantic_inputs": "shared",
                "semantic_gradient": 1, "semantic_to_encoder": 1, "semantic_decay": 0}  # fmt: skip
    for key, default in defaults.items():
        if getattr(quantizer, key) != default and not quantizer.n_semantic:
            raise ValueError(f"{at}.{key}={getattr(quantizer, key)} without semantic codebooks; set n_semantic to 1 or more")
    if quantizer.semantic_layer_scale and not quantizer.semantic_blocks:
        raise ValueError(f"{at}.semantic_layer_scale={quantizer.semantic_layer_scale} without semantic_blocks; set some, or 0")


def _validate_distillation(config: Config, where: str) -> None:
    """Teachers that fit the quantizer."""
    quantizer = config.model.quantizer
    readable = (quantizer.n_first or quantizer.n_codebooks) if quantizer.type == "ema" else 0
    for name in TEACHERS:
        teacher = getattr(config.distill, name)
        if teacher is None:
            continue
        if not readable:
            raise ValueError(f"{where}: distill.{name} with model.quantizer.type={quantizer.type}, expected ema; leave one out")
        if teacher.n_codebooks > readable:
            group = "n_semantic + n_prosodic" if quantizer.n_first else "n_codebooks"
            raise ValueError(f"{where}: distill.{name}.n_codebooks={teacher.n_codebooks}, expected at most {group}={readable}")
        if teacher.detach_first >= teacher.n_codebooks:
            raise ValueError(f"{where}: distill.{name}.detach_first={teacher.detach_first}, expected less than its "
                             f"n_codebooks={teacher.n_codebooks}: nothing would be taught")  # fmt: skip
        if teacher.detach_first and quantizer.semantic_inputs != "own":
            raise ValueError(f"{where}: distill.{name}.detach_first={teacher.detach_first} with semantic_inputs="
                             f"{quantizer.semantic_inputs}, expected own: else the first codebook alone passes gradient")


def _validate_shapes(config: Config, where: str) -> None:
    """Windows and segments that have to fit each other and the hop."""
    model, data, hop = config.model, config.data, config.model.encoder.hop_length
    for key in ("segment_samples", "val_segment_samples"):
        samples = getattr(data, key)
        if samples % hop:
            low = max(samples // hop, 1) * hop
            strides = f" (strides {list(model.encoder.strides)})" if model.encoder.type == "conv" else ""
            raise ValueError(f"{where}: data.{key}={samples} is not a multiple of hop_length={hop}{strides}; "
                             f"try {low} or {low + hop}")  # fmt: skip
    if any(not 0.5 <= speed <= 2 or abs(100 * speed - round(100 * speed)) > 1e-6 for speed in data.speeds):
        raise ValueError(f"{where}: data.speeds={[*data.speeds]}, expected numbers from 0.5 to 2 with two digits, as 0.95")
    if data.speeds and any(getattr(config.distill, name) for name in TEACHERS):
        raise ValueError(f"{where}: data.speeds={[*data.speeds]} beside distill: features tell of recordings as they are; "
                         "leave one out")  # fmt: skip
    if data.segments_per_epoch < data.batch_size:
        raise ValueError(f"{where}: data.segments_per_epoch={data.segments_per_epoch} is less than one batch of "
                         f"{data.batch_size}; an epoch wants hundreds of updates: try {1000 * data.batch_size}")
    losses = config.losses
    if len(losses.mel_windows) != len(losses.mel_bins):
        raise ValueError(f"{where}: losses.mel_windows has {len(losses.mel_windows)} items, losses.mel_bins "
                         f"{len(losses.mel_bins)}; they go in pairs")  # fmt: skip
    if len(losses.bands_counts) != len(losses.bands_frames) or min((*losses.bands_counts, *losses.bands_frames), default=0) < 1:
        raise ValueError(f"{where}: losses.bands_counts={[*losses.bands_counts]} and losses.bands_frames="
                         f"{[*losses.bands_frames]}, expected numbers of at least 1, in pairs")  # fmt: skip
    windows = [("losses.mel_windows", losses.mel_windows), ("losses.msspec_windows", losses.msspec_windows)]
    if has_term(config, "cspec"):
        windows.append(("losses.cspec_windows", losses.cspec_windows))
    if has_term(config, "bands"):
        spans = [losses.bands_window // 4 * n_frames for n_frames in losses.bands_frames]
        windows += [("losses.bands_window", (losses.bands_window,)), ("losses.bands_frames in samples", spans)]
    if has_term(config, "whisper") and 10 * data.segment_samples < config.model.sample_rate:
        raise ValueError(f"{where}: data.segment_samples={data.segment_samples}, loss_weights.whisper wants 0.1 s or more, "
                         f"{config.model.sample_rate / 10:.0f} samples")  # fmt: skip
    if has_term(config, "whisper") and not losses.whisper_model:
        raise ValueError(f"{where}: loss_weights.whisper without losses.whisper_model; name its folder: "
                         "benchmarks/distillation/teachers.py makes data/teachers/whisper-base")  # fmt: skip
    windows += [(f"discriminators.sets.{i}.windows", getattr(member, "windows", ()))
                for i, member in enumerate(config.discriminators.sets)]  # fmt: skip
    for key, sizes in windows:
        if any(not 0 < size <= data.segment_samples for size in sizes):
            raise ValueError(f"{where}: {key}={list(sizes)}, but a segment has {data.segment_samples} samples; "
                             "use shorter windows or longer segments")  # fmt: skip


def _validate_conv_body(model: ModelConfig, name: str, where: str) -> None:
    """Rules of one convolutional body that span keys."""
    body, at = getattr(model, name), f"{where}: model.{name}"
    for key, least in (("strides", 2), ("dilations", 1)):
        numbers = getattr(body, key)
        if any(number < least for number in numbers) or not body.strides:
            raise ValueError(f"{at}.{key}={list(numbers)}, expected numbers of at least {least}")
    narrowest = body.encoder_dim if name == "encoder" else body.decoder_dim // 2 ** len(body.strides)
    if name == "decoder" and body.decoder_dim % 2 ** len(body.strides):
        raise ValueError(f"{at}.decoder_dim={body.decoder_dim} cannot be halved {len(body.strides)} times; try a multiple of "
                         f"{2 ** len(body.strides)}")  # fmt: skip
    if body.residual_compress > narrowest:
        raise ValueError(f"{at}.residual_compress={body.residual_compress}, expected at most {narrowest}, the narrowest width")
    if body.transformer and (model.latent_dim % body.transformer.n_heads or model.latent_dim // body.transformer.n_heads % 2):
        raise ValueError(f"{at}.transformer.n_heads={body.transformer.n_heads}, but latent_dim {model.latent_dim} must split "
                         "into heads of even width; choose another")  # fmt: skip
    if body.lstm_layers and (body.transformer or body.latent_stride > 1):
        raise ValueError(f"{at} has lstm_layers {body.lstm_layers} beside a transformer or latent_stride; keep one of them")
    if body.pad_mode != "zeros" and not body.causal:
        raise ValueError(f"{at}.pad_mode={body.pad_mode} without causal; set causal: true or pad_mode: zeros")
    if (body.latent_stride > 1 or not model.pad_input) and not body.causal:
        raise ValueError(f"{at}.causal=False, but latent_stride above 1 and pad_input: false want causal: true")
    if (body.residual_kernel_size % 2 == 0 or body.last_kernel_size % 2 == 0) and not body.causal:
        raise ValueError(f"{at} has residual_kernel_size {body.residual_kernel_size}, last_kernel_size "
                         f"{body.last_kernel_size}; expected odd numbers where causal is false")  # fmt: skip


def _validate_phase(config: Config, index: int, where: str) -> None:
    phase = config.phases[index]
    if phase.steps < 0:
        raise ValueError(f"{where}: phases.{index}.steps={phase.steps}, expected 0 or more")
    allowed = [f"{section}.{f.name}" for section, kind in [("loss_weights", LossWeights), ("optim", OptimConfig)]
               for f in dataclasses.fields(kind) if f.name not in WHOLE_RUN]  # fmt: skip
    for key in phase.set:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1, 0.0)[0]
            raise ValueError(f"{where}: phases.{index}.set.{key} cannot change between phases; "
                             f"loss_weights.* and most of optim.* can: did you mean {near}?")  # fmt: skip
    resolved = phase_config(config, index)
    weights = resolved.loss_weights
    if not any(dataclasses.astuple(weights)):
        raise ValueError(f"{where}: phase '{phase.name}' has no loss with a weight above 0; set loss_weights")
    if (weights.adv or weights.feat) and not config.discriminators.sets:
        raise ValueError(f"{where}: phase '{phase.name}' weighs adv or feat, but discriminators.sets is empty; name some")
    for name in TEACHERS:
        if getattr(weights, name) and getattr(config.distill, name) is None:
            raise ValueError(f"{where}: phase '{phase.name}' weighs {name}, but distill.{name} is not there; name its features")
    if weights.codebook and config.model.quantizer.type == "ema":
        raise ValueError(f"{where}: loss_weights.codebook={weights.codebook}, but EMA codebooks take no gradient; "
                         "set it to 0 (commit stays)")  # fmt: skip
