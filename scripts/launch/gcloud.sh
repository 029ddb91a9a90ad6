#!/usr/bin/env bash
# Runs `drift run` on all hosts of a Cloud TPU slice with nothing but gcloud. In this order, from the checkout:
#
#   export ZONE=us-east5-b PROJECT=my-project
#   scripts/launch/gcloud.sh create  NAME TYPE [options of `tpu-vm create`, such as --spot]     TYPE: v6e-16, v5p-16 ...
#   scripts/launch/gcloud.sh mount   NAME SERVER:/EXPORT       an NFS share (Filestore) as /mnt/drift on every host
#   scripts/launch/gcloud.sh install NAME                      this checkout, with what git does not ignore, and a .venv
#   scripts/launch/gcloud.sh run     NAME CONFIG [options of drift run]
#   scripts/launch/gcloud.sh stop    NAME                      ends `drift run` on every host
#
# The run directory, the model and the data must be under /mnt/drift or on other storage that all hosts see. To resume,
# `run` again with the same words. `run` lasts as long as its ssh connections, and Ctrl-C ends only this side: keep it in
# tmux on a machine near the slice, and `stop` before you `run` again. Before the first command on several hosts:
# ssh-add ~/.ssh/google_compute_engine. A slice costs money until `gcloud compute tpus tpu-vm delete NAME`.
#
# ZONE     zone of the slice (required)
# PROJECT  project (gcloud's own setting)
# VERSION  TPU software of `create` (the one for TYPE)
# DRY_RUN  1 prints the commands
set -euo pipefail
# shellcheck source=scripts/launch/quote.sh
source "$(dirname "${BASH_SOURCE[0]}")/quote.sh"

# tpu_vm ACTION WORD...
tpu_vm() {
    local action=$1
    shift
    set -- "$@" --zone="$ZONE"
    if [[ -n ${PROJECT:-} ]]; then set -- "$@" --project="$PROJECT"; fi
    call gcloud compute tpus tpu-vm "$action" "$@"
}

# The command line on every host at once.
on_all_hosts() { tpu_vm ssh "$name" --worker=all --command="$1"; }

create() {
    [[ $# -ge 1 && $1 != -* ]] || fail "TYPE is missing, such as v6e-16."
    local type=$1 version=${VERSION:-}
    shift
    if [[ -z $version ]]; then
        # https://cloud.google.com/tpu/docs/runtimes
        case $type in
            v6e-*) version=v2-alpha-tpuv6e ;;
            v5p-*) version=v2-alpha-tpuv5 ;;
            v5litepod-*) version=v2-alpha-tpuv5-lite ;;
            v4-* | v3-* | v2-*) version=tpu-ubuntu2204-base ;;
            *) fail "no TPU software is known for '$type'; TYPE is v6e-N, v5p-N, v5litepod-N or v4-N, or VERSION names it." ;;
        esac
    fi
    tpu_vm create "$name" --accelerator-type="$type" --version="$version" "$@"
}

mount() {
    [[ $# -eq 1 && $1 == *:/* ]] || fail "mount takes the share as SERVER:/EXPORT."
    # lookupcache=positive: a host sees at once what another has written, not after half a minute.
    on_all_hosts "sudo apt-get update -q && sudo apt-get install -qy nfs-common && sudo mkdir -p /mnt/drift &&
        { mountpoint -q /mnt/drift || sudo mount -t nfs -o lookupcache=positive $(quote "$1") /mnt/drift; }"
}

install() {
    [[ $# -eq 0 ]] || fail "install takes NAME alone."
    local archive root file
    archive=$(mktemp)
    root=$(git rev-parse --show-toplevel)
    # shellcheck disable=SC2064
    trap "rm -f $(quote "$archive")" EXIT
    # What git knows or would take, less what was deleted and not committed yet.
    git -C "$root" ls-files -z --cached --others --exclude-standard |
        while IFS= read -r -d '' file; do if [[ -e $root/$file ]]; then printf '%s\0' "$file"; fi; done |
        tar -C "$root" -czf "$archive" --null -T -
    tpu_vm scp "$archive" "$name:drift_jax.tar.gz" --worker=all
    # The system's Python may be older than 3.11: uv brings its own.
    # shellcheck disable=SC2016
    on_all_hosts 'mkdir -p drift_jax && tar -xzf drift_jax.tar.gz -C drift_jax && cd drift_jax &&
        export PATH="$HOME/.local/bin:$PATH" && { command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh; } &&
        uv venv --allow-existing --python 3.12 .venv && uv pip install --python .venv/bin/python -e ".[tpu]"'
}

run() {
    [[ $# -ge 1 && $1 != -* ]] || fail "CONFIG is missing."
    [[ -f $1 ]] || fail "there is no config file $1 in this checkout."
    local config=$1
    shift
    # `on`: here only the metadata server knows of the other hosts, and JAX asks it.
    on_all_hosts "cd drift_jax && exec $(quote .venv/bin/drift run "$config" --distributed on "$@")"
}

stop() {
    [[ $# -eq 0 ]] || fail "stop takes NAME alone."
    # [d]: or the pattern would match the shell that runs this.
    on_all_hosts 'pkill -TERM -f "[d]rift run"; sleep 5; pkill -KILL -f "[d]rift run"; true'
}

case ${1:-} in
    -h | --help) usage && exit ;;
    create | mount | install | run | stop) action=$1 ;;
    "") fail "what to do is missing." ;;
    *) fail "'$1' is none of create, mount, install, run, stop." ;;
esac
[[ $# -ge 2 && $2 != -* ]] || fail "NAME, the name of the slice, is missing."
[[ -n ${ZONE:-} ]] || fail "ZONE is not set."
name=$2
shift 2
"$action" "$@"
