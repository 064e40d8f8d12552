#!/usr/bin/env bash
# Stops the run on every host: all save the same step and end with exit code 42. The TPUs stay, and cost, until delete.sh.
#
#   tpu_scripts/stop.sh NAME
#
#   --wait=SECONDS         how long a host may take to save before it is killed (600)
#   --ssh=FLAG             where hosts have no public address: --ssh=--internal-ip or --ssh=--tunnel-through-iap
#   --zone=Z --project=P   by default gcloud's
#   --dry-run              print the commands instead of running them
#
# The command that was launched, launched again, goes on from there.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

wait=600
parse "--wait= --ssh= --zone= --project=" "$@"
take_name
take_number --wait "$wait" 1
take_place
on_hosts "bash smoljax/tpu_scripts/host.sh stop $wait"
