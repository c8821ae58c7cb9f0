#!/usr/bin/env bash
# The whole main job on real speech: fetch, prepare, train, listen. Each command is one a user types.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin} DATA=${DATA:-}
RUN=${RUN:-runs/demo${DATA:+-own}}
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { say "\$ $*"; "$@"; }

if [ -n "$DATA" ]; then
    SPEECH=data/demo/own
    run $BIN/python prepare_speaker_data.py "$DATA" $SPEECH --sample_rate 16000
else
    SPEECH=data/demo/speech
    run $BIN/python demo/fetch_speech.py data/demo/raw
    run $BIN/python prepare_speaker_data.py data/demo/raw $SPEECH --sample_rate 16000 \
        --metadata data/demo/raw/metadata.csv --min_s 0.5 --no_balance
fi
run $BIN/python train_codec_gan.py --config configs/quickstart.yaml --run_dir "$RUN" --resume \
    --set "data.manifest=$SPEECH/manifest.jsonl"
AGAINST=
PATH=$PATH:.tools/bin command -v opusenc >/dev/null && AGAINST="--against opus"
run $BIN/python evaluate_codec.py --checkpoint "$RUN" --manifest "$SPEECH/manifest.jsonl" $AGAINST --n_files 100 --no_speed \
    --metrics pesq_wb,stoi,estoi,mel_db,log_f0_rmse,voicing_error,snr_db,si_sdr_db,amplitude_ratio --out "$RUN/evaluation"
