# shellcheck shell=bash
# What the launch scripts share. To be sourced by one that defines `root` and `usage`:
#
#   source "$root/tools/launch.sh"
#   choose_config DEFAULT "$@"   # sets config and overrides, or ends the script
#   prepare_environment          # sets python, see tools/environment.sh
#   make_demo_data               # where the configuration names what is missing of it

# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"

config=""
overrides=()

# The configuration that the first argument names, unless that is an override.
choose_config() {
  config="$1"
  shift
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
  local override='^[A-Za-z_][A-Za-z0-9_.]*='
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
  overrides=("$@")
}

# prepare.py writes the manifests last: where they are, the clips or the frames are complete.
make_demo_data() {
  local manifests manifest
  manifests="$(grep -o 'datasets/demo/[A-Za-z0-9_]*\.csv' "$config" || true)"
  for manifest in $manifests; do
    if [[ ! -f $manifest ]]; then
      "$python" datasets/demo/prepare.py
      return
    fi
  done
}
