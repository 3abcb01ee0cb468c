#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'TEXT'
Fine-tune a pre-trained encoder for action or image recognition, then test it.

  ./run_finetune.sh                                    a demo of some minutes, CPU or GPU
  ./run_finetune.sh section.key=value ...              the demo with other settings
  ./run_finetune.sh CONFIG [section.key=value ...]     a configuration of yours or of configs/
  ./run_finetune.sh ... --dry-run                      what such a run would do and need

The demo starts from the weights of ./run_pretrain.sh and runs that first where they are missing.
The first start makes a Python environment in .venv and cuts the demo's clips.
HPM_PYTHON=/path/to/python ./run_finetune.sh uses an environment that you have and installs nothing.

CONFIG is looked up from the current folder, then from the root of the repository.
Paths inside a configuration or an override start from the root of the repository.

TEXT
  processes_usage
}

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=tools/launch.sh
source "$root/tools/launch.sh"
choose_config configs/finetune/demo.yaml "$@"
choose_processes
prepare_environment
cd -- "$root"
make_demo_data

# The weights that a demo's configuration starts from, unless others are given. A run that was
# interrupted goes on, and one that is complete says so.
demo="$(sed -n 's|^init_weights: runs/\(demo[a-z_]*\)/.*|\1|p' "$config")"
if [[ -n $demo && -f configs/pretrain/$demo.yaml && "${overrides[*]-}" != *init_weights=* &&
  -z $dry_run ]]; then
  printf '== pre-training of the demo\n'
  start tools/pretrain.py "configs/pretrain/$demo.yaml"
  printf '\n== fine-tuning\n'
fi

finish tools/finetune.py "$config" ${overrides[@]+"${overrides[@]}"}
