#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'TEXT'
Pre-train with Hard Patches Mining.

  ./run_pretrain.sh                                    a demo of a few minutes, CPU or GPU
  ./run_pretrain.sh section.key=value ...              the demo with other settings
  ./run_pretrain.sh CONFIG [section.key=value ...]     a configuration of yours or of configs/
  ./run_pretrain.sh ... --dry-run                      what such a run would do and need

The first start makes a Python environment in .venv and cuts the demo's clips.
HPM_PYTHON=/path/to/python ./run_pretrain.sh uses an environment that you have and installs nothing.

CONFIG is looked up from the current folder, then from the root of the repository.
Paths inside a configuration or an override start from the root of the repository.

TEXT
  processes_usage
}

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=tools/launch.sh
source "$root/tools/launch.sh"
choose_config configs/pretrain/demo.yaml "$@"
choose_processes
prepare_environment
cd -- "$root"
make_demo_data
finish tools/pretrain.py "$config" ${overrides[@]+"${overrides[@]}"}
