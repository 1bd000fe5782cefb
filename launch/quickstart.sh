#!/usr/bin/env bash
# Train a small Union-of-Experts language model on this machine's CPU, from nothing:
#
#     bash launch/quickstart.sh [section.field=value ...]
#
# Two ranks share the model (tensor parallel 2). Arguments override configs/cpu_quickstart.yaml;
# paths in them are relative to the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment requirements.txt
step "corpus" "$environment/bin/python" tools/make_quickstart_corpus.py runs/data/stdlib
# Two ranks on two cores: more threads would only wait for each other.
export OMP_NUM_THREADS=1
step "training" "$environment/bin/torchrun" --standalone --nproc-per-node 2 \
    -m uoe_parallel.pretrain --config configs/cpu_quickstart.yaml "$@"
