#!/usr/bin/env bash
# Runs one command on every host of TPU slices of a GKE cluster, as a JobSet of kubectl's current cluster.
#
#   tpu_scripts/gke.sh NAME --topology=v5e-256x2 --image=us-docker.pkg.dev/PROJECT/REPOSITORY/smoljax --spot --bucket=BUCKET \
#     -- python -m smoljax.train --config=configs/smollm3_3b.py --workdir=/mnt/bucket/run
#
#   --topology=T           as in create.sh; the cluster has (or makes) one node pool per slice, of machines with 4 chips
#   --image=I              holds smoljax with the extras train, tpu and gcs, and configs/ in its working directory
#   --spot                 on node pools of spot machines
#   --bucket=B             mounts a bucket at /mnt/bucket (Cloud Storage FUSE CSI driver, GKE 1.33 or newer)
#   --service-account=A    Kubernetes service account that may read and write the bucket
#   --restarts=N           how often all hosts begin anew after a crash or preemption (20)
#   --dry-run              print the command with its JobSet instead of running it
#
# GKE tells the hosts of a slice, and the slices, of each other (TPU_WORKER_*, MEGASCALE_*). Exit codes: a pod that ends with 1 has
# said why, and all stop; after 42 (preempted after saving) or a crash all begin anew, from the newest checkpoint.
#   kubectl get jobset NAME                                                                how it stands
#   kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0
#   kubectl delete jobset NAME                                                             saves, stops, removes

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

main() {
  topology="" image="" spot="" bucket="" service_account="" restarts=20
  parse "--topology= --image= --spot --bucket= --service-account= --restarts=" "$@"
  take_name
  take_command "python -m smoljax.train --config=configs/smollm3_3b.py --workdir=/mnt/bucket/run"
  take_topology "$topology"
  take_number --restarts "$restarts" 0
  [[ -n $image ]] || fail "--image is missing: an image that holds smoljax (see --help)"
  need kubectl https://kubernetes.io/docs/tasks/tools
  chips_per_host=$((chips < 4 ? chips : 4))
  hosts=$((chips / chips_per_host))
  ((slices == 1 || hosts > 1)) || fail "--topology=$topology: slices of one host cannot be joined; use larger ones"

  if [[ -n $dry_run ]]; then
    printf "kubectl apply --filename=- <<'JOBSET'\n%s\nJOBSET\n" "$(jobset)"
  else
    jobset | kubectl apply --filename=-
  fi
}

jobset() { # Without the lines of what is not asked for.
  sed '/^$/d' <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          completionMode: Indexed
          completions: $hosts
          parallelism: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: smoljax, operator: In, values: [1]}
          template:
$([[ -z $bucket ]] || annotations)
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 600
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
$([[ -z $service_account ]] || echo "              serviceAccountName: $service_account")
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $gke_accelerator
                cloud.google.com/gke-tpu-topology: $shape
$([[ -z $spot ]] || spot_nodes)
              containers:
                - name: smoljax
                  image: $(json "$image")
                  command: [$(json "${command[@]}")]
                  env:
                    - {name: PYTHONUNBUFFERED, value: "1"}
                  ports:
                    - containerPort: 8471
                    - containerPort: 8482
                    - containerPort: 8080
                  securityContext: {privileged: true}
                  resources:
                    requests: {google.com/tpu: $chips_per_host}
                    limits: {google.com/tpu: $chips_per_host}
                  volumeMounts:
                    - {name: shared-memory, mountPath: /dev/shm}
$([[ -z $bucket ]] || echo "                    - {name: bucket, mountPath: /mnt/bucket}")
              volumes:
                - {name: shared-memory, emptyDir: {medium: Memory}}
$([[ -z $bucket ]] || bucket_volume)
YAML
}

annotations() {
  cat <<YAML
            metadata:
              annotations: {gke-gcsfuse/volumes: "true"}
YAML
}

spot_nodes() {
  cat <<YAML
                cloud.google.com/gke-spot: "true"
              tolerations:
                - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}
YAML
}

bucket_volume() {
  cat <<YAML
                - name: bucket
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes: {bucketName: $(json "$bucket"), mountOptions: implicit-dirs, hostNetworkPodKSA: "true"}
YAML
}

# Words as JSON strings, which YAML reads unchanged. Kubernetes would replace \$(NAME) in a command; \$\$( keeps it.
json() {
  local word text=""
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    word=${word//$'\n'/\\n}
    word=${word//$'\t'/\\t}
    word=${word//\$(/\$\$(}
    text+=", \"$word\""
  done
  printf '%s' "${text:2}"
}

main "$@"
