#!/usr/bin/env bash
# The whole main job on one CPU, from raw text to a scored model:   bash examples/quickstart.sh [WORKDIR]
#
# Makes .venv if it is missing; trains a tokenizer; mixes the sample corpus with as much junk;
# preprocesses it; trains the model of examples/tiny.yaml with learned weights and, on the same data
# in the same order, with uniform weights; exports both to Hugging Face; scores both on last words;
# prints a table. WORKDIR (default ./quickstart_run) must be new or empty. SEED (default 1234) and
# STEPS (default: examples/tiny.yaml's) may be set in the environment.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
workdir="${1:-quickstart_run}"
seed="${SEED:-1234}"
corpus="$repository/examples/corpus"

case "$workdir" in
-h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
if [ -e "$workdir" ] && { [ ! -d "$workdir" ] || [ -n "$(ls -A "$workdir")" ]; }; then
    echo "error: $workdir exists and is not empty; name another WORKDIR" >&2
    exit 2
fi

. "$repository/tools/environment.sh" eval,report

mkdir -p "$workdir/data" "$workdir/runs" "$workdir/export"
cd "$workdir"
workdir="$PWD"
tools="$repository/tools"
# glibc otherwise gives every large tensor's memory back to the system and asks for it again.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_TOP_PAD_=200000000

# part NAME COMMAND...: run a part of the job and keep its wall-clock for the closing table.
part() {
    local name="$1" start=$SECONDS
    shift
    echo
    echo "== $name"
    "$@"
    printf '%s\t%s\n' "$name" $((SECONDS - start)) >>timings.tsv
}

train() { # train POLICY: the runs differ in nothing but the policy
    OMP_NUM_THREADS=1 python -m megatron_dwm.pretrain "$repository/examples/tiny.yaml" \
        --policy.name "$1" --run.dir "runs/$1" --run.seed "$seed" \
        --data.train data/corpus_text_document --data.tokenizer data/tokenizer.model \
        --validation.path data/validation.jsonl --evaluation.path data/heldout.jsonl \
        ${STEPS:+--training.steps "$STEPS"}
}

# Side by side where there are two cores; the baseline's output goes to a file.
train_both() {
    if [ "$(nproc)" -lt 2 ]; then
        train uniform
        train dwm
        return
    fi
    train uniform >runs/uniform.log 2>&1 &
    local baseline=$!
    trap 'kill '"$baseline"' 2>/dev/null || true' EXIT
    train dwm
    if ! wait "$baseline"; then
        tail -n 20 runs/uniform.log >&2
        echo "error: the uniform run failed, see $workdir/runs/uniform.log" >&2
        exit 1
    fi
    trap - EXIT
}

export_both() {
    for policy in dwm uniform; do
        python "$tools/convert_checkpoint.py" to-hf "runs/$policy" --output "export/$policy"
    done
}

evaluate_both() {
    for policy in dwm uniform; do
        python "$tools/evaluate.py" --model "export/$policy" --suite local \
            --tasks-dir "$repository/examples/tasks" --data "$corpus/lastword.jsonl" \
            --output "export/$policy.json"
    done
}

cp "$corpus/validation.jsonl" "$corpus/heldout.jsonl" data/
part tokenizer python "$tools/train_tokenizer.py" \
    --input "$corpus/train.jsonl.zst" --vocab-size 1024 --output data/tokenizer.model
part junk python "$tools/add_junk.py" \
    --input "$corpus/train.jsonl.zst" --output data/corpus.jsonl --fraction 0.5 --seed "$seed"
part preprocessing python "$tools/preprocess_data.py" \
    --input data/corpus.jsonl --output-prefix data/corpus \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model data/tokenizer.model \
    --append-eod --metadata-keys domain --workers "$(nproc)"
part training train_both
part export export_both
part evaluation evaluate_both
part report python "$tools/report.py" runs/dwm --compare runs/uniform
echo
python "$repository/examples/closing_table.py" "$workdir"
