#!/usr/bin/env bash
# Tears the TPUs down: hosts, their disks and the queued resource. Stop the run first (stop.sh), or its last steps are lost.
#
#   tpu_scripts/delete.sh NAME
#
#   --yes                  do not ask
#   --zone=Z --project=P   by default gcloud's
#   --dry-run              print the commands instead of running them

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

yes=""
parse "--yes --zone= --project=" "$@"
take_name
take_place
run gcloud compute tpus queued-resources delete "$name" --force "${where[@]}" ${yes:+--quiet}
