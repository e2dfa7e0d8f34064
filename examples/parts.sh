# Sourced by quickstart.sh and sweep.sh: the environment, the sample corpus, one training run.

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
corpus="$repository/examples/corpus"
tools="$repository/tools"
# Otherwise glibc returns every large tensor's memory to the system and requests it again.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_TOP_PAD_=200000000

# show_help SCRIPT: print the comment at its head.
show_help() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$1"; }

# require_new DIRECTORY: exit with one line unless it is new or empty.
require_new() {
    if [ -e "$1" ] && { [ ! -d "$1" ] || [ -n "$(ls -A "$1")" ]; }; then
        echo "error: $1 exists and is not empty; name another WORKDIR" >&2
        exit 2
    fi
}

train_tokenizer() { # train_tokenizer DATA_DIR
    python "$tools/train_tokenizer.py" \
        --input "$corpus/train.jsonl.zst" --vocab-size 1024 --output "$1/tokenizer.model"
}

add_junk() { # add_junk DATA_DIR SEED: as much junk as text
    python "$tools/add_junk.py" \
        --input "$corpus/train.jsonl.zst" --output "$1/corpus.jsonl" --fraction 0.5 --seed "$2"
}

preprocess() { # preprocess DATA_DIR
    python "$tools/preprocess_data.py" \
        --input "$1/corpus.jsonl" --output-prefix "$1/corpus" \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$1/tokenizer.model" \
        --append-eod --metadata-keys domain --workers "$(nproc)"
}

train() { # train DATA_DIR RUN_DIR SEED [options]: examples/tiny.yaml with these options
    local data="$1" run="$2" seed="$3"
    local target="$corpus/validation.jsonl"
    shift 3
    case " $* " in *" --policy.name uniform "*) target="" ;; esac # it reads none and refuses the key
    OMP_NUM_THREADS=1 python -m megatron_dwm.pretrain "$repository/examples/tiny.yaml" \
        --run.dir "$run" --run.seed "$seed" \
        --data.train "$data/corpus_text_document" --data.tokenizer "$data/tokenizer.model" \
        ${target:+--validation.path "$target"} --evaluation.path "$corpus/heldout.jsonl" \
        ${STEPS:+--training.steps "$STEPS"} "$@"
}
