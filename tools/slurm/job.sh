# shellcheck shell=bash
# What the slurm scripts share. To be sourced by one that defines `root` and `usage`:
#
#   source "$root/tools/slurm/job.sh"
#   run_job PROGRAM DEFAULT_CONFIG "$@"
#
# It prepares environment and demo data once, and starts one launcher per node. HPM_PYTHON names
# an environment that is there already, which all nodes must see, like the repository.
#
# Exit code 75 means that the run was asked to stop and has saved its state, and 143 that the signal
# found it before or after training: the job is queued again, and goes on. So it does after the time
# limit, thanks to --signal. Where slurm itself ends
# a preempted job, --requeue queues it. It is not queued again after success, after an error, or
# after scancel, which ends this script too. Slurm's KillWait is then what the processes have to
# save, 30 seconds unless the cluster says otherwise.

# shellcheck source=tools/launch.sh
source "$root/tools/launch.sh"

run_job() {
  local program="$1" nodes="${SLURM_JOB_NUM_NODES:-1}" hosts code=0
  shift
  choose_config "$@"
  if [[ -n $dry_run ]]; then
    refuse "--dry-run needs no slurm" "Take it to ./run_pretrain.sh or ./run_finetune.sh."
  fi
  prepare_environment
  cd -- "$root"
  make_demo_data
  hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
  start_nodes "$nodes" "${hosts%%$'\n'*}" "$program" "$config" \
    ${overrides[@]+"${overrides[@]}"} || code=$?
  if ((code == 75 || code == 143)); then
    printf 'stopped with its state saved; queued again\n'
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}

# start_nodes NODES FIRST_HOST PROGRAM ARGUMENT ...: one launcher per node, each of which starts a
# process per GPU. The first node to end must not end those that still save. Jobs that share a
# node differ in their port. srun does not take over --cpus-per-task from sbatch.
start_nodes() {
  local nodes="$1" first="$2" options=(--kill-on-bad-exit=0)
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
  # shellcheck disable=SC2016 # SLURM_NODEID is each node's own
  srun "${options[@]}" --ntasks="$nodes" --ntasks-per-node=1 bash -c \
    'exec "$0" tools/launch.py --node-rank "$SLURM_NODEID" "$@"' "$python" \
    --processes "${SLURM_GPUS_ON_NODE:-1}" --nodes "$nodes" --master-addr "$first" \
    --master-port "$((20000 + SLURM_JOB_ID % 10000))" "${@:3}"
}
