#!/usr/bin/env bash
# From text to a model that other programs load, on this machine's CPU:
#
#     bash launch/examples/own_data.sh [TEXT ...] [-- section.field=value ...]
#
# TEXT files are in UTF-8; without any, the source of Python's own standard library is the text. The
# first nine tenths of each file train a byte-level BPE and the model of configs/cpu_own_data.yaml,
# whose fields the last arguments override; on the last tenth it is judged.
#
# WORK   the folder that gets everything; runs/own_data if not set
# VOCAB  ids of the tokenizer; 4096 if not set
# BIN    where python and torchrun are; if not set, .venv is made and used
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

work=${WORK:-runs/own_data}
texts=()
while (($#)) && [[ $1 != -- ]]; do
    texts+=("$(cd "$caller" && realpath -- "$1")")
    shift
done
(($# == 0)) || shift
if [[ -z ${BIN:-} ]]; then
    make_environment requirements.txt
    BIN=$environment/bin
fi
if ((${#texts[@]} == 0)); then
    library=$("$BIN/python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
    texts=("$library"/*.py)
fi

# hold_out: cut each text in two, so that no line is on both sides.
hold_out() {
    local text lines name
    mkdir -p "$work/text/train" "$work/text/held_out"
    for text in "${texts[@]}"; do
        lines=$(wc -l <"$text") name=$(basename "$text" .txt).txt
        head -n $((lines * 9 / 10)) "$text" >"$work/text/train/$name"
        tail -n +$((lines * 9 / 10 + 1)) "$text" >"$work/text/held_out/$name"
    done
}

# Nothing is asked of a network or left in the home folder.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HOME=$work/huggingface
tokenizer=$work/tokenizer.json run=$work/run
step "hold out a tenth" hold_out
# One that is there has made the corpus and the model, if this was started before.
[[ -e $tokenizer ]] || step "tokenizer" "$BIN/python" tools/train_tokenizer.py "$work/text/train" \
    --vocab-size "${VOCAB:-4096}" --output "$tokenizer"
for part in train held_out; do
    step "tokens of $part" "$BIN/python" tools/preprocess_data.py "$work/text/$part" \
        --tokenizer "$tokenizer" --output "$work/data/$part"
done
step "training" "$BIN/torchrun" --standalone --nproc-per-node 2 \
    -m uoe_parallel.pretrain --config configs/cpu_own_data.yaml "run_dir=$run" \
    "data.tokenizer=$tokenizer" "data.train=$work/data/train" \
    "data.validation=$work/data/held_out" "$@"
step "perplexity" "$BIN/python" tools/evaluate.py "$run" "$work"/text/held_out/*.txt
step "text" "$BIN/python" tools/generate.py "$run" --prompt "The " --tokens 60
rm -rf "$work/exported"
step "export" "$BIN/python" tools/convert_checkpoint.py export "$run" "$work/exported"
step "reload in transformers" "$BIN/python" - "$work/exported" <<'PYTHON'
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
prompt = tokenizer("The ", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(prompt, max_new_tokens=40, do_sample=False)[0]))
PYTHON
