#!/usr/bin/env bash
# Submit the main experiment of the DWM paper, every job after those whose files it reads:
#
#   preprocess -> merge -> uniform, dwm -> transfer -> convert, evaluate (each model) -> report
#
#   bash slurm/pipeline.sh --name paper --input 'corpus/*.jsonl.zst' --tokenizer llama2.model \
#       --validation target.jsonl --config dwm_370m.yaml --target-config transfer_1.3b.yaml
#
#   --name NAME             files are named after it, under the directories of slurm/site.sh
#   --input PATTERN         corpora: a quoted pattern of at least --shards files; a directory, or
#                           hf://DATASET, needs --shards 1
#   --tokenizer FILE        of all models: a SentencePiece .model or a tokenizer.json
#   --tokenizer-type T      default HuggingFaceTokenizer for .json, else SentencePieceTokenizer
#   --metadata-keys KEY     column of the domain, if the records have one
#   --validation FILE       text that the weights should help
#   --config YAML           the model that learns weights; `uniform` trains it without
#   --target-config YAML    the model that `transfer` trains with the learned weighting model
#   --nodes N               nodes of uniform and dwm, default 1
#   --target-nodes N        nodes of transfer, default 1
#   --shards N              tasks that preprocess, at most one a file of the corpus; default 8
#   --links N               jobs in turn for every run, where the time limit is short; default 1
#   --evaluate 'ARGUMENTS'  of tools/evaluate.py, default '--suite dwm'
#   --dry-run               print the jobs, and what tools/plan.py expects of each; submit nothing
#
# A job that fails cancels those after it. If one is refused, those before it are cancelled. After a
# failure, the same command again does what is left; a job whose output is there has nothing to do.
set -euo pipefail
DWM_REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=slurm/lib.sh
. "$DWM_REPOSITORY/slurm/lib.sh"

name='' input='' tokenizer='' tokenizer_type='' metadata_keys='' validation=''
config='' target_config='' nodes=1 target_nodes=1 shards=8 links=1 evaluate='--suite dwm' dry_run=''

while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --dry-run) dry_run=yes ;;
    --name | --input | --tokenizer | --tokenizer-type | --metadata-keys | --validation | --config | \
        --target-config | --nodes | --target-nodes | --shards | --links | --evaluate)
        [ $# -ge 2 ] || fail "pipeline.sh: $1 has no value"
        option="${1#--}"
        printf -v "${option//-/_}" '%s' "$2"
        shift
        ;;
    *) fail "pipeline.sh: unknown option $1; see --help" ;;
    esac
    shift
done

check_options() {
    local option file
    for option in name input tokenizer validation config target_config; do
        [ -n "${!option}" ] || fail "pipeline.sh: --${option//_/-} is missing; see --help"
    done
    [[ "$name" =~ ^[A-Za-z0-9_.][^/]*$ ]] ||
        fail "pipeline.sh: --name: expected a name for files and jobs, without /, got '$name'"
    for option in nodes target_nodes shards links; do
        [[ "${!option}" =~ ^[1-9][0-9]*$ ]] ||
            fail "pipeline.sh: --${option//_/-}: expected a whole number from 1, got '${!option}'"
    done
    for file in "$tokenizer" "$validation" "$config" "$target_config"; do
        [ -f "$file" ] || fail "pipeline.sh: $file: no such file"
    done
    if [[ "$input" != hf://* ]]; then
        check_corpora
    elif [ "$shards" != 1 ]; then
        fail "pipeline.sh: --shards $shards: hf:// has no files to divide; take --shards 1"
    fi
    [ -n "$tokenizer_type" ] || case "$tokenizer" in
    *.json) tokenizer_type=HuggingFaceTokenizer ;;
    *) tokenizer_type=SentencePieceTokenizer ;;
    esac
}

check_corpora() {
    local found
    mapfile -t found < <(compgen -G "$input")
    [ "${#found[@]}" -gt 0 ] || fail "pipeline.sh: --input: no file matches $input"
    [ "$shards" -le "${#found[@]}" ] ||
        fail "pipeline.sh: --shards $shards: a file is not cut, and there are ${#found[@]};" \
            "take at most as many"
}

# in_words DEPENDENCIES
in_words() {
    local text="${1/singleton,/singleton, }"
    text="${text/afterok:/after }"
    [ -z "$text" ] || echo " (${text//:/, })"
}

submitted=()
cancel_submitted() {
    [ "${#submitted[@]}" = 0 ] || scancel "${submitted[@]}"
}

# job NAME DEPENDENCIES SCRIPT [sbatch options] -- ARGUMENTS: submit; sets last to the job's number.
job() {
    local title="$1" after="$2" script="$3"
    shift 3
    if [ -n "$dry_run" ]; then
        last="$title"
        show_job "$title" "$after" "$script" "$@"
        return
    fi
    [ -z "$after" ] || set -- --dependency="$after" "$@"
    last="$(submit_job "$script" --job-name="$name-$title" "$@")"
    submitted+=("$last")
    printf '%-20s job %-8s%s\n' "$title" "$last" "$(in_words "$after")"
}

# show_job NAME DEPENDENCIES SCRIPT [sbatch options] -- ARGUMENTS
show_job() {
    local title="$1" after="$2" script="$3" options=()
    shift 3
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    printf '\n%s%s\n  %s\n' "$title" "$(in_words "$after")" "$script.sbatch${options[*]:+ ${options[*]}}"
    case "$script" in
    pretrain) show_plan "${options[*]}" "$@" ;;
    transfer) # its weighting model is not there yet
        show_plan "${options[*]}" "${@:2}" --weighting.load null --weighting.frozen false \
            --validation.path "$validation"
        echo "  (at most: planned as a run that learns the weights, if the configuration's policy does)"
        ;;
    preprocess) echo "  input: $(input_size), on CPUs; output: about 2 or 4 bytes a token" ;;
    *) echo "  on one node; not planned by tools/plan.py" ;;
    esac
}

input_size() {
    local found
    if [[ "$input" == hf://* ]]; then echo "$input"; else
        mapfile -t found < <(compgen -G "$input")
        du -chL "${found[@]}" | tail -n 1 | cut -f 1
    fi
}

# show_plan OPTIONS ARGUMENTS: GPU hours, memory and disk as tools/plan.py computes them.
show_plan() {
    local job_nodes="${1##*--nodes=}" said
    job_nodes="${job_nodes%% *}"
    shift
    if [ "$DWM_GPUS_PER_NODE" = 0 ] || [ -z "$DWM_GPU" ]; then
        check_configuration "$@"
        echo "  $job_nodes node(s) x $DWM_RANKS_PER_NODE ranks; no GPU in slurm/site.sh, so no plan"
        return
    fi
    said="$(run_tool plan "$@" --brief \
        --gpus "$((job_nodes * DWM_GPUS_PER_NODE))" --gpu "$DWM_GPU" 2> >(grep -v '^warning: ' >&2))" || exit
    echo "  $said"
}

# check_configuration ARGUMENTS: a mistake in a configuration is one line now, and not in a job.
check_configuration() {
    local code=0
    run_tool run_status "$@" >/dev/null || code=$?
    case "$code" in 0 | "$UNFINISHED" | "$STOPPED") ;; *) exit "$code" ;; esac
}

# run_job NAME DEPENDENCIES SCRIPT NODES ARGUMENTS: a training run, as a chain of --links jobs.
run_job() {
    local title="$1" after="$2" script="$3" on="$4" link
    shift 4
    for ((link = 1; link <= links; link++)); do
        job "$title" "$after" "$script" --nodes="$on" -- "$@"
        after="singleton,afterok:$last"
    done
}

# score_job MODEL DEPENDENCY: export and evaluate a run; appends to scored.
score_job() {
    local export="$DWM_RUNS/$name/export"
    job "convert-$1" "$2" convert -- to-hf "$DWM_RUNS/$name/$1" --output "$export/$1"
    # shellcheck disable=SC2086 # several words
    job "evaluate-$1" "afterok:$last" evaluate -- --model "$export/$1" --output "$export/$1.json" $evaluate
    scored+=":$last"
}

read_site
check_options
trap '[ $? = 0 ] || cancel_submitted' EXIT
if [ -n "$dry_run" ]; then load_environment; else mkdir -p "$DWM_RUNS/$name/export"; fi
prefix="$DWM_DATA/$name"
common=(--data.train "${prefix}_text_document" --data.tokenizer "$tokenizer")

# shellcheck disable=SC2086 # no word if there is no key
job preprocess '' preprocess --array="0-$((shards - 1))" -- --input "$input" --output-prefix "$prefix" \
    --tokenizer-type "$tokenizer_type" --tokenizer-model "$tokenizer" --append-eod \
    ${metadata_keys:+--metadata-keys $metadata_keys}
# A single shard has the name of the whole. The pattern is that of these shards only: `NAME-*` has
# those of an experiment `NAME-b`, too, and those that another number of shards has left.
printf -v of '%05d' "$shards"
[ "$shards" = 1 ] || job merge "afterok:$last" merge -- --input "$prefix-?????-of-${of}_text_document.idx" \
    --output-prefix "${prefix}_text_document"
merged="afterok:$last"
run_job uniform "$merged" pretrain "$nodes" "$config" --run.dir "$DWM_RUNS/$name/uniform" \
    "${common[@]}" --policy.name uniform
uniform="afterok:$last"
run_job dwm "$merged" pretrain "$nodes" "$config" --run.dir "$DWM_RUNS/$name/dwm" \
    "${common[@]}" --validation.path "$validation"
dwm="afterok:$last"
run_job transfer "$dwm" transfer "$target_nodes" "$DWM_RUNS/$name/dwm" "$target_config" \
    --run.dir "$DWM_RUNS/$name/transfer" "${common[@]}"
transfer="afterok:$last"
scored=afterok
score_job uniform "$uniform"
score_job dwm "$dwm"
score_job transfer "$transfer"
runs="$DWM_RUNS/$name"
job report "$scored" report -- "$runs/dwm" --compare "$runs/uniform" "$runs/transfer" \
    --scores "$runs/export/"{dwm,uniform,transfer}.json
