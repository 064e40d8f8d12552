# shellcheck shell=bash
# What the scripts beside it share: flags, errors for people, --dry-run, and what the cloud calls a topology.
# Works in bash 3.2 (macOS) and newer.

zone="" project="" ssh="" dry_run="" name=""
words=() command=()

# A wrong call: one line, exit code 2.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# What --help prints: the script's own header.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# parse "--zone= --spot ..." "$@": sets one variable per flag (a flag with = takes a value, the others become 1), the plain
# words into `words`, and what follows -- into `command`. --dry-run and --help belong to every script.
parse() {
  local legal=" $1 --dry-run --help " flag
  shift
  while (($#)); do
    flag=${1%%=*}
    case $1 in
      --)
        shift
        command=("$@")
        return
        ;;
      --help | -h)
        usage
        exit 0
        ;;
      --*)
        if [[ $legal == *" $flag= "* ]]; then
          if [[ $1 != *=* ]]; then
            (($# > 1)) || fail "$flag needs a value: $flag=..."
            set -- "$flag=$2" "${@:3}"
          fi
          [[ -n ${1#*=} ]] || fail "$flag is empty: $flag=... needs a value"
          assign "$flag" "${1#*=}"
        elif [[ $legal == *" $1 "* ]]; then
          assign "$flag" 1
        else
          fail "$1 is not a flag of $(basename "$0"), which takes$(tr -s ' ' <<<"${legal% }") (see --help)"
        fi
        ;;
      *) words+=("$1") ;;
    esac
    shift
  done
}

assign() {
  local variable=${1#--}
  printf -v "${variable//-/_}" %s "$2"
}

# The one plain word: what the TPUs are called. Lower-case, as both the Cloud TPU API and Kubernetes want it.
take_name() {
  ((${#words[@]} == 1)) ||
    fail "give one NAME, found ${#words[@]}: ${words[*]-} (see $(basename "$0") --help)"
  name=${words[0]}
  [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "NAME is '$name': use at most 40 lower-case letters, digits and hyphens, a letter first"
}

# The command behind --, which must be there.
take_command() {
  ((${#command[@]})) || fail "no command: put it behind --, as in $(basename "$0") NAME -- $1"
}

# A whole number from the lowest value on: take_number --restarts "$restarts" 0
take_number() {
  [[ $2 =~ ^[0-9]{1,6}$ && $2 -ge $3 ]] || fail "$1=$2: use a whole number from $3 on"
}

need() {
  [[ -n $dry_run ]] || type "$1" >/dev/null 2>&1 || fail "$1 is not installed: see $2"
}

# Zone and project, from the flags or from gcloud's own settings, into `where`.
take_place() {
  need gcloud https://cloud.google.com/sdk/docs/install
  [[ -n $zone ]] || zone=$(setting compute/zone)
  [[ -n $zone ]] ||
    fail "no zone: add --zone=us-east5-a, say, or set one for good: gcloud config set compute/zone us-east5-a"
  [[ -n $project ]] || project=$(setting project)
  [[ -n $project ]] ||
    fail "no project: add --project=ID, or set one for good: gcloud config set project ID"
  where=("--zone=$zone" "--project=$project")
}

setting() {
  type gcloud >/dev/null 2>&1 && gcloud config get-value "$1" 2>/dev/null || true
}

# A command as it can be pasted into a shell.
quoted() {
  local line
  printf -v line ' %q' "$@"
  printf '%s' "${line:1}"
}

# Runs a command; with --dry-run prints it instead.
run() {
  if [[ -n $dry_run ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# Runs one shell command line on every host of every slice; the exit code is not 0 when it failed on one. gcloud makes a key for the
# first connection; a key with a passphrase has to be in the agent (ssh-add ~/.ssh/google_compute_engine).
on_hosts() {
  run gcloud compute tpus queued-resources ssh "$name" --node=all --worker=all "${where[@]}" ${ssh:+"$ssh"} --quiet "--command=$1"
}

# The state of the queued resource (WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDED, ...), MISSING, or UNKNOWN when gcloud fails.
state() {
  local all
  all=$(gcloud compute tpus queued-resources list "${where[@]}" --format='value(name.basename(),state.state)') || {
    echo UNKNOWN
    return
  }
  awk -v name="$name" '$1 == name { found = $2 } END { print (found ? found : "MISSING") }' <<<"$all"
}

# Sizes by the number in the cloud's name, as in smoljax/planning/topologies.py: v4 and v5p count two cores per chip.
flat="1:1x1 4:2x2 8:2x4 16:4x4 32:4x8 64:8x8 128:8x16 256:16x16"
cubes="8:2x2x1 16:2x2x2 32:2x2x4 64:2x4x4 128:4x4x4 256:4x4x8 512:4x8x8 1024:8x8x8 2048:8x8x16 4096:8x16x16 8192:16x16x16"

# take_topology v5e-256x2: sets accelerator (v5litepod-256), default_runtime, slices (2), shape (16x16), chips (per slice) and gke_accelerator.
# Runtimes: cloud.google.com/tpu/docs/runtimes. Labels: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
# shellcheck disable=SC2034  # They are read by the scripts.
take_topology() {
  local sizes pair legal="" size
  [[ -n $1 ]] || fail "--topology is missing: use v5e-256, v5p-128, v6e-256 or v4-64, say; v5e-256x2 is two slices"
  [[ $1 =~ ^(v4|v5e|v5litepod|v5p|v6e)-([0-9]+)(x([1-9][0-9]*))?$ ]] ||
    fail "--topology=$1 does not exist: use v4-N, v5e-N (or v5litepod-N), v5p-N or v6e-N; xM behind it makes M slices"
  size=${BASH_REMATCH[2]} slices=${BASH_REMATCH[4]:-1}
  case ${BASH_REMATCH[1]} in
    v4) accelerator=v4 default_runtime=tpu-ubuntu2204-base gke_accelerator=tpu-v4-podslice sizes=$cubes ;;
    v5p) accelerator=v5p default_runtime=v2-alpha-tpuv5 gke_accelerator=tpu-v5p-slice sizes="$cubes 12288:16x16x24" ;;
    v6e) accelerator=v6e default_runtime=v2-alpha-tpuv6e gke_accelerator=tpu-v6e-slice sizes=$flat ;;
    *) accelerator=v5litepod default_runtime=v2-alpha-tpuv5-lite gke_accelerator=tpu-v5-lite-podslice sizes=$flat ;;
  esac
  shape=""
  for pair in $sizes; do
    legal+=" ${BASH_REMATCH[1]}-${pair%%:*}"
    [[ ${pair%%:*} == "$size" ]] && shape=${pair#*:}
  done
  [[ -n $shape ]] || fail "--topology=$1 does not exist: ${BASH_REMATCH[1]} comes as$legal; xM behind it makes M slices"
  accelerator+=-$size
  chips=$((${shape//x/*}))
}
