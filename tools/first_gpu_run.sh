#!/usr/bin/env bash
# What this machine makes of megatron_dwm, in 15 minutes to an hour:   bash tools/first_gpu_run.sh [WORKDIR]
#
# For one to eight GPUs on one machine, and without the network: the doctor; the GPU tests; time and
# memory of steps and hypergradients against plain Megatron-Core, in bf16 and in FP8; a short DWM run in
# both; its alignments in FP8 against those in bf16. The parts that the machine cannot run are named and
# left out, on a CPU too. WORKDIR (default ./first_gpu_run) must be new or empty. It gets every part's
# output and report.md, a benchmark submission: docs/verified.md says what to do with it. Exits with 1
# if a part fails.
#
# Environment: PYTHON is an interpreter in which the package is installed (default: .venv's, else
# python). SIZES is full (default on a GPU: 370M parameters), laptop (default on a CPU) or tiny.
# PERFORMED_BY is who the report says has run it.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/../examples/parts.sh"
workdir="${1:-first_gpu_run}"
case "$workdir" in
-h | --help)
    show_help "${BASH_SOURCE[0]}"
    exit 0
    ;;
-*)
    echo "error: unknown option $workdir; see --help" >&2
    exit 2
    ;;
esac
[ $# -le 1 ] || { echo "error: expected one WORKDIR, got $# words; see --help" >&2 && exit 2; }
case "${SIZES:-}" in
"" | full | laptop | tiny) ;;
*)
    echo "error: SIZES=$SIZES: expected full, laptop or tiny" >&2
    exit 2
    ;;
esac
require_new "$workdir"
# The settings of parts.sh for a run's heap would change the measured peaks of memory.
unset MALLOC_MMAP_MAX_ MALLOC_TRIM_THRESHOLD_ MALLOC_TOP_PAD_

cd "$repository"
python="${PYTHON:-}"
[ -n "$python" ] || { [ -x .venv/bin/python ] && python="$PWD/.venv/bin/python"; } || python=python
if ! "$python" -c "import megatron_dwm" 2>/dev/null; then
    echo "error: $python has no megatron_dwm; install it (docs/gpu.md), or name another with PYTHON=" >&2
    exit 2
fi
cd - >/dev/null
export PATH="$(dirname "$(command -v "$python")"):$PATH" PYTHONWARNINGS=ignore OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

mkdir -p "$workdir"
workdir="$(cd "$workdir" && pwd)"
cd "$repository"
# GPUS, PROCESSES, SIZES, NO_FP8 (why there is none), NO_TESTS (why they cannot run), TESTS_AT_ONCE
machine="$("$python" tools/first_run.py machine)"
eval "$machine"

running=''
trap 'kill "$running" 2>/dev/null || true; exit 130' INT
trap 'kill "$running" 2>/dev/null || true; exit 143' TERM

# part NAME LIMIT_S COMMAND...: run it, keep its output, and note how it ended.
part() {
    local name="$1" limit_s="$2" start=$SECONDS code=0
    shift 2
    echo "== $name"
    # In the background, so that an interrupt reaches this script, which ends the part.
    timeout "$limit_s" "$@" >"$workdir/$name.out" 2>"$workdir/$name.err" &
    running=$!
    wait "$running" || code=$?
    [ "$code" = 0 ] || { echo "   failed with $code, see $workdir/$name.err" && failed=1; }
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" $((SECONDS - start)) "$*" >>"$workdir/parts.tsv"
}

# skip NAME REASON: note that a part is left out.
skip() {
    echo "== $1: left out: $2"
    printf '%s\tleft out\t0\t%s\n' "$1" "$2" >>"$workdir/parts.tsv"
}

# The words that start a Python program in all processes, where that is what a part tests.
job=("$python")
[ "$PROCESSES" = 1 ] || job+=(-m torch.distributed.run --standalone --nproc-per-node "$PROCESSES")

case "$PROCESSES" in
1) layout="" bench="" ;;
2) layout="--parallel.tensor 2" bench="--tensor 2" ;;
*) layout="--parallel.tensor 2 --parallel.pipeline 2" bench="--tensor 2 --pipeline 2" ;;
esac
steps=200
model="--model.hidden_size 512 --model.num_layers 8 --model.num_attention_heads 8"
model="$model --model.num_query_groups 8 --model.ffn_hidden_size 1536 --training.micro_batch_size 8"
case "$SIZES" in
full)
    sizes="--layers 24 --hidden 1024 --heads 16 --ffn 2816 --vocab 32000 --sequence 1024"
    sizes="$sizes --batch 16 --micro-batch 8 --repeats 10"
    ;;
laptop)
    sizes="--repeats 5 --warm-up 1" model=""
    ;;
tiny)
    sizes="--layers 2 --hidden 32 --heads 4 --ffn 64 --vocab 256 --sequence 16 --batch 8"
    sizes="$sizes --micro-batch 4 --repeats 2 --warm-up 1"
    model="" steps=60
    ;;
esac

failed=0
# shellcheck disable=SC2086 # options are words
{
    part doctor 300 "${job[@]}" -m megatron_dwm.doctor $layout
    if [ -n "$NO_TESTS" ]; then
        skip gpu_tests "$NO_TESTS"
    else
        part gpu_tests 1200 "$python" -m pytest -m gpu tests/gpu -rs -p no:cacheprovider $TESTS_AT_ONCE
    fi
    for precision in bf16 fp8; do
        if [ "$precision" = fp8 ] && [ -n "$NO_FP8" ]; then
            skip step_fp8 "$NO_FP8"
            skip hypergradient_fp8 "$NO_FP8"
            continue
        fi
        part "step_$precision" 300 "$python" tools/benchmark.py step $sizes --precision $precision
        part "hypergradient_$precision" 300 "$python" tools/benchmark.py hypergradient $sizes \
            --precision $precision --memory-repeats 1
    done
    if [ "$PROCESSES" = 1 ]; then
        skip hypergradient_layout "needs two or more GPUs, this machine has $GPUS"
    else
        part hypergradient_layout 300 "${job[@]}" tools/benchmark.py hypergradient $sizes \
            --precision bf16 $bench
    fi
    part data 300 bash -c 'set -e; . examples/parts.sh; mkdir "$0"; train_tokenizer "$0"; add_junk "$0" 1234; preprocess "$0"' \
        "$workdir/data"
    for precision in bf16 fp8; do
        if [ "$precision" = fp8 ] && [ -n "$NO_FP8" ]; then
            skip dwm_fp8 "$NO_FP8"
            continue
        fi
        part "dwm_$precision" 300 "${job[@]}" -m megatron_dwm.pretrain examples/tiny.yaml \
            --run.dir "$workdir/runs/dwm_$precision" --data.train "$workdir/data/corpus_text_document" \
            --data.tokenizer "$workdir/data/tokenizer.model" \
            --validation.path examples/corpus/validation.jsonl \
            --evaluation.path examples/corpus/heldout.jsonl --evaluation.interval_steps $steps \
            --training.steps $steps --model.precision $precision $model $layout
    done
    part alignments 300 "$python" examples/fp8_alignments.py "$workdir/runs/dwm_bf16" --batches 4
}

"$python" tools/first_run.py report "$workdir"
echo "$workdir/report.md"
exit "$failed"
