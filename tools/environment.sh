# shellcheck shell=bash
# The Python environment of this repository. To be sourced:
#
#   source tools/environment.sh
#   prepare_environment          # what the package needs
#   prepare_environment tests    # and what its tests need
#   "$python" ...
#
# It is .venv at the root of the repository, or the one that HPM_PYTHON names.

repository="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
environment="$repository/.venv"
python=""

say() { printf '[environment] %s\n' "$*" >&2; }

fail() {
  say "error: $1"
  if (($# > 1)); then printf '  %s\n' "${@:2}" >&2; fi
  exit 1
}

prepare_environment() {
  export PYTHONUNBUFFERED=1
  if [[ -n ${HPM_PYTHON:-} ]]; then
    use_given_environment "$@"
  else
    unset PYTHONPATH PYTHONHOME
    python="$environment/bin/python"
    is_complete "$@" || make_environment "$@"
  fi
}

is_supported() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

# An environment that the user already has: nothing is installed there. A folder with the package
# alone makes it importable; from the root, `datasets` would shadow the library of that name.
use_given_environment() {
  python="$(command -v -- "$HPM_PYTHON" || true)"
  if [[ -z $python || -d $python ]]; then
    fail "HPM_PYTHON=$HPM_PYTHON is no program" \
      "Name a Python interpreter, or leave HPM_PYTHON out: then .venv is made."
  fi
  if [[ $python != /* ]]; then python="$PWD/$python"; fi
  is_supported "$python" || fail "HPM_PYTHON=$HPM_PYTHON is not Python 3.10 to 3.13"
  local modules=(torch einops numpy pandas omegaconf yaml safetensors matplotlib PIL
    tensorboard tqdm av torchvision timm sklearn)
  local missing command="'$python' -m pip install -r '$repository/requirements.txt'"
  if [[ ${1:-} == tests ]]; then
    modules+=(pytest pytest_timeout xdist hypothesis transformers onnx onnxscript onnxruntime ruff pyrefly)
    command+=" -r '$repository/tests/requirements.txt'"
  fi
  # Importing them all would take ten seconds.
  missing="$("$python" -c 'import sys
from importlib.util import find_spec
print(*(name for name in sys.argv[1:] if find_spec(name) is None), sep="\n  ")' "${modules[@]}")"
  [[ -z $missing ]] || fail "the environment of HPM_PYTHON=$HPM_PYTHON lacks modules:" "$missing" \
    "This installs them:" "$command" \
    "(where deepspeed, which is optional, does not build: leave out its line)"
  local place="$repository/build/import"
  mkdir -p -- "$place"
  ln -sfn -- ../../hpm_video "$place/hpm_video"
  export PYTHONPATH="$place${PYTHONPATH:+:$PYTHONPATH}"
}

# Identifies what the environment was made from, and its folder, which an editable install names.
fingerprint() {
  (cd -- "$repository" && pwd && cat -- requirements.txt pyproject.toml tests/requirements.txt) |
    cksum
}

has_stamp() {
  [[ -f $environment/complete-$1 && "$(<"$environment/complete-$1")" == "$(fingerprint)" ]]
}

is_complete() {
  local part
  for part in package "$@"; do has_stamp "$part" || return 1; done
  is_supported "$python"
}

make_environment() {
  local base part
  base="$(find_python)"
  lock "$base"
  if ! is_complete "$@"; then # another start may have made it while this one waited
    if ! is_supported "$python" || ! "$python" -c 'import pip' 2>/dev/null; then
      say "making .venv with $("$base" --version) ($base)"
      "$base" -m venv --clear "$environment" || fail "could not make $environment"
    fi
    for part in package "$@"; do
      if ! has_stamp "$part"; then
        rm -f -- "$environment/complete-$part"
        "install_$part"
        fingerprint >"$environment/complete-$part"
      fi
    done
    say "done in $SECONDS s: $environment"
  fi
  exec 9>&-
}

# The newest supported Python that can make environments.
find_python() {
  local name path
  for name in python3.13 python3.12 python3.11 python3.10 python3 python; do
    path="$(command -v "$name")" && is_supported "$path" || continue
    if "$path" -c 'import venv, ensurepip' 2>/dev/null; then
      printf '%s\n' "$path"
      return
    fi
  done
  fail "no Python 3.10 to 3.13 with its modules venv and ensurepip was found" \
    "Install one (Debian and Ubuntu: sudo apt-get install python3-venv)," \
    "or name one that has everything: HPM_PYTHON=/path/to/python $0"
}

# Locks descriptor 9 until this shell and all its children have closed it. (By Python, because macOS
# has no program flock.)
lock() {
  exec 9<>"$repository/requirements.txt"
  "$1" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
    say "another start is making the environment; waiting for it"
  "$1" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' 2>/dev/null ||
    say "warning: this file system has no locks; start only one at a time until .venv is made"
}

pip_install() {
  "$python" -m pip install --disable-pip-version-check --no-input "$@" >&2 ||
    fail "could not install $*" \
      "Start again to go on from here: what is installed or downloaded already is kept."
}

install_package() {
  local deepspeed tools=("setuptools>=77,<82" wheel ninja packaging py-cpuinfo)
  say "installing requirements.txt into .venv, once: 5 GB with torch for GPUs;"
  say "a few minutes with a fast network, half an hour with a slow one"
  pip_install --upgrade pip "${tools[@]}"
  grep -v '^deepspeed' "$repository/requirements.txt" >"$environment/requirements.txt"
  pip_install -r "$environment/requirements.txt"
  # After torch, which its build imports. It is optional: the default engine is plain torch.
  deepspeed="$(grep '^deepspeed' "$repository/requirements.txt")"
  say "building deepspeed (under a minute)"
  if ! (pip_install --no-build-isolation "$deepspeed"); then
    say "warning: deepspeed did not build; engine.name=deepspeed will not work, all else does"
    say "to try again: '$python' -m pip install --no-build-isolation '$deepspeed'"
  fi
  pip_install --no-deps --no-build-isolation -e "$repository"
}

install_tests() {
  say "installing what the tests need (about a minute)"
  pip_install -r "$repository/tests/requirements.txt"
}
