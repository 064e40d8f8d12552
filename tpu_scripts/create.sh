#!/usr/bin/env bash
# Asks for TPUs: a queued resource, which waits until there is room and then holds them until delete.sh.
#
#   tpu_scripts/create.sh NAME --topology=v5p-128 --spot --wait
#   tpu_scripts/create.sh NAME --topology=v5e-256x2 -- --network=my-network --service-account=me@my-project.iam.gserviceaccount.com
#
#   --topology=T     v4-N, v5e-N, v5p-N or v6e-N, as in `python -m smoljax.plan`; xM behind it makes M slices (multislice)
#   --spot           cheap, and may be taken away at any time (keep.sh brings them back)
#   --reserved       from your project's reservation; with neither, on demand
#   --until=TIME     give up when there is no room for so long: 2h, 1d
#   --runtime=V      software of the hosts; by default what Google names for the generation
#   --wait           come back when the TPUs are ACTIVE; exit code 1 when the request failed
#   --every=SECONDS  how often --wait looks (30)
#   --zone=Z --project=P   by default gcloud's (gcloud config set compute/zone Z)
#   --dry-run        print the commands instead of running them
#   --               what follows goes to `gcloud compute tpus queued-resources create` unchanged
#
# Next: install.sh, launch.sh, watch.sh, stop.sh, delete.sh; or keep.sh, which does all of it.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

topology="" spot="" reserved="" until="" runtime="" wait="" every=30
parse "--topology= --spot --reserved --until= --runtime= --wait --every= --zone= --project=" "$@"
take_name
take_topology "$topology"
take_number --every "$every" 1
[[ -z $spot || -z $reserved ]] || fail "--spot and --reserved exclude each other: leave one out"
take_place

request=("$name" "--accelerator-type=$accelerator" "--runtime-version=${runtime:-$default_runtime}" "${where[@]}")
if ((slices > 1)); then
  request+=("--node-count=$slices" "--node-prefix=$name")
else
  request+=("--node-id=$name")
fi
[[ -z $spot ]] || request+=(--spot)
[[ -z $reserved ]] || request+=(--reserved)
[[ -z $until ]] || request+=("--valid-until-duration=$until")
((${#command[@]} == 0)) || request+=("${command[@]}")
run gcloud compute tpus queued-resources create "${request[@]}" --async

[[ -n $wait && -z $dry_run ]] || exit 0
last=""
while true; do
  now=$(state)
  [[ $now == "$last" ]] || echo "$name: $now"
  last=$now
  case $now in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED | SUSPENDING | MISSING)
      echo "error: no TPUs for $name: gcloud compute tpus queued-resources describe $name $(quoted "${where[@]}")" >&2
      exit 1
      ;;
  esac
  sleep "$every"
done
