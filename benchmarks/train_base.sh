#!/usr/bin/env bash
# The package's own model from nothing, some five hours on 2 cores; what each stage brings: docs/speedrun.md.
#     PATH=$PWD/.venv/bin:$PATH bash benchmarks/train_base.sh
# Stopped, it goes on where it was. PRECISION=fp32 where the CPU has no instructions for bf16 (train_codec_gan.py warns).
set -euo pipefail
cd "$(dirname "$0")/.."
speech=data/wide/speech bf16=train.precision=${PRECISION:-bf16}
all=data.manifest=$speech/manifest.jsonl clear=data.manifest=$speech/clear.jsonl
train() { python train_codec_gan.py --resume --config "configs/$1.yaml" --run_dir "runs/$2" --set "$bf16" "${@:3}"; }
mean() { [ -e "runs/$4" ] || python benchmarks/mean_of_weights.py "runs/$1" "runs/$2" "$3" "runs/$4" "${@:5}"; }

if [ ! -e $speech/clear.jsonl ]; then
    make eval  # two of the packages need its PyAV
    python benchmarks/base_speech.py data/wide/raw --wide
    python prepare_speaker_data.py data/wide/raw $speech --sample_rate 24000 --metadata data/wide/raw/metadata.csv \
        --min_s 0.3 --no_balance
    # the dialogues of one game were recorded poorly, and what the last stages hear is what is to be sounded like
    grep -v '"speaker": "fi_' $speech/manifest.jsonl > $speech/clear.jsonl
fi
[ -e data/teachers/whisper-base ] || python benchmarks/distillation/teachers.py data/teachers

# encoder, codebooks and decoder, without adversary; then with a recogniser that listens
train base_cpu base_cpu "$all"
train base_cpu_heard base_cpu_heard "$all"
train base_cpu_heard base_cpu_louder "$all" train.init_from=runs/base_cpu_heard loss_weights.whisper=1.0
mean base_cpu_louder base_cpu_heard 0.5 base_cpu_between --all

# the decoder, with adversary
short=(train.refit_frames=0 train.disc_warmup_steps=0 optim.lr_g=2.5e-4 optim.lr_d=5.0e-4 optim.warmup_steps=50 optim.ema_decay=0.998)
train base_cpu_finish base_cpu_finish "$clear"
train base_cpu_finish base_cpu_clear "$clear" "${short[@]}" train.init_from=runs/base_cpu_finish loss_weights.cspec=10 \
    "phases=[{name: last, steps: 500, set: {loss_weights.adv: 0.1, loss_weights.feat: 0.4}}]"
train base_cpu_finish base_cpu_last "$clear" "${short[@]}" train.init_from=runs/base_cpu_clear loss_weights.cspec=20 \
    "phases=[{name: last, steps: 500, set: {loss_weights.adv: 0.05, loss_weights.feat: 0.2}}]"

# the encoder once more, for more codebooks
train base_cpu_heard told "$all" train.init_from=runs/base_cpu_last train.seed=7 \
    model.quantizer.n_codebooks=16 "model.quantizer.dropout_counts=[4, 8, 12]" loss_weights.whisper=1.5 \
    loss_weights.cspec=10 "discriminators.sets=[{type: mrd, windows: [1536, 384], channels: 16}]" \
    "phases=[{name: heard, steps: 1200, set: {loss_weights.adv: 0.0, loss_weights.feat: 0.0}}]"
mean told base_cpu_last 0.5 told_mean

# the 14 codebooks that fit into 6 kbps, and the decoder for them
fourteen=(train.disc_warmup_steps=0 optim.warmup_steps=100 optim.ema_decay=0.998 loss_weights.cspec=10
    model.quantizer.n_codebooks=14 "model.quantizer.dropout_counts=[4, 8]")
train base_cpu_finish fine "$clear" "${fourteen[@]}" train.init_from=runs/told_mean train.seed=8 \
    train.refit_frames=200000 loss_weights.whisper=3.5 \
    "phases=[{name: finish, steps: 900, set: {loss_weights.adv: 0.2, loss_weights.feat: 0.8}},
             {name: settle, steps: 400, set: {loss_weights.adv: 0.1, loss_weights.feat: 0.4}}]"
train base_cpu_finish words "$clear" "${fourteen[@]}" train.init_from=runs/fine train.seed=9 \
    train.refit_frames=0 loss_weights.whisper=6 \
    "phases=[{name: finish, steps: 3200, set: {loss_weights.adv: 0.2, loss_weights.feat: 0.8}},
             {name: settle, steps: 1600, set: {loss_weights.adv: 0.1, loss_weights.feat: 0.4}}]"
mean words fine 0.3 words_mean
codec prior runs/words_mean $speech/manifest.jsonl --hours 2
