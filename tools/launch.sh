# shellcheck shell=bash
# Shared by the launch scripts. To be sourced by one that defines `root` and `usage`:
#
#   source "$root/tools/launch.sh"
#   prepare_run DEFAULT "$@"     # sets config, overrides, python and launcher, or ends the script
#   start PROGRAM ARGUMENT ...   # in as many processes as GPUS, NNODES and HOSTFILE say
#   finish PROGRAM ARGUMENT ...  # the same, in place of the script

# shellcheck source=tools/environment.sh
source "$root/tools/environment.sh"

config=""
overrides=()
dry_run=""
processes=1 # of the job
launcher=() # the program and its options that start several processes

prepare_run() {
  choose_config "$@"
  choose_processes
  prepare_environment
  cd -- "$root"
  make_demo_data
}

# usage_of_run ABOUT DEMO [MORE]
usage_of_run() {
  local script
  script="./$(basename -- "$0")"
  cat <<TEXT
$1

  $script$(printf '%36s' '')$2
  $script section.key=value ...              the demo with other settings
  $script CONFIG [section.key=value ...]     a configuration of yours or of configs/
  $script ... --dry-run                      what such a run would do and need
${3:+
$3}
The first start makes a Python environment in .venv and cuts the demo's clips.
HPM_PYTHON=/path/to/python $script uses an environment that you have and installs nothing.

CONFIG is looked up from the current folder, then from the root of the repository.
Paths inside a configuration or an override start from the root of the repository.

Several processes, each on a GPU of its own, or on the CPU where there are no GPUs:

  GPUS=8 ./run_...              on this machine
  GPUS=8 NNODES=2 NODE_RANK=0 MASTER_ADDR=NODE0 ./run_...
                                the same line on each of two machines, with its own NODE_RANK;
                                MASTER_PORT is 29500 unless given
  HOSTFILE=FILE ./run_...       on the machines of FILE, one in each line such as
                                "node0 slots=8"; by DeepSpeed's launcher on others than this one
  sbatch tools/slurm/...        by slurm, see the comments there

After SIGTERM or Ctrl-C they have HPM_GRACE seconds (300) to save.
TEXT
}

# Ends the script with an error about the input: refuse MESSAGE [REMEDY]
refuse() {
  printf 'error: %s\n' "$1" >&2
  if (($# > 1)); then printf '  %s\n' "${@:2}" >&2; fi
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
      -*)
        printf 'error: unknown option %s\n\n' "$argument" >&2
        usage >&2
        exit 2
        ;;
      *) overrides+=("$argument") ;;
    esac
  done
  set -- ${overrides[@]+"${overrides[@]}"}
  if (($# == 0)) || [[ $1 =~ $override && ! -f $1 ]]; then return; fi
  config="$1"
  shift
  overrides=("$@")
  if [[ -f $config ]]; then
    config="$(cd -- "$(dirname -- "$config")" && pwd)/$(basename -- "$config")"
  elif [[ ! -f $root/$config ]]; then
    refuse "no configuration $config, neither in $PWD nor in $root"
  fi
}

# Sets processes and launcher, from GPUS, NNODES and HOSTFILE.
choose_processes() {
  if [[ -n ${HOSTFILE:-} ]]; then
    choose_hosts
    return
  fi
  local gpus="${GPUS:-1}" nodes="${NNODES:-1}" count='^[1-9][0-9]{0,5}$' options=()
  [[ $gpus =~ $count ]] || refuse "GPUS=$gpus must be a whole number of at least 1" \
    "It is the number of processes on this machine, one per GPU: GPUS=8."
  [[ $nodes =~ $count ]] || refuse "NNODES=$nodes must be a whole number of at least 1" \
    "It is the number of machines: NNODES=2."
  processes=$((gpus * nodes))
  if [[ -n $dry_run ]]; then return; fi
  # tools/launch.py checks these.
  if ((nodes > 1)); then options=(--nodes "$nodes"); fi
  if [[ -n ${NODE_RANK:-} ]]; then options+=(--node-rank "$NODE_RANK"); fi
  if [[ -n ${MASTER_ADDR:-} ]]; then options+=(--master-addr "$MASTER_ADDR"); fi
  if [[ -n ${MASTER_PORT:-} ]]; then options+=(--master-port "$MASTER_PORT"); fi
  if ((processes > 1)); then
    launcher=(tools/launch.py --processes "$gpus" ${options[@]+"${options[@]}"})
  fi
}

choose_hosts() {
  local name
  for name in GPUS NNODES NODE_RANK; do
    [[ -z ${!name:-} ]] || refuse "$name=${!name} and HOSTFILE=$HOSTFILE are both given" \
      "HOSTFILE says on which machines how many processes start: leave $name out."
  done
  local form="A line is a name and its processes: node0 slots=8"
  [[ -f $HOSTFILE ]] || refuse "HOSTFILE=$HOSTFILE is no file" "Write one. $form"
  # tools/hostfile.py checks the lines.
  processes="$(awk '!/^[ \t]*#/ && $2 ~ /^slots=/ {n += substr($2, 7)} END {print n + 0}' "$HOSTFILE")"
  ((processes)) || refuse "HOSTFILE=$HOSTFILE names no host" "$form"
  HOSTFILE="$(cd -- "$(dirname -- "$HOSTFILE")" && pwd)/$(basename -- "$HOSTFILE")"
  launcher=(tools/launch.py --hostfile "$HOSTFILE")
}

start() { "$python" ${launcher[@]+"${launcher[@]}"} "$@"; }

# A dry run is one process, which gets the number of processes.
finish() {
  if [[ -n $dry_run ]]; then exec "$python" "$@" --dry-run --processes "$processes"; fi
  exec "$python" ${launcher[@]+"${launcher[@]}"} "$@"
}

# prepare.py writes the manifests last: where they exist, the clips and images are complete.
make_demo_data() {
  local manifest given=" ${overrides[*]-} "
  if [[ $given == *" data.train="* && $given == *" data.validation="* ]]; then return; fi
  for manifest in $(grep -o 'datasets/demo/[A-Za-z0-9_]*\.csv' "$config" || true); do
    if [[ ! -f $manifest ]]; then
      "$python" datasets/demo/prepare.py
      return
    fi
  done
}
