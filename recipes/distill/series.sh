#!/usr/bin/env bash
# Scratch, feature, affinity, plain KD, DCD and its ablation on one data set, three seeds each, then the table.
#   DUALENC_DATA=… recipes/distill/series.sh flickr8k|fashion [seeds: "0 1 2"] [key=value …]
# Steps that are done are not done again: a run that has its last save returns at once.
set -euo pipefail
set_name=$1 seeds=${2:-"0 1 2"}
overrides=("${@:3}")
python=${PYTHON:-python}
runs=runs/distill
variants=(scratch feature affinity kd dcd dcd_static)
case $set_name in
  flickr8k) build=(split=train) views=(--views 4) tasks=flickr8k ;;
  fashion) build=(hold_out=6 keep=none) views=(--views 4 --plain text) tasks=fashion_retrieval,fashion_types ;;
  *) echo "$set_name: write flickr8k or fashion" >&2; exit 2 ;;
esac
dualenc() { "$python" -m dualenc "$@"; }

if [ ! -d "data/$set_name" ]; then
  dualenc shards build jsonl "path=$DUALENC_DATA/image_text/$set_name/captions.jsonl" "${build[@]}" --out "data/$set_name"
fi
dualenc train "recipes/distill/${set_name}_teacher.yaml"
dualenc embed "$runs/${set_name}_teacher" --recipe "recipes/distill/$set_name.yaml" "${views[@]}" --out "$runs/${set_name}_features"
done=()
for seed in $seeds; do
  for variant in "${variants[@]}"; do
    recipe=recipes/distill/${set_name}_$variant.yaml
    [ "$variant" = scratch ] && recipe=recipes/distill/$set_name.yaml
    out=$runs/${set_name}_${variant}_$seed
    dualenc train "$recipe" "seed=$seed" "out=$out" "${overrides[@]}"
    done+=("$out")
  done
done
dualenc compare "$runs/${set_name}_teacher" "${done[@]}" --tasks "$tasks" --out "$runs/$set_name.html"
