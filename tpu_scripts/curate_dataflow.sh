#!/usr/bin/env bash
# Curates on Google Cloud Dataflow: the documents of a recipe on as many machines as it takes, with the bytes that one would write.
#
#   tpu_scripts/curate_dataflow.sh --config=configs/NAME.py --workdir=runs/NAME --bucket=gs://BUCKET/NAME --region=us-central1 \
#     --container=us-docker.pkg.dev/PROJECT/REPOSITORY/smoljax:1 --machine=n2-standard-8 --workers=4 --max-workers=200
#   tpu_scripts/curate_dataflow.sh --config=... --workdir=... --bucket=... --region=... --requirements=requirements.txt -- \
#     --config.curation.arguments.pattern=gs://BUCKET/crawl
#
#   --config=FILE        the recipe's config; its inputs must be URLs that the workers can read (gs://, s3://, https://)
#   --workdir=DIR        local folder, to which the finished documents come
#   --bucket=gs://B/DIR  for intermediate files (DIR/curation) and Beam's own (DIR/beam); in the region of the workers, or it is slow
#   --region=R           of the workers
#   --project=P          by default gcloud's
#   --container=IMAGE    what the workers run, quickest to start. Of the same Beam, Python and smoljax as here:
#                          FROM apache/beam_python3.11_sdk:VERSION
#                          COPY . /smoljax
#                          RUN pip install '/smoljax[data,gcs]'
#   --requirements=FILE  instead: each worker installs these packages and this checkout (setup.py) when it starts. To make one:
#                          python -c 'import importlib.metadata as m; print(*(r.partition(";")[0] for r in m.requires("smoljax")
#                            if r.endswith(("\"data\"", "\"gcs\""))), sep="\n")' > requirements.txt
#   --machine=TYPE       of a worker (n2-standard-4); each core works on one shard
#   --workers=N          to begin with (2)
#   --max-workers=N      never more (50): what this may cost is bounded by it
#   --autoscaling=A      throughput (default): Dataflow chooses between 1 and --max-workers; none: always --workers
#   --disk=GB            of each worker (50)
#   --beam=FLAGS         more of Beam's flags in one word: --beam="--subnetwork=regions/R/subnetworks/S --no_use_public_ips"
#   --dry-run            print the command instead of running it
#   --                   what follows goes to smoljax.curate unchanged
#
# First: pip install -e '.[data,dataflow,train]'; gcloud auth application-default login. Each step of curation is one Dataflow job,
# which takes a while to start. Ctrl-C cancels the job; the same command goes on from what is done. Exit codes: those of
# smoljax.curate. Flink and Spark are chosen by the same field: --config.curation.beam_options="('--runner=FlinkRunner',
# '--flink_master=HOST:8081', '--environment_type=DOCKER', '--environment_config=IMAGE')", or '--runner=SparkRunner' and
# '--spark_master_url=spark://HOST:7077'.

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$here/lib.sh"

config="" workdir="" bucket="" region="" container="" requirements="" beam=""
machine=n2-standard-4 workers=2 max_workers=50 autoscaling=throughput disk=50
parse "--config= --workdir= --bucket= --region= --project= --container= --requirements= --machine= --workers= --max-workers= \
--autoscaling= --disk= --beam=" "$@"
((${#words[@]} == 0)) || fail "${words[*]} is not a flag: what goes to smoljax.curate stands behind -- (see --help)"
[[ -n $config ]] || fail "--config is missing: a recipe, such as configs/quickstart.py"
[[ -f ${config%%:*} ]] || fail "--config=$config: there is no such file"
[[ -n $workdir ]] || fail "--workdir is missing: a local folder for the finished documents"
[[ $workdir != *://* ]] || fail "--workdir=$workdir is a URL: give a local folder; intermediate files go to --bucket"
[[ $bucket =~ ^gs://[a-z0-9][-a-z0-9._]{1,61}[a-z0-9](/[-A-Za-z0-9._/]*)?$ ]] ||
  fail "--bucket=$bucket: give a folder of a bucket, gs://BUCKET/NAME"
[[ $region =~ ^[a-z]+-[a-z]+[0-9]+$ ]] || fail "--region=$region: give a region, such as us-central1 (not a zone)"
[[ -n $project ]] || project=$(setting project)
[[ $project =~ ^[a-z][-a-z0-9:.]{4,61}[a-z0-9]$ ]] ||
  fail "--project=$project: give the project's ID, or set one for good: gcloud config set project ID"
[[ -z $container || -z $requirements ]] || fail "--container and --requirements exclude each other: leave one out"
[[ -n $container || -n $requirements ]] || fail "the workers need smoljax: give --container or --requirements (see --help)"
[[ -z $requirements || -f $requirements ]] || fail "--requirements=$requirements: there is no such file (--help tells how to make it)"
[[ $machine =~ ^[a-z][a-z0-9]*(-[a-z0-9]+)+$ ]] || fail "--machine=$machine: give a machine type, such as n2-standard-4"
take_number --workers "$workers" 1
take_number --max-workers "$max_workers" 1
((workers <= max_workers)) || fail "--workers=$workers is more than --max-workers=$max_workers"
take_number --disk "$disk" 20
case $autoscaling in
  throughput) algorithm=THROUGHPUT_BASED ;;
  none) algorithm=NONE ;;
  *) fail "--autoscaling=$autoscaling: use throughput or none" ;;
esac

bucket=${bucket%/}
flags=(
  --runner=DataflowRunner
  "--project=$project"
  "--region=$region"
  --job_name=smoljax-curation
  "--temp_location=$bucket/beam/temporary"
  "--staging_location=$bucket/beam/staging"
  "--worker_machine_type=$machine"
  "--num_workers=$workers"
  "--max_num_workers=$max_workers"
  "--autoscaling_algorithm=$algorithm"
  "--disk_size_gb=$disk"
  --experiments=use_runner_v2
  --number_of_worker_harness_threads=1 # A shard takes a whole core, and what it fetched belongs to its process.
)
if [[ -n $container ]]; then
  flags+=("--sdk_container_image=$container" --sdk_location=container)
else
  flags+=("--requirements_file=$requirements" --requirements_cache=skip "--setup_file=$(dirname "$here")/setup.py")
fi
for flag in $beam; do
  [[ $flag == --* ]] || fail "--beam has '$flag': each of its words is a flag, --NAME=VALUE"
  flags+=("$flag")
done

# As Python writes a tuple of strings.
tuple=""
for flag in "${flags[@]}"; do
  [[ $flag != *[\'\\]* ]] || fail "$flag holds a quote or a backslash, which a flag cannot"
  tuple+="'$flag', "
done
run python -m smoljax.curate "--config=$config" "--workdir=$workdir" --only=documents \
  "--config.curation.directory=$bucket/curation" "--config.curation.beam_options=(${tuple% })" \
  ${command[@]+"${command[@]}"}
