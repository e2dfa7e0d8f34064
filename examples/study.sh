#!/usr/bin/env bash
# Seven ways of weighting at equal steps and data order:   bash examples/study.sh WORKDIR [SEED...]
#
# For every SEED (default 1234 1235 1236) this mixes new junk into the sample corpus and trains the
# model of examples/tiny.yaml with uniform weights, with the paper's own encoder (staged and online),
# with the LLM's features (updates on fresh batches and on the training batch), and with two baselines
# without a model. Finished runs are not repeated, so the study can be stopped and started again. Two
# runs at a time if there are two cores: about 12 minutes a seed. The environment variable STEPS
# (default: examples/tiny.yaml's) may be set.
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
    uniform | validation_mixing) ;;
    *) echo --weighting.group global ;;
    esac
    case "$1" in
    uniform) echo --policy.name uniform ;;
    own_staged) echo --weighting.encoder own --weighting.update_on fresh --weighting.mode staged ;;
    own_online) echo --weighting.encoder own --weighting.update_on fresh ;;
    llm_fresh) echo --weighting.encoder llm --weighting.update_on fresh ;;
    llm_training) echo --weighting.encoder llm --weighting.update_on training ;;
    domain_mean) echo --policy.name domain_mean --weighting.update_on fresh ;;
    validation_mixing) echo --policy.name validation_mixing ;;
    esac
}

one_run() { # one_run METHOD SEED
    local run="$workdir/$1.$2"
    echo "$(date +%H:%M:%S) $1, seed $2: $run.log"
    # shellcheck disable=SC2046  # options are words
    train "$workdir/data.$2" "$run" "$2" --run.resume true --training.micro_batch_size 32 \
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
        { train_tokenizer "$data" && add_junk "$data" "$seed" && preprocess "$data"; } >"$data.log"
    fi
    for method in \
        uniform own_staged own_online llm_fresh llm_training domain_mean validation_mixing; do
        echo "$method $seed"
    done
done | xargs -P "$(nproc)" -L 1 bash -c 'one_run "$0" "$1"'
python "$repository/examples/study_table.py" "$workdir"
