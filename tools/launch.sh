# shellcheck shell=bash
# Shared by the launch scripts. To be sourced by one that defines `root` and `usage`:
#
#   source "$root/tools/launch.sh"
#   prepare_run DEFAULT "$@"     # sets config, overrides and python, or ends the script
#   start PROGRAM ARGUMENT ...   # in as many processes as GPUS and NNODES say
#   finish PROGRAM ARGUMENT ...  # the same, in place of the script

# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"

config=""
overrides=()
options=() # of the program
dry_run=""

prepare_run() {
  choose_config "$@"
  prepare_environment
  cd -- "$root"
  make_demo_data
}

# usage_of_run ABOUT [MORE]
usage_of_run() {
  local run="./${0##*/}"
  cat <<TEXT
$1

  $run [section.key=value ...]    a demo of some minutes, CPU or GPU
  $run CONFIG [section.key=value ...]    a file, or the name of one in configs/
  $run ... --dry-run [--files=N] [--clips-per-second=N]
      what such a run would do and need; --files stands for lists of videos that are not there yet,
      and --clips-per-second, the speed of all processes together, adds the hours of the run
  HPM_PYTHON=/path/to/python $run ...    in your environment, not in .venv
  GPUS=8 $run ...    in 8 processes, each on a GPU of its own
  GPUS=8 NNODES=2 NODE_RANK=0 MASTER_ADDR=NODE0 $run ...
      on two machines: start this line on each, with its own NODE_RANK
  sbatch tools/slurm/job.sbatch    under slurm; see the comments in that file
${2:+
$2}
Paths inside a configuration or an override start from the root of the repository. After SIGTERM or
Ctrl-C the processes have HPM_GRACE seconds (300 by default) to save the state.
TEXT
}

# Ends the script with an error about the input.
refuse() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# Takes the first argument for the configuration, unless it is an override.
choose_config() {
  config="$1"
  shift
  local argument override='^[A-Za-z_][A-Za-z0-9_.]*='
  for argument in "$@"; do
    case "$argument" in
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) dry_run=yes ;;
      --files=* | --clips-per-second=*) options+=("$argument") ;;
      -*) refuse "unknown option $argument; --help lists all" ;;
      *) overrides+=("$argument") ;;
    esac
  done
  set -- ${overrides[@]+"${overrides[@]}"}
  if (($# == 0)) || [[ $1 =~ $override && ! -f $1 ]]; then return; fi
  local kind="${config%/*}"
  config="$1"
  overrides=("${@:2}")
  if [[ -f $config ]]; then
    config="$(cd -- "$(dirname -- "$config")" && pwd)/$(basename -- "$config")"
  elif [[ -f $root/$kind/$config.yaml ]]; then
    config="$kind/$config.yaml"
  elif [[ -f $root/configs/$config.yaml ]]; then
    config="configs/$config.yaml"
  elif [[ ! -f $root/$config ]]; then
    refuse "no configuration $config, neither in $PWD nor in $root"
  fi
}

start() { "$python" tools/launch.py "$@"; }

finish() {
  exec "$python" tools/launch.py ${dry_run:+--dry-run} "$@" ${options[@]+"${options[@]}"}
}

# prepare.py writes the manifests last: where they exist, the clips and images are complete.
make_demo_data() {
  local manifest given=" ${overrides[*]-} ${options[*]-}"
  if [[ $given == *" data.train="* && $given == *" data.validation="* ]]; then return; fi
  if [[ $given == *" --files="* ]]; then return; fi
  for manifest in $(grep -o 'datasets/demo/[A-Za-z0-9_]*\.csv' "$config" || true); do
    if [[ ! -f $manifest ]]; then
      "$python" datasets/demo/prepare.py
      return
    fi
  done
}
