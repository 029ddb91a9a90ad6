#!/usr/bin/env bash
# Runs `drift run` on every host of TPU slices of a GKE cluster, with XPK (https://github.com/AI-Hypercomputer/xpk):
#
#   scripts/launch/xpk.sh --cluster NAME --tpu-type v5litepod-16 --docker-image IMAGE --storage NAME
#       CONFIG [options of drift run]
#
# IMAGE is built once, and pushed where the cluster can pull it:
#
#   docker build -f scripts/launch/Dockerfile -t IMAGE . && docker push IMAGE
#
# With --base-docker-image IMAGE instead, XPK lays this checkout over IMAGE, so that changed code and configs need no new
# build. The run directory, the model and the data must be on the storage, which `xpk storage attach` makes known to the
# cluster under a name and a mount point: a Filestore (--type gcpfilestore --readonly false), say. Name the data there:
# `--set data.dsat=/mnt/drift/wildfeedback/dsat.jsonl`, as the image has no data and looks for it in /app. To resume, run the
# same command again; --max-restarts has the cluster do it after a host was lost.
#
# --cluster NAME             the cluster (required)
# --tpu-type TYPE            a slice, such as v5litepod-16, v5p-16, v6e-16 (required)
# --docker-image IMAGE       or --base-docker-image IMAGE (one is required)
# --storage NAME             storage of the cluster to mount; repeatable
# --num-slices N             slices that train together (1)
# --workload NAME            name of the job (drift-MMDD-HHMMSS)
# --max-restarts N           times the cluster starts all hosts again after a failure (0)
# --project, --zone          where the cluster is (gcloud's own settings)
#
# DRY_RUN=1 prints the command.
set -euo pipefail
# shellcheck source=scripts/launch/quote.sh
source "$(dirname "${BASH_SOURCE[0]}")/quote.sh"

workload="" cluster="" type="" image="" restarts=0
words=(xpk workload create)
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage && exit ;;
        --*=*)
            # --key=value is read as --key value.
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
            continue
            ;;
        --cluster | --tpu-type | --docker-image | --base-docker-image | --storage | --num-slices | --workload | \
            --max-restarts | --project | --zone)
            [[ $# -ge 2 && -n $2 && $2 != -* ]] || fail "$1 needs a value."
            case $1 in
                --cluster) cluster=$2 ;;
                --tpu-type) type=$2 ;;
                --workload) workload=$2 ;;
                --docker-image | --base-docker-image)
                    [[ -z $image ]] || fail "one image is enough: --docker-image or --base-docker-image."
                    image=$2
                    ;;
                --num-slices) [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--num-slices must be a number, found '$2'." ;;
                --max-restarts)
                    [[ $2 =~ ^[0-9]+$ ]] || fail "--max-restarts must be a number, found '$2'."
                    restarts=$2
                    ;;
            esac
            if [[ $1 != --workload ]]; then words+=("$1=$2"); fi
            shift 2
            ;;
        -*) fail "unknown option $1; options of drift run come after CONFIG." ;;
        *) break ;;
    esac
done
[[ -n $cluster ]] || fail "--cluster is missing."
[[ -n $type ]] || fail "--tpu-type is missing."
[[ -n $image ]] || fail "--docker-image or --base-docker-image is missing."
[[ $# -ge 1 ]] || fail "CONFIG is missing."
[[ -f $1 ]] || fail "there is no config file $1 in this checkout, which the image is built from."
config=$1
shift
[[ -n $workload ]] || workload=drift-$(date +%m%d-%H%M%S)
[[ $workload =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ && ${#workload} -le 40 ]] ||
    fail "--workload must be at most 40 small letters, digits and dashes, found '$workload'."

# XPK restarts after signals alone; `drift` ends with 1 when it lost the others, with 75 when it was asked to stop and has
# saved. 2 is for what a restart cannot mend.
if ((restarts > 0)); then words+=(--restart-on-exit-codes=1,75); fi
# GKE tells every host of a slice who the others are, and `drift run` looks there by itself.
call "${words[@]}" --workload="$workload" --command="$(quote drift run "$config" "$@")"
