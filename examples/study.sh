#!/usr/bin/env bash
# Every method at equal steps:   bash examples/study.sh WORKDIR [SEED...]
#
# For every SEED (default 1234 1235 1236) this mixes new junk into the sample corpus and trains the
# model of examples/tiny.yaml once with every method, and with uniform weights on documents that were
# selected beforehand. All runs of a seed but the selected ones read the same data in the same order.
# The static reference of excess_loss is the last checkpoint of validation_mixing, a model of the same
# size that has seen the target; filter keeps the better half of every pool of two batches by the
# weighting models that own_staged has learned. opus and filter read twice as many samples.
# Finished runs are not repeated, so the study can be stopped and started again. One run a core at a
# time: about an hour a seed on two cores. The environment variables STEPS (default:
# examples/tiny.yaml's), JOBS (runs at a time) and METHODS (names, separated by spaces) may be set.
#
# METHODS="uniform $CHEAPER" compares forms of an update instead, and what they cost, with CHEAPER as
# exact_fresh exact_training ahead_v{1,2,4}_p{1,2} ahead_v4_bf16 alone alone_deferred alone_ahead_v4_p2:
# a direction ahead of the step from 1/v of the passages, 1/p of the micro-batches probed, and weighting
# models that look at each sample alone. These have tiny.yaml's micro-batches of 16.
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

blade="--policy.sync_first_step 200 --policy.sync_interval_steps 200 --policy.reference_steps 60 --policy.reference_learning_rate 1e-3"
no_junk="shuffled_words=0 random_words=0 random_characters=0"

options_of() { # options_of METHOD SEED: what differs from examples/tiny.yaml
    case "$1" in
    uniform | random_half | dsir_half) echo --policy.name uniform ;;
    own_staged) echo --weighting.group global --weighting.encoder own --weighting.update_on fresh --weighting.mode staged ;;
    own_online) echo --weighting.group global --weighting.encoder own --weighting.update_on fresh ;;
    llm_fresh) echo --weighting.group global --weighting.encoder llm --weighting.update_on fresh ;;
    llm_training) echo --weighting.group global --weighting.encoder llm --weighting.update_on training ;;
    domain_mean) echo --policy.name domain_mean --weighting.group global --weighting.update_on fresh ;;
    gradient_alignment) echo --policy.name gradient_alignment --weighting.group global ;;
    greats) echo --policy.name gradient_alignment --weighting.group global --policy.alignment_choice greedy --policy.overlap_unit deviation ;;
    opus) echo --policy.name opus --weighting.pool_batches 2 --policy.overlap_unit deviation ;;
    filter) echo --weighting.encoder own --weighting.load "$workdir/own_staged.$2" --weighting.frozen true --weighting.pool_batches 2 ;;
    similarity | loss_reweighting) echo --policy.name "$1" --weighting.group global ;;
    rho_loss) echo --policy.name excess_loss --weighting.group global --policy.reference "$(last_checkpoint "validation_mixing.$2")" ;;
    rho_1) echo --policy.name excess_loss --weighting.unit token --policy.reference "$(last_checkpoint "validation_mixing.$2")" ;;
    blade_sample) echo --policy.name blade --weighting.group global $blade ;;
    blade_token) echo --policy.name blade --weighting.unit token $blade ;;
    no_junk) echo --policy.name fixed --policy.domain_weights $no_junk ;;
    curriculum) echo --policy.name curriculum ;;
    validation_mixing) echo --policy.name validation_mixing ;;
    exact_fresh | exact_training) echo --training.micro_batch_size 16 --weighting.update_on "${1#exact_}" ;;
    ahead_v*_p*) ahead "$1" ;;
    ahead_v4_bf16) echo --training.micro_batch_size 16 --weighting.update_on ahead --validation.batch_size 8 --weighting.direction_precision bf16 ;;
    alone) echo --training.micro_batch_size 16 --weighting.update_on training --weighting.across_samples false ;;
    alone_deferred) echo --training.micro_batch_size 16 --weighting.update_on training --weighting.across_samples false --weighting.group global ;;
    alone_ahead_v4_p2) echo "$(ahead ahead_v4_p2)" --weighting.across_samples false --weighting.group global ;;
    *)
        echo "error: $1: no method of this study" >&2
        return 2
        ;;
    esac
}

ahead() { # ahead NAME_vN_pM: of 32 passages one in N, of 2 micro-batches one in M
    local passages="${1#*_v}" half=""
    [ "${1##*_p}" = 1 ] || half="--weighting.probe_fraction 0.5"
    # shellcheck disable=SC2086  # options are words
    echo --training.micro_batch_size 16 --weighting.update_on ahead \
        --validation.batch_size "$((32 / ${passages%_p*}))" $half
}

last_checkpoint() { find "$workdir/$1/checkpoints" -maxdepth 1 -name 'step_*' | sort | tail -n 1; }

one_run() { # one_run METHOD SEED
    local run="$workdir/$1.$2" data="$workdir/data.$2" options
    options="$(options_of "$1" "$2")"
    case "$1" in *_half) data="$workdir/$1.data.$2" ;; esac
    echo "$(date +%H:%M:%S) $1, seed $2: $run.log"
    # shellcheck disable=SC2086  # options are words
    train "$data" "$run" "$2" --run.resume true --training.micro_batch_size 32 $options \
        >"$run.log" 2>&1 || {
        tail -n 20 "$run.log" >&2
        return 1
    }
}

prepare() { # prepare SEED: the corpus with junk, and two selections of half its tokens
    local data="$workdir/data.$1"
    [ ! -f "$workdir/dsir_half.data.$1/corpus_text_document.idx" ] || return 0
    mkdir -p "$data"
    if [ ! -f "$data/corpus_text_document.meta.parquet" ]; then
        { train_tokenizer "$data" && add_junk "$data" "$1" && preprocess "$data"; } >"$data.log"
    fi
    choose "$1" random_half random
    choose "$1" dsir_half dsir --target "$corpus/validation.jsonl" \
        --tokenizer "$data/tokenizer.model" --min-words 10
}

choose() { # choose SEED NAME METHOD [options]: half the tokens of the seed's corpus
    local data="$workdir/data.$1" chosen="$workdir/$2.data.$1" method="$3" seed="$1"
    shift 3
    mkdir -p "$chosen"
    cp "$data/tokenizer.model" "$chosen/"
    python "$tools/select_data.py" "$method" --input "$data/corpus_text_document" \
        --output-prefix "$chosen/corpus_text_document" --seed "$seed" \
        --tokens "$(half_the_tokens "$data")" "$@" >"$chosen.log"
}

half_the_tokens() { # half_the_tokens DATA_DIR: of the corpus there; a token takes two bytes
    echo $(($(stat -c %s "$1/corpus_text_document.bin") / 4))
}

runs_of() { # runs_of SEED NAME...: a line for each of these methods that METHODS asks for
    local seed="$1" method
    shift
    for method in "$@"; do
        case " ${METHODS:-$method} " in *" $method "*) echo "$method $seed" ;; esac
    done
}

side_by_side() { xargs -r -P "${JOBS:-$(nproc)}" -L 1 bash -c 'one_run "$0" "$1"'; }

export -f one_run options_of ahead last_checkpoint train
export repository corpus workdir blade no_junk

for seed in "${seeds[@]}"; do
    prepare "$seed"
    runs_of "$seed" uniform validation_mixing llm_training random_half dsir_half loss_reweighting \
        similarity domain_mean no_junk curriculum own_staged own_online llm_fresh \
        blade_sample blade_token opus gradient_alignment greats
    [ -z "${METHODS:-}" ] || runs_of "$seed" exact_fresh exact_training ahead_v{1,2,4}_p{1,2} \
        ahead_v4_bf16 alone alone_deferred alone_ahead_v4_p2
done | side_by_side
for seed in "${seeds[@]}"; do
    runs_of "$seed" rho_loss rho_1 filter
done | side_by_side
python "$repository/examples/study_table.py" "$workdir"
