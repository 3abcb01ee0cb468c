#!/usr/bin/env bash
set -euo pipefail

usage() {
  usage_of_run "Fine-tune a pre-trained encoder for action or image recognition, then test it.
The demo starts from the weights of ./run_pretrain.sh and runs that first where they are missing."
}

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=tools/launch.sh
source "$root/tools/launch.sh"
prepare_run configs/finetune/demo.yaml "$@"

# The weights that a demo's configuration starts from, unless others are given. A run that was
# interrupted goes on, and one that is complete says so.
demo="$(sed -n 's|^init_weights: runs/\(demo[a-z_]*\)/.*|\1|p' "${arguments[0]}" 2>/dev/null || true)"
if [[ -n $demo && -f configs/pretrain/$demo.yaml && "${arguments[*]}" != *init_weights=* &&
  " ${arguments[*]}" != *" -"* ]]; then
  trap '' PIPE # nobody may read the output any more
  printf '== pre-training of the demo\n' || true
  "$python" tools/launch.py tools/pretrain.py "configs/pretrain/$demo.yaml"
  printf '\n== fine-tuning\n' || true
fi

exec "$python" tools/launch.py tools/finetune.py "${arguments[@]}"
