#!/usr/bin/env bash
set -euo pipefail

usage() { usage_of_run "Pre-train with Hard Patches Mining."; }

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=tools/launch.sh
source "$root/tools/launch.sh"
prepare_run configs/pretrain/demo.yaml "$@"
exec "$python" tools/launch.py tools/pretrain.py "${arguments[@]}"
