#!/usr/bin/env bash
# Starts one command on every host of every slice, detached, with its output in ~/smoljax_run/log of each host.
#
#   tpu_scripts/launch.sh NAME -- python -m smoljax.train --config=configs/smollm3_3b.py --workdir=/mnt/bucket/run \
#     --config.training.checkpoint_directory=gs://BUCKET/run
#   tpu_scripts/launch.sh NAME -- env LIBTPU_INIT_ARGS=--xla_tpu_enable_latency_hiding_scheduler=true python -m ...
#
#   --ssh=FLAG             where hosts have no public address: --ssh=--internal-ip or --ssh=--tunnel-through-iap
#   --zone=Z --project=P   by default gcloud's
#   --dry-run              print the commands instead of running them
#
# It runs in ~/smoljax with that folder's Python, and every argument arrives as it is written here. The hosts find each other,
# within a slice and between slices, by what the TPUs' metadata say. The same command again goes on from the newest checkpoint;
# where one is still running, nothing happens and the exit code is 1.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

parse "--ssh= --zone= --project=" "$@"
take_name
take_command "python -m smoljax.train --config=configs/smollm3_3b.py --workdir=/mnt/bucket/run"
take_place
on_hosts "bash smoljax/tpu_scripts/host.sh start $(quoted "${command[@]}")"
