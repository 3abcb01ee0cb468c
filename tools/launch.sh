# shellcheck shell=bash
# Shared by the launch scripts. To be sourced by one that defines `root` and `usage`:
#
#   source "$root/tools/launch.sh"
#   prepare_run DEFAULT "$@"    # or ends the script
#   "$python" tools/launch.py PROGRAM "${arguments[@]}"    # of which the first is the configuration

# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"

prepare_run() {
  choose_config "$@"
  prepare_environment
  cd -- "$root"
  make_demo_data
}

usage_of_run() {
  local run="./${0##*/}"
  cat <<TEXT
$1

  $run [section.key=value ...]    a demo of some minutes, CPU or GPU
  $run CONFIG [section.key=value ...]    a file, or the name of one in configs/
  $run ... --dry-run    what such a run would do and need; --files=N stands for lists of videos
      that are not there yet, and --clips-per-second=N, of all processes together, adds the hours
  HPM_PYTHON=/path/to/python $run ...    in your environment, not in .venv
  GPUS=8 $run ...    in 8 processes, each on a GPU of its own
  GPUS=8 NNODES=2 NODE_RANK=0 MASTER_ADDR=NODE0 $run ...
      on two machines: start this line on each, with its own NODE_RANK
  sbatch tools/slurm/job.sbatch    under slurm; see the comments in that file

Paths inside a configuration or an override start from the root of the repository. After SIGTERM or
Ctrl-C the processes have HPM_GRACE seconds (300 by default) to save the state.
TEXT
}

# Takes the first argument that is no option and no override for the configuration.
choose_config() {
  local argument config="" others=() override='^[A-Za-z_][A-Za-z0-9_.]*='
  for argument in "${@:2}"; do
    if [[ $argument == -h || $argument == --help ]]; then
      usage
      exit 0
    elif [[ -n $config || $argument == -* || $argument =~ $override ]]; then
      others+=("$argument")
    elif [[ -f $argument ]]; then
      config="$(cd -- "$(dirname -- "$argument")" && pwd)/$(basename -- "$argument")"
    elif [[ -f $root/${1%/*}/$argument.yaml ]]; then
      config="${1%/*}/$argument.yaml"
    elif [[ -f $root/configs/$argument.yaml ]]; then
      config="configs/$argument.yaml"
    else
      config="$argument" # below the root, or the program tells that there is none
    fi
  done
  arguments=("${config:-$1}" ${others[@]+"${others[@]}"})
}

# prepare.py writes the manifests last: where they exist, the clips and images are complete.
make_demo_data() {
  local manifest given=" ${arguments[*]}"
  if [[ $given == *" data.train="* && $given == *" data.validation="* ]]; then return; fi
  if [[ $given == *" --files="* ]]; then return; fi
  for manifest in $(grep -so 'datasets/demo/[A-Za-z0-9_]*\.csv' "${arguments[0]}" || true); do
    if [[ ! -f $manifest ]]; then
      "$python" datasets/demo/prepare.py
      return
    fi
  done
}
