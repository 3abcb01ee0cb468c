#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'TEXT'
Pre-train with Hard Patches Mining.

  ./run_pretrain.sh                                    a demo of a few minutes, CPU or GPU
  ./run_pretrain.sh section.key=value ...              the demo with other settings
  ./run_pretrain.sh CONFIG [section.key=value ...]     a configuration of yours or of configs/

The first start makes a Python environment in .venv and cuts the demo's clips.
HPM_PYTHON=/path/to/python ./run_pretrain.sh uses an environment that you have and installs nothing.

CONFIG is looked up from the current folder, then from the root of the repository.
Paths inside a configuration or an override start from the root of the repository.
TEXT
}

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
config="configs/pretrain/demo.yaml"
override='^[A-Za-z_][A-Za-z0-9_.]*='

case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
  -*)
    printf 'error: unknown option %s\n\n' "$1" >&2
    usage >&2
    exit 2
    ;;
esac
if (($#)) && { [[ ! $1 =~ $override ]] || [[ -f $1 ]]; }; then
  config="$1"
  shift
  if [[ -f $config ]]; then
    config="$(cd -- "$(dirname -- "$config")" && pwd)/$(basename -- "$config")"
  elif [[ ! -f $root/$config ]]; then
    printf 'error: no configuration %s, neither in %s nor in %s\n' "$config" "$PWD" "$root" >&2
    exit 2
  fi
fi

# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"
prepare_environment
cd -- "$root"

# prepare.py writes the manifests last: where they are, the clips are complete.
if grep -q 'datasets/demo/' "$config" &&
  [[ ! -f datasets/demo/train.csv || ! -f datasets/demo/validation.csv ]]; then
  "$python" datasets/demo/prepare.py
fi

exec "$python" tools/pretrain.py "$config" "$@"
