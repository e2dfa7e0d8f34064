#!/usr/bin/env bash
# Weights for documents against weights for windows:   bash examples/documents.sh WORKDIR [SEED...]
#
# Cuts the sample corpus and its junk into documents of 30 to 200 tokens, so that a window of 512
# tokens packs good text with junk. For every SEED (default 1234 1235 1236) it trains the model of
# examples/tiny.yaml with uniform weights, with a weight for every window (sample) and with a weight
# for every document; attention stops at the borders of documents in all of them. Finished runs are
# not repeated. Two runs at a time if there are two cores; one at a time takes 10 to 15 minutes a seed.
# The environment variables STEPS and JOBS (runs at a time) may be set.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
case "${1:---help}" in
-h | --help)
    show_help "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
workdir="$1"
shift
seeds=("$@")
[ "$#" -gt 0 ] || seeds=(1234 1235 1236)

. "$repository/tools/environment.sh" eval,report

options_of() { # options_of METHOD: what differs from examples/tiny.yaml
    case "$1" in
    uniform) echo --policy.name uniform --weighting.unit sample ;;
    *) echo --weighting.unit "$1" --weighting.group global --weighting.update_on training --weighting.across_samples true ;;
    esac
}

one_run() { # one_run METHOD SEED
    local run="$workdir/$1.$2"
    echo "$(date +%H:%M:%S) $1, seed $2: $run.log"
    # shellcheck disable=SC2046  # options are words
    train "$workdir/data.$2" "$run" "$2" --run.resume true \
        --data.sequence_length 512 --data.mask_documents true \
        --training.global_batch_size 8 --training.micro_batch_size 8 \
        $(options_of "$1") >"$run.log" 2>&1 || {
        tail -n 20 "$run.log" >&2
        return 1
    }
}

export -f one_run options_of train
export repository corpus workdir

for seed in "${seeds[@]}"; do
    data="$workdir/data.$seed"
    if [ ! -f "$data/corpus_text_document.meta.parquet" ]; then
        mkdir -p "$data"
        {
            train_tokenizer "$data" && add_junk "$data" "$seed"
            mv "$data/corpus.jsonl" "$data/long.jsonl"
            python "$repository/examples/cut_documents.py" --input "$data/long.jsonl" \
                --output "$data/corpus.jsonl" --tokenizer "$data/tokenizer.model" --seed "$seed"
            preprocess "$data"
        } >"$data.log"
    fi
    for method in uniform sample document; do
        echo "$method $seed"
    done
done | xargs -P "${JOBS:-$(nproc)}" -L 1 bash -c 'one_run "$0" "$1"'
python "$repository/examples/study_table.py" "$workdir"
python "$repository/examples/weight_table.py" "$workdir"
