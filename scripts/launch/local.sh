#!/usr/bin/env bash
# Starts `drift run` as N processes on this machine that train together, to try a config without a cluster:
#
#   scripts/launch/local.sh N CONFIG [options of drift run]
#
# Each process has JAX_NUM_CPU_DEVICES CPU devices (2 unless set), so the mesh has N times as many. When one process
# fails the others are stopped, and its exit code is the script's; Ctrl-C stops all. Process 0 is the one that prints.
#
# DRIFT    the command to start (.venv/bin/drift where there is one, else drift); may be several words
# PORT     where process 0 listens (a free one)
# DRY_RUN  1 prints the commands
set -euo pipefail
# shellcheck source=scripts/launch/quote.sh
source "$(dirname "${BASH_SOURCE[0]}")/quote.sh"

[[ ${1:-} != -h && ${1:-} != --help ]] || { usage; exit; }
[[ $# -ge 1 ]] || fail "N, the number of processes, is missing."
[[ $1 =~ ^[1-9][0-9]*$ ]] || fail "N must be a number of processes, found '$1'."
[[ $# -ge 2 && $2 != -* ]] || fail "CONFIG is missing."
n=$1
config=$2
shift 2
[[ -f $config ]] || fail "there is no config file $config."

if [[ -z ${DRIFT:-} && -x .venv/bin/drift ]]; then DRIFT=.venv/bin/drift; fi
read -r -a drift <<< "${DRIFT:-drift}"
[[ ${DRY_RUN:-0} == 1 ]] || command -v "${drift[0]}" > /dev/null || fail "${drift[0]} is not installed (DRIFT names it)."

# A port that nobody answers on, below those that systems hand out to connections (from 32768).
port=${PORT:-$((20000 + RANDOM % 12000))}
while [[ -z ${PORT:-} ]] && (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((20000 + RANDOM % 12000)); done

# The words that start process $1, in `words`. The coordinator is for this machine alone, so it listens there alone.
words_of() {
    words=(
        env "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" "JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-2}"
        "JAX_COORDINATOR_BIND_ADDRESS=127.0.0.1:$port"
        "${drift[@]}" run "$config" --coordinator "127.0.0.1:$port" --num-processes "$n" --process-id "$1"
    )
}

if [[ ${DRY_RUN:-0} == 1 ]]; then
    for ((i = 0; i < n; i++)); do
        words_of "$i"
        quote "${words[@]}" "$@"
    done
    exit
fi

# Stops what still runs, with the children it has. A process that waits for a lost one in a collective may hear nothing:
# so the second signal is one that nobody can ignore.
stop_all() {
    trap '' INT TERM HUP
    local pid tenths=0
    for pid in $(jobs -pr); do kill -TERM -- "-$pid" 2> /dev/null || true; done
    while [[ -n $(jobs -pr) && $tenths -lt 300 ]]; do
        sleep 0.1
        tenths=$((tenths + 1))
    done
    for pid in $(jobs -pr); do kill -KILL -- "-$pid" 2> /dev/null || true; done
    { wait || true; } 2> /dev/null
}
# Asked to stop, `drift` saves and ends with 75: run again. It has half a minute.
trap 'stop_all; exit 75' INT TERM HUP

# Job control on while they start: each process leads a group of its own, which can be signalled with its children.
# Off afterwards, or Ctrl-C would go to the `sleep` below alone.
set -m
pids=()
for ((i = 0; i < n; i++)); do
    words_of "$i"
    "${words[@]}" "$@" < /dev/null &
    pids+=("$!")
done
set +m

left=$n
while ((left > 0)); do
    sleep 0.2
    running=" $(jobs -pr | tr '\n' ' ') "
    for ((i = 0; i < n; i++)); do
        pid=${pids[i]}
        if [[ -z $pid || $running == *" $pid "* ]]; then continue; fi
        status=0
        wait "$pid" 2> /dev/null || status=$?
        if ((status != 0)); then
            echo "process $i of $n ended with exit code $status; the others are stopped." >&2
            stop_all
            exit "$status"
        fi
        pids[i]=""
        left=$((left - 1))
    done
done
