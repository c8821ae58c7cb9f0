"""Weights of transformers' DacModel, EncodecModel and MimiModel to ours and back, tensor by tensor.

Neither direction goes through transformers' own loading, which fills in silently what a file lacks: the tables of
names below are the whole conversion, and a tensor that is missing, left over or of another shape is an error.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor

from codec import prior
from codec.card import model_card, n_weights, run_section, source_section
from codec.checkpoint import discriminators_learned, inference_tensors, load_state, load_tensors, misfits
from codec.config import (
    ConvDecoderConfig,
    ConvEncoderConfig,
    EMAQuantizerConfig,
    FactorizedQuantizerConfig,
    ModelConfig,
    TransformerConfig,
    dump_config,
    fitting_configs,
    model_config,
    model_differences,
    parse_config,
    to_dict,
)
from codec.files import write_atomically
from codec.model import Codec, state_names
from codec.pretrained import (
    CONVERTIBLE,
    NORM,
    WEIGHTS,
    compact,
    fetch,
    new_folder,
    not_ours,
    public_name,
    read_json,
    read_model,
    require_weights,
    resolve,
    with_weight_norm,
    without_weight_norm,
    write_pretrained,
)

if TYPE_CHECKING:  # importing them takes seconds
    from transformers import DacConfig, EncodecConfig, MimiConfig

CONFIGS = Path(__file__).parents[1] / "configs"
PAD_MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate"}  # theirs to ours
USAGE_FLOOR = 1e-5  # Mimi's entries are embed_sum / max(cluster_usage, this)


def convert(source: str, out: str | Path, to: str = "codec", which: str = "latest", small: bool = False) -> str:
    """Write `source` as a pretrained folder, or as a folder that transformers' AutoModel reads.

    Args:
        source: a folder or hub id: weights of transformers, a run, a checkpoint, or a pretrained folder.
        out: a new folder.
        to: "codec" or "transformers".
        which: "latest" or "best", where source is a run.
        small: write fp16, and beside the weights what fine-tuning wants of a run: its config and discriminators.
    Returns:
        One line on what was written.
    Raises:
        ValueError: source or out is not fit for it; one line.
    """
    folder = fetch(source)
    raw = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if small and to == "transformers":
        raise ValueError("--compact: is for our own folders, got --to transformers; leave one of them out")
    name, beside = public_name(source), {}
    about, title, training = {"source": name}, name.split("/")[-1], source_section(name)
    if "model_type" in raw:
        if to == "transformers":
            raise ValueError(f"{source}: is what transformers writes already; --to codec converts it")
        model, tensors = read_transformers(folder)
    else:
        folder = resolve(folder, which)
        model, tensors = read_model(folder), inference_tensors(folder)
        if small and (folder / "config.yaml").is_file():
            beside = run_files(folder)
        if to == "codec" and (folder / prior.FILE).is_file():
            beside |= prior_file(folder, small)
        if (folder / "state.json").is_file():
            about["step"], training = load_state(folder)["step"], run_section(folder)
            if folder.resolve().parent.name == "checkpoints":
                title = folder.resolve().parent.parent.name
    problems = misfits(tensors, state_names(model))
    if problems:
        raise ValueError(f"{folder / WEIGHTS}: does not fit its config: {problems}; damaged, or written by an older version")
    if to == "transformers":
        write_transformers(out, model, tensors, title, training)
        return f"{out}: written for transformers"
    card = model_card(model, n_weights(tensors), title=title, training=training)
    write_pretrained(out, model, compact(tensors) if small else tensors, card, about, beside)
    fitting = ", ".join(f"configs/{Path(path).name}" for path in fitting_configs(model, CONFIGS))
    return (f"{out}: a pretrained folder; train it further by train.init_from={out} with "
            f"{fitting or 'a config that has the model section of its config.json'}")  # fmt: skip


def run_files(folder: Path) -> dict[str, dict[str, Tensor] | str | bytes]:
    """What fine-tuning wants of a checkpoint: its config, without private paths, and discriminators that learned, in fp16."""
    path = folder / "config.yaml"
    config = parse_config(path.read_text(encoding="utf-8"), str(path))
    data, train = replace(config.data, manifest=public_name(config.data.manifest)), config.train
    train = replace(train, init_from=public_name(train.init_from) if train.init_from else "")
    taught = {name: replace(teacher, features=public_name(teacher.features))
              for name, teacher in vars(config.distill).items() if teacher}  # fmt: skip
    losses = replace(config.losses, whisper_model=config.losses.whisper_model and public_name(config.losses.whisper_model))
    shown = replace(config, data=data, train=train, losses=losses, distill=replace(config.distill, **taught))
    beside = {"config.yaml": dump_config(shown)}
    if discriminators_learned(folder, config):
        beside["discriminators.safetensors"] = compact(load_tensors(folder / "discriminators.safetensors"))
    return beside


def prior_file(folder: Path, small: bool) -> dict[str, bytes]:
    """The prior of a codec, as that of the codec it becomes: fp16 moves no codebook so far that other codes are likely."""
    codec = Codec.from_pretrained(folder)
    known = prior.load(folder, codec)
    known.model_id = (codec.half().float() if small else codec).model_id
    return {prior.FILE: prior.file_bytes(known)}


# -------------------------------------------------------------------------- the tables of names


class Match(NamedTuple):
    """Where a tensor is. One of ours can be several of theirs."""

    ours: str
    theirs: list[str]
    how: str = "same"  # same | concatenated (on the first axis) | stacked (on a new one) | kernel (theirs ends in [..., 1])


def dac_keys(model: ModelConfig) -> list[Match]:
    """DacModel. Blocks of three residual units with a strided convolution after (encoder) or before (decoder) them."""
    n_blocks = len(model.encoder.strides)
    keys = _affine("encoder.local.0.conv", "encoder.conv1")
    for block in range(n_blocks):
        at, theirs = 1 + 5 * block, f"encoder.block.{block}"
        for unit in range(3):
            keys += _dac_unit(f"encoder.local.{at + unit}", f"{theirs}.res_unit{unit + 1}")
        keys += [Match(f"encoder.local.{at + 3}.alpha", [f"{theirs}.snake1.alpha"])]
        keys += _affine(f"encoder.local.{at + 4}.conv", f"{theirs}.conv1")
    keys += [Match(f"encoder.local.{5 * n_blocks + 1}.alpha", ["encoder.snake1.alpha"])]
    keys += _affine(f"encoder.local.{5 * n_blocks + 2}.conv", "encoder.conv2")
    for i in range(model.quantizer.n_codebooks):
        ours, theirs = f"quantizer.levels.{i}", f"quantizer.quantizers.{i}"
        keys += _affine(f"{ours}.in_proj", f"{theirs}.in_proj") + _affine(f"{ours}.out_proj", f"{theirs}.out_proj")
        keys += [Match(f"{ours}.codebook.weight", [f"{theirs}.codebook.weight"])]
    keys += _affine("decoder.layers.0.conv", "decoder.conv1")
    for block in range(n_blocks):
        at, theirs = 1 + 5 * block, f"decoder.block.{block}"
        keys += [Match(f"decoder.layers.{at}.alpha", [f"{theirs}.snake1.alpha"])]
        keys += _affine(f"decoder.layers.{at + 1}.conv", f"{theirs}.conv_t1")
        for unit in range(3):
            keys += _dac_unit(f"decoder.layers.{at + 2 + unit}", f"{theirs}.res_unit{unit + 1}")
    keys += [Match(f"decoder.layers.{5 * n_blocks + 1}.alpha", ["decoder.snake1.alpha"])]
    return keys + _affine("decoder.to_wav.0.conv", "decoder.conv2")


def encodec_keys(model: ModelConfig) -> list[Match]:
    """EncodecModel. Both stacks number their layers alike; ours are cut where the LSTM stands."""
    last = 1 + len(model.encoder.strides) * (len(model.encoder.dilations) + 2)
    keys = _seanet_encoder(model)
    keys += _lstm("encoder.tail.0.lstm", f"encoder.layers.{last}.lstm", model.encoder.lstm_layers)
    keys += _affine("encoder.tail.2.conv", f"encoder.layers.{last + 2}.conv")
    codebooks = [f"quantizer.layers.{i}.codebook" for i in range(model.quantizer.n_codebooks)]
    for ours, theirs in (("codebooks", "embed"), ("ema_sum", "embed_avg"), ("ema_count", "cluster_size")):
        keys += [Match(f"quantizer.{ours}", [f"{codebook}.{theirs}" for codebook in codebooks], "stacked")]
    keys += _affine("decoder.head.0.conv", "decoder.layers.0.conv")
    keys += _lstm("decoder.head.1.lstm", "decoder.layers.1.lstm", model.decoder.lstm_layers)
    return keys + _seanet_decoder(model, 0, 2)


def mimi_keys(model: ModelConfig) -> list[Match]:
    """MimiModel, by the names on disk, which are the first release's and not those of its modules today.

    It keeps no codebooks, only the sums and counts that give them.
    """
    last = 1 + len(model.encoder.strides) * (len(model.encoder.dilations) + 2)
    keys = _seanet_encoder(model) + _affine(f"encoder.local.{last + 1}.conv", f"encoder.layers.{last + 1}.conv")
    keys += _transformer("encoder.tail.0", "encoder_transformer", model.encoder.transformer.n_layers)
    keys += [Match("encoder.tail.1.conv.weight", ["downsample.conv.weight"])]
    for part, codebooks in _mimi_codebooks(model).items():
        ours, theirs = f"quantizer.{part}", f"quantizer.{part}_residual_vector_quantizer"
        if model.quantizer.codebook_dim != model.latent_dim:
            keys += [Match(f"{ours}.project_in.weight", [f"{theirs}.input_proj.weight"], "kernel"),
                     Match(f"{ours}.project_out.weight", [f"{theirs}.output_proj.weight"], "kernel")]  # fmt: skip
        keys += [Match(f"{ours}.ema_sum", [f"{codebook}.embed_sum" for codebook in codebooks], "stacked"),
                 Match(f"{ours}.ema_count", [f"{codebook}.cluster_usage" for codebook in codebooks], "stacked")]  # fmt: skip
    keys += [Match("decoder.head.0.conv.weight", ["upsample.conv.weight"])]
    keys += _transformer("decoder.head.1", "decoder_transformer", model.decoder.transformer.n_layers)
    return keys + _affine("decoder.layers.0.conv", "decoder.layers.0.conv") + _seanet_decoder(model, 1, 0)


def flags(family: str, model: ModelConfig) -> list[str]:
    """Their tensors that only say that a codebook has been started; ours have no counterpart."""
    if family == "encodec":
        return [f"quantizer.layers.{i}.codebook.inited" for i in range(model.quantizer.n_codebooks)]
    if family == "mimi":
        return [f"{codebook}.initialized" for part in _mimi_codebooks(model).values() for codebook in part]
    return []


def keys_of(family: str, model: ModelConfig) -> list[Match]:
    """The table of a family."""
    return {"dac": dac_keys, "encodec": encodec_keys, "mimi": mimi_keys}[family](model)


def _seanet_encoder(model: ModelConfig) -> list[Match]:
    """First convolution, then residual units, an activation and a strided convolution for each stride."""
    keys, n_units = _affine("encoder.local.0.conv", "encoder.layers.0.conv"), len(model.encoder.dilations)
    for stage in range(len(model.encoder.strides)):
        at = 1 + stage * (n_units + 2)
        for i in range(at, at + n_units):
            keys += _seanet_unit(f"encoder.local.{i}", f"encoder.layers.{i}", model)
        keys += _affine(f"encoder.local.{at + n_units + 1}.conv", f"encoder.layers.{at + n_units + 1}.conv")
    return keys


def _seanet_decoder(model: ModelConfig, first: int, ahead: int) -> list[Match]:
    """Activation, transposed convolution and units for each stride from our layer `first` on, which is theirs + `ahead`."""
    keys, n_units, n_stages = [], len(model.decoder.dilations), len(model.decoder.strides)
    for stage in range(n_stages):
        at = first + stage * (n_units + 2)
        keys += _affine(f"decoder.layers.{at + 1}.conv", f"decoder.layers.{at + 1 + ahead}.conv")
        for i in range(at + 2, at + 2 + n_units):
            keys += _seanet_unit(f"decoder.layers.{i}", f"decoder.layers.{i + ahead}", model)
    last = first + n_stages * (n_units + 2) + 1 + ahead
    return keys + _affine("decoder.to_wav.0.conv", f"decoder.layers.{last}.conv")


def _seanet_unit(ours: str, theirs: str, model: ModelConfig) -> list[Match]:
    keys = _affine(f"{ours}.block.1.conv", f"{theirs}.block.1.conv") + _affine(f"{ours}.block.3.conv", f"{theirs}.block.3.conv")
    shortcut = _affine(f"{ours}.shortcut.conv", f"{theirs}.shortcut.conv")
    return keys + (shortcut if model.encoder.residual_conv_shortcut else [])


def _dac_unit(ours: str, theirs: str) -> list[Match]:
    keys = []
    for i in (1, 2):
        keys += [Match(f"{ours}.block.{2 * i - 2}.alpha", [f"{theirs}.snake{i}.alpha"])]
        keys += _affine(f"{ours}.block.{2 * i - 1}.conv", f"{theirs}.conv{i}")
    return keys


def _transformer(ours: str, theirs: str, n_layers: int) -> list[Match]:
    keys = []
    for i in range(n_layers):
        at, there = f"{ours}.layers.{i}", f"{theirs}.layers.{i}"
        keys += _affine(f"{at}.norm_attention", f"{there}.input_layernorm")
        keys += [Match(f"{at}.to_qkv.weight", [f"{there}.self_attn.{x}_proj.weight" for x in "qkv"], "concatenated"),
                 Match(f"{at}.to_out.weight", [f"{there}.self_attn.o_proj.weight"]),
                 Match(f"{at}.scale_attention", [f"{there}.self_attn_layer_scale.scale"])]  # fmt: skip
        keys += _affine(f"{at}.norm_mlp", f"{there}.post_attention_layernorm")
        keys += [Match(f"{at}.expand.weight", [f"{there}.mlp.fc1.weight"]),
                 Match(f"{at}.contract.weight", [f"{there}.mlp.fc2.weight"]),
                 Match(f"{at}.scale_mlp", [f"{there}.mlp_layer_scale.scale"])]  # fmt: skip
    return keys


def _lstm(ours: str, theirs: str, n_layers: int) -> list[Match]:
    names = [f"{kind}_{side}_l{i}" for i in range(n_layers) for kind in ("weight", "bias") for side in ("ih", "hh")]
    return [Match(f"{ours}.{name}", [f"{theirs}.{name}"]) for name in names]


def _affine(ours: str, theirs: str) -> list[Match]:
    return [Match(f"{ours}.{name}", [f"{theirs}.{name}"]) for name in ("weight", "bias")]


def _mimi_codebooks(model: ModelConfig) -> dict[str, list[str]]:
    """Their codebooks' names, semantic and acoustic."""
    n, n_first = model.quantizer.n_codebooks, model.quantizer.n_first
    return {part: [f"quantizer.{part}_residual_vector_quantizer.layers.{i}.codebook" for i in range(count)]
            for part, count in (("semantic", n_first), ("acoustic", n - n_first))}  # fmt: skip


def _gain_and_direction(key: Match, present: dict) -> list[Match]:
    """The key itself, or two where its weight is kept as gain and direction."""
    stems = [name.removesuffix(".weight") for name in (key.ours, key.theirs[0])]
    if not any(stem + NORM + "0" in present for stem in stems):
        return [key]
    return [Match(stems[0] + NORM + i, [stems[1] + NORM + i]) for i in "01"]


# -------------------------------------------------------------------------- theirs to ours


def read_transformers(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A folder that transformers wrote: our config for it, and its tensors by our names, weight norm in place.

    Raises:
        ValueError: another architecture, a variant we do not have, or tensors that do not fit; one line.
    """
    raw = read_json(folder / "config.json")
    family = raw["model_type"]
    if family not in CONVERTIBLE:
        raise ValueError(f"{folder}: {not_ours(raw)}")
    require_weights(folder)
    model = model_config(to_dict(_their_model(family, raw, folder / "config.json")), f"{folder / 'config.json'}, read as ours")
    where, names = folder / WEIGHTS, state_names(model)
    theirs = {_norm_name(name): value.float() for name, value in load_tensors(where).items()}
    keys = [part for key in keys_of(family, model) for part in _gain_and_direction(key, theirs)]
    expected = {name: shape for key in keys for name, shape in zip(key.theirs, _their_shapes(key, names))}
    problems = misfits({name: theirs[name] for name in theirs if name not in flags(family, model)}, expected)
    if problems:
        fitting = fitting_configs(model, CONFIGS)
        hint = f"configs/{Path(fitting[0]).name}" if fitting else "a config of that shape"
        raise ValueError(f"{where}: does not fit its config.json: {problems}; {hint} wants a complete {family} checkpoint")
    tensors = {key.ours: _join([theirs[name] for name in key.theirs], key.how) for key in keys}
    for name in [name for name in tensors if family == "mimi" and name.endswith("ema_sum")]:
        count = tensors[name.replace("ema_sum", "ema_count")]
        tensors[name.replace("ema_sum", "codebooks")] = tensors[name] / count.clamp(min=USAGE_FLOOR)[..., None]
    return model, with_weight_norm(tensors, names)


def dac_model(theirs: DacConfig) -> ModelConfig:
    """Our config of a DacModel. Its released decoders lose samples at odd strides: no output padding."""
    strides = tuple(theirs.downsampling_ratios)
    return ModelConfig(
        sample_rate=theirs.sampling_rate,
        latent_dim=theirs.hidden_size,
        encoder=ConvEncoderConfig(type="conv", strides=strides, encoder_dim=theirs.encoder_hidden_size),
        quantizer=FactorizedQuantizerConfig("factorized", theirs.n_codebooks, theirs.codebook_size, theirs.codebook_dim,
                                            float(theirs.quantizer_dropout)),  # fmt: skip
        decoder=ConvDecoderConfig(type="conv", strides=strides[::-1], decoder_dim=theirs.decoder_hidden_size,
                                  output="tanh", output_padding=False),  # fmt: skip
    )


def encodec_model(theirs: EncodecConfig) -> ModelConfig:
    """Our config of an EncodecModel: mono, causal, weight-normalised, whole files; as the one for 24 kHz."""
    if theirs.num_lstm_layers < 1:
        raise ValueError(f"num_lstm_layers={theirs.num_lstm_layers}, expected at least 1: we have no other")
    _require(theirs, _seanet_requirements() | {
        "codebook_dim": theirs.hidden_size, "norm_type": "weight_norm", "normalize": False, "chunk_length_s": None,
    })  # fmt: skip
    bits_per_s = theirs.codebook_nbits * theirs.frame_rate
    counts = tuple(int(1000 * kbps // bits_per_s) for kbps in theirs.target_bandwidths)
    body = _seanet_body(theirs) | {"lstm_layers": theirs.num_lstm_layers}
    quantizer = EMAQuantizerConfig("ema", theirs.num_quantizers, theirs.codebook_size, theirs.codebook_dim,
                                   dropout_counts=counts)  # fmt: skip
    return _seanet_model(theirs, body, quantizer)


def mimi_model(theirs: MimiConfig) -> ModelConfig:
    """Our config of a MimiModel."""
    _require(theirs, _seanet_requirements() | {
        "upsample_groups": theirs.hidden_size, "num_key_value_heads": theirs.num_attention_heads,
        "head_dim": theirs.hidden_size // theirs.num_attention_heads, "hidden_act": "gelu", "norm_eps": 1e-5,
        "attention_bias": False, "codebook_dim": theirs.vector_quantization_hidden_dimension,
    })  # fmt: skip
    if theirs.rope_parameters["rope_type"] != "default" or theirs.latent_stride < 2 or theirs.num_semantic_quantizers < 1:
        raise ValueError(f"rope_type={theirs.rope_parameters['rope_type']}, latent_stride="
                         f"{theirs.latent_stride}, num_semantic_quantizers={theirs.num_semantic_quantizers}, expected "
                         "default, at least 2, at least 1: we have no other")  # fmt: skip
    transformer = TransformerConfig(theirs.num_hidden_layers, theirs.num_attention_heads, theirs.intermediate_size,
                                    theirs.sliding_window, theirs.layer_scale_initial_scale,
                                    float(theirs.rope_parameters["rope_theta"]))  # fmt: skip
    body = _seanet_body(theirs) | {"transformer": transformer, "latent_stride": theirs.latent_stride}
    quantizer = EMAQuantizerConfig("ema", theirs.num_quantizers, theirs.codebook_size, theirs.codebook_dim,
                                   n_semantic=theirs.num_semantic_quantizers)  # fmt: skip
    return _seanet_model(theirs, body, quantizer)


def _seanet_requirements() -> dict:
    """What we have one form of only."""
    return {"audio_channels": 1, "kernel_size": 7, "use_causal_conv": True, "trim_right_ratio": 1.0}


def _seanet_body(theirs: EncodecConfig | MimiConfig) -> dict:
    """What encoder and decoder share."""
    if theirs.pad_mode not in PAD_MODES:
        raise ValueError(f"pad_mode={theirs.pad_mode!r}, expected {' | '.join(PAD_MODES)}")
    return {
        "type": "conv",
        "dilations": tuple(theirs.dilation_growth_rate**i for i in range(theirs.num_residual_layers)),
        "causal": True,
        "pad_mode": PAD_MODES[theirs.pad_mode],
        "activation": "elu",
        "last_kernel_size": theirs.last_kernel_size,
        "residual_kernel_size": theirs.residual_kernel_size,
        "residual_compress": theirs.compress,
        "residual_conv_shortcut": theirs.use_conv_shortcut,
    }


def _seanet_model(theirs: EncodecConfig | MimiConfig, body: dict, quantizer: EMAQuantizerConfig) -> ModelConfig:
    strides = tuple(theirs.upsampling_ratios)
    return ModelConfig(
        sample_rate=theirs.sampling_rate,
        latent_dim=theirs.hidden_size,
        encoder=ConvEncoderConfig(strides=strides[::-1], encoder_dim=theirs.num_filters, **body),
        quantizer=quantizer,
        decoder=ConvDecoderConfig(strides=strides, decoder_dim=theirs.num_filters * 2 ** len(strides), output="linear", **body),
        pad_input=False,
    )


def _require(theirs: EncodecConfig | MimiConfig, required: dict) -> None:
    """Refuse a variant that we do not have."""
    for name, value in required.items():
        if getattr(theirs, name) != value:
            raise ValueError(f"{name}={getattr(theirs, name)!r}, expected {value!r}: "
                             "we have no other; configs/encodec_24khz.yaml and mimi.yaml are the forms we have")  # fmt: skip


def _their_model(family: str, raw: dict, path: Path) -> ModelConfig:
    """Our config of what their config.json says, with their defaults for what it leaves out; its values are not checked."""
    from transformers import DacConfig, EncodecConfig, MimiConfig

    kind, read = {"dac": (DacConfig, dac_model), "encodec": (EncodecConfig, encodec_model),
                  "mimi": (MimiConfig, mimi_model)}[family]  # fmt: skip
    try:
        with np.errstate(all="raise"):  # their hop is NumPy's
            return read(kind.from_dict(raw))
    except (ArithmeticError, LookupError, AttributeError, TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"{path}: no {family} that can be converted: {' '.join(str(error).split())}") from None


def _norm_name(name: str) -> str:
    """weight_g and weight_v, which torch's old weight norm wrote, as the new one writes them."""
    for old, new in (("weight_g", "0"), ("weight_v", "1")):
        if name.endswith("." + old):
            return name.removesuffix("." + old) + NORM + new
    return name


def _their_shapes(key: Match, ours: dict[str, torch.Size]) -> list[torch.Size]:
    """Shapes that their tensors must have, given those of ours."""
    shape = ours.get(key.ours) or ours[key.ours.removesuffix(".weight") + NORM + "1"]
    return [part.shape for part in _part(torch.empty(shape, device="meta"), key)]


def _join(parts: list[Tensor], how: str) -> Tensor:
    """Theirs to ours."""
    if how == "stacked":
        return torch.stack(parts)
    if how == "concatenated":
        return torch.cat(parts)
    return parts[0].squeeze(-1) if how == "kernel" else parts[0]


def _part(tensor: Tensor, key: Match) -> list[Tensor]:
    """Ours to theirs."""
    if key.how == "stacked":
        return list(tensor.unbind())
    if key.how == "concatenated":
        return list(tensor.chunk(len(key.theirs)))
    return [tensor[..., None] if key.how == "kernel" else tensor]


# -------------------------------------------------------------------------- ours to theirs


def write_transformers(out: str | Path, model: ModelConfig, tensors: dict[str, Tensor], title: str, training: str) -> None:
    """Write config.json, model.safetensors, preprocessor_config.json and README.md as AutoModel wants them.

    Args:
        tensors: by our names, weight norm in place.
        title, training: of the model card; the title also names the source in errors.
    Raises:
        ValueError: none of their three classes is this model; one line.
    """
    from transformers import DacFeatureExtractor, EncodecFeatureExtractor

    family = their_family(model)
    theirs = their_config(family, model, title)
    if family != "encodec":  # theirs has the weight norm in place, the others are released without
        tensors = without_weight_norm(tensors)
    card = model_card(model, n_weights(tensors), library="transformers", title=title, training=training)
    if family == "mimi":
        tensors = _mimi_statistics(tensors)
    keys = [part for key in keys_of(family, model) for part in _gain_and_direction(key, tensors)]
    named = {name: part.contiguous() for key in keys for name, part in zip(key.theirs, _part(tensors[key.ours], key))}
    if family == "dac":
        extractor = DacFeatureExtractor(sampling_rate=model.sample_rate, hop_length=model.encoder.hop_length)
    else:
        extractor = EncodecFeatureExtractor(sampling_rate=model.sample_rate)
    with new_folder(out) as folder:
        save_file(named | {name: torch.ones(1) for name in flags(family, model)}, folder / WEIGHTS, {"format": "pt"})
        theirs.save_pretrained(folder)
        extractor.save_pretrained(folder)
        write_atomically(folder / "README.md", card)


def their_family(model: ModelConfig) -> str:
    """The one of their classes that comes nearest."""
    if model.quantizer.type == "factorized":
        return "dac"
    return "mimi" if model.quantizer.n_semantic else "encodec"


def their_config(family: str, model: ModelConfig, where: str) -> DacConfig | EncodecConfig | MimiConfig:
    """Their config of our model.

    Raises:
        ValueError: it cannot say what ours does, because reading it back would give another model.
    """
    name = {"dac": "DacModel", "encodec": "EncodecModel", "mimi": "MimiModel"}[family]
    advice = "what configs/dac_*.yaml, encodec_24khz.yaml and mimi.yaml make has a counterpart in transformers"
    problem = _no_counterpart(family, model)
    if problem:
        raise ValueError(f"{where}: {name} cannot be this model: {problem}; {advice}")
    build, read = {"dac": (_dac_config, dac_model), "encodec": (_encodec_config, encodec_model),
                   "mimi": (_mimi_config, mimi_model)}[family]  # fmt: skip
    if model.quantizer.type == "ema" and model.quantizer.n_prosodic:
        model = replace(model, quantizer=replace(model.quantizer, n_semantic=model.quantizer.n_first, n_prosodic=0))
    theirs = build(model)
    theirs.architectures, theirs.dtype = [name], "float32"
    differences = model_differences(read(theirs), model)
    if differences:
        raise ValueError(f"{where}: {name} cannot be this model: {'; '.join(differences[:3])}; {advice}")
    return theirs


def _no_counterpart(family: str, model: ModelConfig) -> str:
    """What keeps even the question from being put to their config; empty if nothing."""
    for name, body in (("encoder", model.encoder), ("decoder", model.decoder)):
        if body.type != "conv":
            return f"model.{name}.type: {body.type} here"
        if family == "mimi" and body.transformer is None:
            return f"model.{name}.transformer: null here"
        if family == "encodec" and not body.lstm_layers:
            return f"model.{name}.lstm_layers: 0 here"
    if model.quantizer.codebook_size & (model.quantizer.codebook_size - 1):
        return f"model.quantizer.codebook_size: {model.quantizer.codebook_size} here, a power of 2 there"
    return ""


def _dac_config(model: ModelConfig) -> DacConfig:
    from transformers import DacConfig

    return DacConfig(
        sampling_rate=model.sample_rate,
        encoder_hidden_size=model.encoder.encoder_dim,
        downsampling_ratios=list(model.encoder.strides),
        decoder_hidden_size=model.decoder.decoder_dim,
        n_codebooks=model.quantizer.n_codebooks,
        codebook_size=model.quantizer.codebook_size,
        codebook_dim=model.quantizer.codebook_dim,
        quantizer_dropout=model.quantizer.dropout,
    )


def _encodec_config(model: ModelConfig) -> EncodecConfig:
    from transformers import EncodecConfig

    n = model.quantizer.n_codebooks
    counts = sorted({*(model.quantizer.dropout_counts or range(1, n + 1)), n})
    theirs = EncodecConfig(
        **_seanet_fields(model),
        num_lstm_layers=model.encoder.lstm_layers,
        codebook_size=model.quantizer.codebook_size,
        codebook_dim=model.latent_dim,  # it has no projections
    )
    theirs.target_bandwidths = [bandwidth_kbps(count, theirs.codebook_nbits * theirs.frame_rate) for count in counts]
    return theirs


def _mimi_config(model: ModelConfig) -> MimiConfig:
    from transformers import MimiConfig

    quantizer, transformer = model.quantizer, model.encoder.transformer
    return MimiConfig(
        **_seanet_fields(model),
        upsample_groups=model.latent_dim,
        num_hidden_layers=transformer.n_layers,
        num_attention_heads=transformer.n_heads,
        num_key_value_heads=transformer.n_heads,
        intermediate_size=transformer.ff_dim,
        sliding_window=transformer.window,
        layer_scale_initial_scale=transformer.layer_scale,
        rope_parameters={"rope_type": "default", "rope_theta": transformer.rope_theta},
        codebook_size=quantizer.codebook_size,
        codebook_dim=quantizer.codebook_dim,
        vector_quantization_hidden_dimension=quantizer.codebook_dim,
        num_quantizers=quantizer.n_codebooks,
        num_semantic_quantizers=quantizer.n_first,  # prosodic ones are more of them: the same residual VQ
    )


def _seanet_fields(model: ModelConfig) -> dict:
    """What EncodecConfig and MimiConfig call alike; where the decoder differs, reading back shows it."""
    encoder = model.encoder
    return {
        "sampling_rate": model.sample_rate,
        "hidden_size": model.latent_dim,
        "num_filters": encoder.encoder_dim,
        "upsampling_ratios": list(encoder.strides[::-1]),
        "num_residual_layers": len(encoder.dilations),
        "dilation_growth_rate": encoder.dilations[1] if len(encoder.dilations) > 1 else 2,
        "pad_mode": {ours: theirs for theirs, ours in PAD_MODES.items()}[encoder.pad_mode],
        "last_kernel_size": encoder.last_kernel_size,
        "residual_kernel_size": encoder.residual_kernel_size,
        "compress": encoder.residual_compress,
        "use_conv_shortcut": encoder.residual_conv_shortcut,
    }


def bandwidth_kbps(n_codebooks: int, bits_per_s: int) -> float:
    """The bandwidth by which EncodecConfig means so many codebooks; it divides in floating point and rounds down."""
    kbps = n_codebooks * bits_per_s / 1000
    return kbps if 1000 * kbps // bits_per_s == n_codebooks else kbps + 1e-6


def _mimi_statistics(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums and counts that give exactly our codebooks, which is all that Mimi has of them.

    Where ours do so already they stay, else the count becomes a power of 2 near it, by which sums divide exactly.
    """
    tensors = dict(tensors)
    for name in [name for name in tensors if name.endswith("codebooks")]:
        codebooks, total, count = (tensors[name.replace("codebooks", kind)] for kind in ("codebooks", "ema_sum", "ema_count"))
        usage = count.clamp(min=USAGE_FLOOR)
        exact = (total / usage[..., None] == codebooks).all(-1)
        power = usage / torch.frexp(usage).mantissa
        tensors[name.replace("codebooks", "ema_count")] = torch.where(exact, count, power)
        tensors[name.replace("codebooks", "ema_sum")] = torch.where(exact[..., None], total, codebooks * power[..., None])
    return tensors
