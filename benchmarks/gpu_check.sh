#!/bin/sh
# The checks and the two benchmarks of docs/performance.md, on a machine with a GPU: benchmarks/gpu_check.sh [FOLDER]
# FOLDER gets the results. Packages that are not installed can come from PYTHONPATH.
set -u
cd "$(dirname "$0")/.."
out=${1:-results}
mkdir -p "$out"
python3 -m benchmarks.gpu_check ${CHECKPOINT:+--checkpoint "$CHECKPOINT"} 2>&1 | tee "$out/gpu_check.log"
for model in vit_base_patch32_clip_quickgelu_224.openai vit_large_patch14_clip_quickgelu_224.openai; do
    python3 -m benchmarks.throughput --model $model --no-pretrained --shards 16 --json "$out/$model.json" \
        2>&1 | tee "$out/$model.log"
done
