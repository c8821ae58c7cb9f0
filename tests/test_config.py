from pathlib import Path

import pytest
from conftest import TINY, tiny_config

from codec.config import dump_config, load_config, parse_config, phase_at, phase_config
from codec.discriminator import Discriminators
from codec.model import Codec

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


LAPPED = "model.encoder={{type: lapped, window_length: {}, hop_length: {}, n_fft: {}, n_envelope: 2, dim: 8, n_blocks: 1}}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_is_valid_builds_and_survives_a_round_trip(path):
    config = load_config(path)
    assert parse_config(dump_config(config), "again") == config
    assert config.name == path.stem
    codec, discriminators = Codec(config.model), Discriminators(config.discriminators)
    assert sum(p.numel() for p in codec.parameters()) > 1e5
    assert len(list(discriminators.parameters())) > 0 or not config.discriminators.sets


@pytest.mark.parametrize(
    "override, said",
    [
        ("data.sgement_samples=1", "data.sgement_samples is not a known key; did you mean data.segment_samples?"),
        ("data.segment_samples=2001", "not a multiple of hop_length=20 (strides [4, 5]); try 2000 or 2020"),
        ("data.batch_size=1.5", "data.batch_size=1.5, expected int"),
        ("train.compile=1", "train.compile=1, expected bool"),
        ("optim.lr_g=fast", "optim.lr_g='fast', expected float"),
        ("model.encoder.type=cnov", "model.encoder.type='cnov', expected conv | spectral | lapped"),
        ("losses.adversarial=hing", "losses.adversarial='hing', expected hinge | least_squares | bce"),
        ("model.decoder.strides=[4, 4]", "model.decoder has hop_length 16, model.encoder 20"),
        ("loss_weights.codebook=1.0", "EMA codebooks take no gradient"),
        ("phases.1.set={data.batch_size: 2}", "cannot change between phases"),
        ("phases.1.set={loss_weights.addv: 2}", "did you mean loss_weights.adv?"),
        ("phases.9.steps=1", "no such place in the config"),
        ("discriminators.sets=[]", "discriminators.sets is empty"),
        ("data.segments_per_epoch=2", "less than one batch"),
        ("data.speeds=[1.0,0.3]", "data.speeds=[1.0, 0.3], expected numbers from 0.5 to 2 with two digits, as 0.95"),
        ("data.speeds=[0.955]", "with two digits"),
        ("losses.mel_bins=[10]", "they go in pairs"),
        ("losses.bands_counts=[40]", "losses.bands_frames=[3, 7], expected numbers of at least 1, in pairs"),
        ("losses.bands_frames=[3, 0]", "losses.bands_frames=[3, 0], expected numbers of at least 1, in pairs"),
        ("nonsense", "expected key=value"),
        ("model.encoder.type=[conv]", "expected conv | spectral | lapped"),
        (LAPPED.format(41, 40, 80), "expected even numbers, window_length above hop_length and at most twice as long"),
        (LAPPED.format(20, 20, 80), "expected even numbers, window_length above hop_length and at most twice as long"),
        (LAPPED.format(42, 20, 80), "expected even numbers, window_length above hop_length and at most twice as long"),
        (LAPPED.format(30, 20, 81), "model.encoder.n_fft=81, expected an even number, at least 40, twice the samples"),
        (LAPPED.format(30, 20, "8, n_spectra: 4"), "model.encoder.n_fft=8, expected an even number, at least 10, twice the"),
        (LAPPED.format(30, 20, "80, n_spectra: 3"), "model.encoder.n_spectra=3, expected a divisor of hop_length=20"),
        (LAPPED.format(30, 20, "80, n_spectra: 0"), "model.encoder.n_spectra=0, expected at least 1"),
        (LAPPED.format(30, 20, "80, kernel_size: 4"), "model.encoder.kernel_size=4, expected an odd number"),
        (LAPPED.format(30, 20, 80), "are to be lapped both, with the same window_length, n_fft, n_envelope, n_spectra"),
        ("model.quantizer.dropout=1.5", "model.quantizer.dropout=1.5, expected 0 to 1"),
        ("losses.cspec_phase_share=1.5", "losses.cspec_phase_share=1.5, expected 0 to 1"),
        ("losses.cspec_power=-0.3", "losses.cspec_power=-0.3, expected 0 to 1"),
        ("train.seed=-1", "train.seed=-1, expected at least 0"),
        ("optim.lr_g=.nan", "optim.lr_g=nan, expected at least 0"),
        ("loss_weights.mel=-1", "loss_weights.mel=-1.0, expected at least 0"),
        ("model.decoder.decoder_dim=18", "cannot be halved 2 times; try a multiple of 4"),
        ("model.encoder.strides=[20, 1]", "expected numbers of at least 2"),
        ("discriminators.sets.0.windows=[4096]", "but a segment has 2000 samples"),
        ("losses.mel_windows=[128, 4096]", "but a segment has 2000 samples"),
        ("model.encoder={type: spectral, n_fft: 20, hop_length: 20, dim: 8, n_blocks: 1}", "n_fft above hop_length"),
        ("phases=[]", "phases is empty"),
        ("model.encoder={type: spectral, n_fft: 41, hop_length: 20, dim: 8, n_blocks: 1}", "an even n_fft"),
        ("model.encoder={type: spectral, n_fft: 40, hop_length: 20, dim: 8, n_blocks: 0}", "model.encoder.n_blocks=0"),
        ("model.encoder.dilations=[1, 0]", "model.encoder.dilations=[1, 0], expected numbers of at least 1"),
        ("model.encoder.residual_compress=5", "model.encoder.residual_compress=5, expected at most 4, the narrowest width"),
        ("model.decoder.residual_compress=5", "model.decoder.residual_compress=5, expected at most 4, the narrowest width"),
        ("model.encoder.lstm_layers=999999999", "model.encoder.lstm_layers=999999999, expected 0 to 16"),
        ("model.encoder.transformer={n_layers: 1, n_heads: 2, ff_dim: 8, window: 4, layer_scale: .inf}", "layer_scale=inf"),
        ("model.encoder.transformer={n_layers: 1, n_heads: 2, ff_dim: 8, window: 4, rope_theta: .inf}", "rope_theta=inf"),
        ("model.encoder.transformer={n_layers: 999, n_heads: 2, ff_dim: 8, window: 4}", "n_layers=999, expected 1 to 256"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_key_and_the_mend(override, said):
    with pytest.raises(ValueError) as error:
        tiny_config([override])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_levels_are_not_averaged_over_more_than_a_segment():
    said = r"losses.bands_frames in samples=\[384, 2560\], but a segment has 2000 samples"
    with pytest.raises(ValueError, match=said):
        tiny_config(["loss_weights.bands=1.0", "losses.bands_frames=[3, 20]"])


def test_a_missing_key_and_a_key_given_twice_are_named():
    with pytest.raises(ValueError, match="optim is missing"):
        parse_config(TINY.replace("optim: {lr_g: 1.0e-3, lr_d: 1.0e-3}\n", ""), "a.yaml")
    with pytest.raises(ValueError, match="'name' stands twice"):
        parse_config(TINY + "\nname: other\n", "a.yaml")
    with pytest.raises(ValueError, match="no such config file"):
        load_config("missing.yaml")


def test_a_number_that_yaml_reads_as_text_is_still_a_number():
    assert tiny_config(["optim.lr_g=2e-4"]).optim.lr_g == 2e-4  # YAML 1.1 wants 2.0e-4


def test_phases_follow_one_another_and_override_only_their_own_steps():
    config = tiny_config()
    assert [phase_at(config, step) for step in range(8)] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert phase_config(config, 0).loss_weights.adv == 0.0
    assert phase_config(config, 1).loss_weights.adv == 1.0
    assert config.total_steps == 8
