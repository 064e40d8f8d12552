#!/usr/bin/env bash
# Copies this checkout to every host, into ~/smoljax, and installs it there with what a TPU needs.
#
#   tpu_scripts/install.sh NAME
#
#   --ssh=FLAG             where hosts have no public address: --ssh=--internal-ip or --ssh=--tunnel-through-iap
#   --zone=Z --project=P   by default gcloud's
#   --dry-run              print the commands instead of running them
#
# All files that git does not ignore are copied, as they are: no commit and no credentials are needed. Again after a change.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

parse "--ssh= --zone= --project=" "$@"
take_name
take_place

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
git -C "$root" rev-parse --git-dir >/dev/null 2>&1 || fail "$root is not a git checkout: clone smoljax with git"
archive=$(mktemp -d)/smoljax.tar.gz
trap 'rm -rf "$(dirname "$archive")"' EXIT
git -C "$root" ls-files -z --cached --others --exclude-standard |
  while IFS= read -r -d '' file; do
    [[ ! -f $root/$file ]] || printf '%s\0' "$file"
  done |
  COPYFILE_DISABLE=1 tar -C "$root" --null -czf "$archive" -T -

run gcloud compute tpus queued-resources scp "$archive" "$name:smoljax.tar.gz" --node=all --worker=all "${where[@]}" ${ssh:+"$ssh"} --quiet
on_hosts "mkdir -p smoljax && tar -xzf smoljax.tar.gz -C smoljax && bash smoljax/tpu_scripts/host.sh install"
