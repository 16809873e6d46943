#!/bin/sh
# The checks and the benchmarks of docs/performance.md, on a machine with a GPU: benchmarks/gpu_check.sh [FOLDER]
# FOLDER gets the results; the status is 1 if anything failed. Packages that are not installed can come from PYTHONPATH.
#   CHECKPOINT  trained weights of tf_efficientnet_lite0     PHOTOS  a folder of photographs
#   SHARDS      a folder for the benchmarks' shards, kept    PARTS   of check, b32, l14, two
set -u
cd "$(dirname "$0")/.."
out=${1:-results}
parts=${PARTS:-check b32 l14 two}
if [ -z "${SHARDS:-}" ]; then
    SHARDS=$(mktemp -d)
    trap 'rm -rf "$SHARDS"' EXIT
fi
status=0
mkdir -p "$out"
b32=vit_base_patch32_clip_quickgelu_224.openai
l14=vit_large_patch14_clip_quickgelu_224.openai

throughput() { # NAME ARGUMENTS…
    name=$1
    shift
    python3 -m benchmarks.throughput --no-pretrained --seconds 5 --folder "$SHARDS" ${PHOTOS:+--photos "$PHOTOS"} \
        --json "$out/$name.json" "$@" > "$out/$name.log" 2>&1 || status=1
    tail -n 24 "$out/$name.log"
}

for part in $parts; do
    case $part in
    check)
        python3 -m benchmarks.gpu_check ${CHECKPOINT:+--checkpoint "$CHECKPOINT"} ${PHOTOS:+--photos "$PHOTOS"} \
            ${CHECKS:+--only "$CHECKS"} > "$out/check.log" 2>&1 || status=1
        tail -n 24 "$out/check.log"
        ;;
    b32)
        CUDA_VISIBLE_DEVICES=0 throughput b32 --model $b32 --shards 64 \
            --only decode_fast,decode_damaged,model,flow,command,plain_script,pipeline_a_shard
        ;;
    l14)
        CUDA_VISIBLE_DEVICES=0 throughput l14 --model $l14 --shards 32 --compile \
            --only model_compiled,model_float8,flow,command,pipeline_a_shard
        ;;
    two) # what one GPU did is l14's
        throughput two --model $l14 --shards 64 --compile --only flow
        ;;
    esac
done
exit $status
