#!/usr/bin/env bash
# Shows how it stands: the TPUs' state, a line per host with its latest step and loss, the end of the first host's log.
#
#   tpu_scripts/watch.sh NAME
#   tpu_scripts/watch.sh NAME --follow
#
#   --follow               stay with the first host's log (Ctrl-C leaves the run alone)
#   --lines=N              lines of the log (20)
#   --ssh=FLAG             where hosts have no public address: --ssh=--internal-ip or --ssh=--tunnel-through-iap
#   --zone=Z --project=P   by default gcloud's
#   --dry-run              print the commands instead of running them

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

follow="" lines=20
parse "--follow --lines= --ssh= --zone= --project=" "$@"
take_name
take_number --lines "$lines" 1
take_place

if [[ -z $dry_run ]]; then
  now=$(state)
  echo "$name: $now"
  [[ $now == ACTIVE ]] || exit 1
else
  run gcloud compute tpus queued-resources list "${where[@]}"
fi
on_hosts "bash smoljax/tpu_scripts/host.sh status"
run gcloud compute tpus queued-resources ssh "$name" --node=0 --worker=0 "${where[@]}" ${ssh:+"$ssh"} --quiet \
  "--command=tail -n $lines ${follow:+-F }smoljax_run/log"
