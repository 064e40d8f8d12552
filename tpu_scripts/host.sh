#!/usr/bin/env bash
# What the other scripts run on a host of the pod, in its home folder: the checkout is in smoljax, the run's files in smoljax_run.
#
#   host.sh install        an environment in smoljax/.venv; Python 3.12 comes along where the host's own is older than 3.11
#   host.sh start COMMAND  starts it detached, output to smoljax_run/log; exit code 1 where one is running
#   host.sh status         one line: the host, running | exit CODE | stopped CODE | idle, and the last line of the log
#   host.sh stop SECONDS   asks it to save and end (SIGTERM), and kills it after so long
#   host.sh attend COMMAND runs it, and leaves its process id and exit code behind

set -euo pipefail
cd
run=smoljax_run

running() { # The process has this script's name, so that a number that another took after a restart does not count.
  [[ -f $run/pid ]] && grep -qs host.sh "/proc/$(cat $run/pid)/cmdline"
}

install() {
  cd smoljax
  if [[ ! -x .venv/bin/python ]]; then
    if python3 -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
      python3 -m venv .venv
    else
      python3 -m pip install --user --quiet uv
      python3 -m uv venv --quiet --seed --python 3.12 .venv
    fi
  fi
  .venv/bin/python -m pip install --quiet -e '.[train,tpu,gcs]'
  echo "$(hostname) installed"
}

start() {
  if running; then
    echo "error: $(hostname) is still running the last command: stop.sh ends it, watch.sh shows it" >&2
    exit 1
  fi
  mkdir -p $run
  rm -f $run/exit_code $run/child $run/pid $run/stopped
  setsid nohup bash smoljax/tpu_scripts/host.sh attend "$@" >>$run/log 2>&1 </dev/null &
  echo $! >$run/pid
  echo "$(hostname) started"
}

attend() {
  local run=$PWD/$run child code
  echo "--- $(date -u +%FT%TZ) $(hostname):$(printf ' %q' "$@")"
  cd smoljax
  export PATH=$PWD/.venv/bin:$PATH PYTHONUNBUFFERED=1
  trap : TERM # The command gets its own; this shell waits for its exit code.
  "$@" &
  child=$!
  echo $child >"$run/child"
  while true; do # `wait` also ends when this shell gets a signal.
    code=0
    wait $child 2>/dev/null || code=$?
    kill -0 $child 2>/dev/null || break
  done
  echo $code >"$run/exit_code"
  echo "--- $(date -u +%FT%TZ) exit code $code"
}

status() {
  local what=idle
  if running; then
    what=running
  elif [[ -f $run/stopped ]]; then
    what="stopped $(cat $run/exit_code 2>/dev/null || echo 137)"
  elif [[ -f $run/pid ]]; then
    what="exit $(cat $run/exit_code 2>/dev/null || echo 137)" # Killed together with the shell that waited for it.
  fi
  echo "$(hostname) $what: $([[ ! -f $run/log ]] || tail -n 100 $run/log | grep -v '^---' | tail -n 1)"
}

signal() {
  ! running || kill "-$1" "$(cat $run/child)" 2>/dev/null || :
}

stop() {
  local left=$1
  if running; then
    touch $run/stopped
    while running && [[ ! -f $run/child ]]; do sleep 0.1; done
    signal TERM
    while running && ((left-- > 0)); do sleep 1; done
    signal KILL
    while running; do sleep 0.1; done
  fi
  status
}

case ${1:-} in
  install | start | attend | status | stop) "$@" ;;
  *)
    sed -n '2,/^$/s/^# \{0,1\}//p' smoljax/tpu_scripts/host.sh
    exit 2
    ;;
esac
