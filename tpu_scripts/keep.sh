#!/usr/bin/env bash
# Keeps a run going until it is done: asks for the TPUs, installs, launches, looks; begins anew when they were taken away.
# Run it where it can stay for days (tmux on a small machine).
#
#   tpu_scripts/keep.sh NAME --topology=v6e-256 --spot -- python -m smoljax.train --config=configs/smollm3_3b.py \
#     --workdir=/mnt/bucket/run --config.training.checkpoint_directory=gs://BUCKET/run
#
#   --topology=T --spot --reserved   as in create.sh
#   --setup=COMMAND        shell command for every host after each installation: 'gcsfuse --implicit-dirs BUCKET /mnt/bucket'
#   --restarts=N           how often it launches again on TPUs that stay (20); TPUs taken away do not count
#   --every=SECONDS        how often it looks (60)
#   --delete               tear the TPUs down when the run is done or has failed
#   --ssh=FLAG             where hosts have no public address: --ssh=--internal-ip or --ssh=--tunnel-through-iap
#   --zone=Z --project=P   by default gcloud's
#   --dry-run              print the commands of one round instead of running them
#
# A host that ends with 0 is done. 42 (preempted after saving), a signal or a crash: stopped everywhere and launched again, which
# resumes from the newest checkpoint. 1 is an error that explains itself: it is printed, and not repeated. After stop.sh it ends
# with 42. Ctrl-C leaves the run alone, and the same keep.sh takes it up again. Exit code: 0 done, 1 failed, 42 stopped.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

topology="" spot="" reserved="" setup="" restarts=20 every=60 delete="" expected=0
parse "--topology= --spot --reserved --setup= --restarts= --every= --delete --ssh= --zone= --project=" "$@"
take_name
take_command "python -m smoljax.train --config=configs/smollm3_3b.py --workdir=/mnt/bucket/run"
take_topology "$topology"
take_number --restarts "$restarts" 0
take_number --every "$every" 1
take_place
same=("$name" "${where[@]}" ${dry_run:+--dry-run})

main() {
  if [[ -n $dry_run ]]; then
    create
    prepare
    "$here/launch.sh" "${same[@]}" ${ssh:+"--ssh=$ssh"} -- "${command[@]}"
    on_hosts "bash smoljax/tpu_scripts/host.sh status"
    [[ -z $delete ]] || "$here/delete.sh" --yes "${same[@]}"
    return
  fi
  local crashes=0
  complaints=$(mktemp)
  trap 'rm -f "$complaints"' EXIT
  while true; do
    obtain
    begin || say "could not start"
    look
    case $outcome in
      done) finish 0 "done" ;;
      taken) say "the TPUs were taken away" ;;
      stopped)
        say "stopped on request"
        exit 42
        ;;
      failed)
        halt
        finish 1 "failed: $(grep -m 1 ' exit 1: ' <<<"$hosts")"
        ;;
      crashed)
        halt
        ((++crashes <= restarts)) || finish 1 "gave up after $restarts restarts: $(crash)"
        say "ended early, restart $crashes of $restarts: $(crash)"
        ;;
    esac
  done
}

# Until the TPUs are ACTIVE. A request that failed or was preempted keeps its name and its quota: it goes before a new one.
obtain() {
  local now last=""
  while true; do
    now=$(state)
    [[ $now == "$last" ]] || say "$now"
    last=$now
    case $now in
      ACTIVE) return ;;
      MISSING)
        create
        sleep "$every"
        ;;
      FAILED | SUSPENDED) "$here/delete.sh" --yes "${same[@]}" ;;
      *) sleep "$every" ;;
    esac
  done
}

create() {
  "$here/create.sh" "${same[@]}" "--topology=$topology" ${spot:+--spot} ${reserved:+--reserved}
}

prepare() {
  "$here/install.sh" "${same[@]}" ${ssh:+"--ssh=$ssh"} && { [[ -z $setup ]] || on_hosts "$setup"; }
}

# Launches, unless the command of an earlier keep.sh is still running.
begin() {
  if hosts=$(ask_hosts) && [[ $(judge <<<"$hosts") == running ]]; then
    say "is running already"
  else
    prepare && hosts=$("$here/launch.sh" "${same[@]}" ${ssh:+"--ssh=$ssh"} -- "${command[@]}") || return 1
    echo "$hosts"
  fi
  expected=$(grep -c -E '^[^ ]+ (started$|running: )' <<<"$hosts")
}

ask_hosts() { # In order. What gcloud tells of its connections is kept for when they fail.
  on_hosts "bash smoljax/tpu_scripts/host.sh status" 2>"$complaints" | sort
}

halt() { # Not on request, as stop.sh does it.
  on_hosts "bash smoljax/tpu_scripts/host.sh stop 60 && rm -f smoljax_run/stopped" >/dev/null 2>"$complaints" ||
    say "not all hosts could be stopped: $(tail -n 1 "$complaints")"
}

# Until there is an outcome: done, stopped, failed, crashed or taken. Sets outcome and hosts (a line for each).
look() {
  local silent=0
  while true; do
    sleep "$every"
    case $(state) in
      ACTIVE) ;;
      UNKNOWN) continue ;;
      *)
        outcome=taken
        return
        ;;
    esac
    # Where gcloud reaches some slices only, it warns and says 0.
    if hosts=$(ask_hosts) && (($(grep -c . <<<"$hosts") >= expected)); then
      silent=0
      head -n 1 <<<"$hosts"
      outcome=$(judge <<<"$hosts")
      [[ $outcome == running ]] || return 0
    elif ((++silent == 3)); then
      hosts=""
      outcome=crashed
      cat "$complaints"
      return
    fi
  done
}

# From a line per host to what it means for all. A host that met an error of its own (1) takes others down with it by signals.
judge() {
  awk '
    $2 == "running:" { running++ }
    $2 == "stopped" { stopped++ }
    $2 == "exit" && $3 == "0:" { finished++ }
    $2 == "exit" && $3 == "1:" { failed++ }
    $2 == "idle:" || $2 == "exit" && $3 != "0:" && $3 != "1:" { crashed++ }
    END {
      if (stopped) print "stopped"
      else if (crashed) print "crashed"
      else if (failed) print "failed"
      else if (running) print "running"
      else print (finished ? "done" : "crashed")
    }'
}

crash() {
  grep -m 1 -E ' exit ([2-9]|[1-9][0-9]+): ' <<<"$hosts" || echo "the hosts do not answer"
}

finish() {
  [[ -z $delete ]] || "$here/delete.sh" --yes "${same[@]}"
  say "$2"
  exit "$1"
}

say() {
  echo "$(date -u +%FT%TZ) $name: $*"
}

main
