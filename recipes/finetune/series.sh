#!/usr/bin/env bash
# Fine-tune one checkpoint of ours in several ways, at equal steps: what the target gains, what the source loses.
#   recipes/finetune/series.sh ["full lit lora anchored"] ["0 1 2"] [key=value …]
# Needs data/flickr8k and data/fashion (see ../image_text). Runs that are done return at once.
set -euo pipefail
variants=${1:-"full lit lora anchored"} seeds=${2:-"0 1 2"}
overrides=("${@:3}")
python=${PYTHON:-python}
runs=runs/finetune
here=$(dirname "$0")
dualenc() { "$python" -m dualenc "$@"; }

for seed in $seeds; do
  source=$runs/source_$seed
  [ -d "$source/checkpoints" ] || dualenc train "$here/source.yaml" "seed=$seed" "out=$source" "${overrides[@]}"
  for variant in $variants; do
    dualenc train "$here/fashion_$variant.yaml" "seed=$seed" "out=$runs/fashion_${variant}_$seed" \
      "checkpoint.init_from=$source" "${overrides[@]}"
  done
done
"$python" "$here/table.py" "$runs" | tee "$runs/table.md"
