#!/usr/bin/env bash
# The whole main job on one CPU, from raw text to a scored model:   bash examples/quickstart.sh [WORKDIR]
#
# Creates .venv if it is missing; trains a tokenizer; mixes the sample corpus with the same amount of
# junk; preprocesses it; trains the model of examples/tiny.yaml three times on the same data in the
# same order: with weights learned from the LLM's own features (dwm), with weights from an encoder of
# their own, updated every ten steps (dwm_own), and with uniform weights; exports the first and the
# last to Hugging Face; evaluates both on last words; prints a table. WORKDIR (default ./quickstart_run) must
# be new or empty. The environment variables SEED (default 1234) and STEPS (default:
# examples/tiny.yaml's) may be set.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
workdir="${1:-quickstart_run}"
seed="${SEED:-1234}"

case "$workdir" in
-h | --help)
    show_help "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
require_new "$workdir"

. "$repository/tools/environment.sh" eval,report

mkdir -p "$workdir/data" "$workdir/runs" "$workdir/export"
cd "$workdir"
workdir="$PWD"

# part NAME COMMAND...: run a part of the job and record its wall-clock time for the closing table.
part() {
    local name="$1" start=$SECONDS
    shift
    echo
    echo "== $name"
    "$@"
    printf '%s\t%s\n' "$name" $((SECONDS - start)) >>timings.tsv
}

train_dwm() { train data runs/dwm "$seed"; }

# The other two runs, one after the other.
train_others() {
    train data runs/uniform "$seed" --policy.name uniform
    train data runs/dwm_own "$seed" --weighting.encoder own --weighting.update_on fresh
}

# At the same time if there are two cores; the output of the other runs goes to a file.
train_all() {
    if [ "$(nproc)" -lt 2 ]; then
        train_dwm
        train_others
        return
    fi
    set -m # a process group of their own, so that all of it can be ended
    (set -e; train_others) >runs/others.log 2>&1 &
    local others=$!
    set +m
    trap 'kill -- -'"$others"' 2>/dev/null || true' EXIT
    train_dwm
    echo "waiting for the other runs: $workdir/runs/others.log"
    if ! wait "$others"; then
        tail -n 20 runs/others.log >&2
        echo "error: one of the other runs failed, see $workdir/runs/others.log" >&2
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
part tokenizer train_tokenizer data
part junk add_junk data "$seed"
part preprocessing preprocess data
part training train_all
part export export_both
part evaluation evaluate_both
part report python "$tools/report.py" runs/dwm --compare runs/dwm_own runs/uniform \
    --scores export/dwm.json export/uniform.json
echo
python "$repository/examples/closing_table.py" "$workdir"
