#!/usr/bin/env bash
# Runs one command on every host of every slice and waits for it.
#
#   tpu_scripts/ssh.sh NAME -- df -h
#   tpu_scripts/ssh.sh NAME -- bash -c 'sudo mkdir -p /mnt/bucket && sudo chown $USER /mnt/bucket && gcsfuse --implicit-dirs BUCKET /mnt/bucket'
#
#   --ssh=FLAG             where hosts have no public address: --ssh=--internal-ip or --ssh=--tunnel-through-iap
#   --zone=Z --project=P   by default gcloud's
#   --dry-run              print the commands instead of running them

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

parse "--ssh= --zone= --project=" "$@"
take_name
take_command "df -h"
take_place
on_hosts "$(quoted "${command[@]}")"
