#!/usr/bin/env bash
# A real Slurm on this one machine: munged, slurmctld and slurmd, all their files under the folder given.
# Usage: slurm.sh start FOLDER | slurm.sh stop FOLDER. Needs root and Debian's packages slurm-wlm and munge.
set -euo pipefail
action="$1" folder="$(realpath -m "$2")"
conf="$folder/slurm.conf"

case "$action" in
start)
    mkdir -p "$folder"/{state,spool,log,run}
    dd if=/dev/urandom of="$folder/munge.key" bs=128 count=1 status=none
    chmod 0700 "$folder" "$folder/run"
    chmod 0400 "$folder/munge.key"
    munged --force --socket="$folder/run/munge.socket" --key-file="$folder/munge.key" \
        --log-file="$folder/log/munged.log" --pid-file="$folder/run/munged.pid" --seed-file="$folder/run/munge.seed"
    host="$(hostname -s)" cores="$(getconf _NPROCESSORS_ONLN)"  # nproc heeds OMP_NUM_THREADS
    read -r first second < <(python3 -c '
import socket
a, b = socket.socket(), socket.socket()
a.bind(("127.0.0.1", 0)), b.bind(("127.0.0.1", 0))
print(a.getsockname()[1], b.getsockname()[1])')
    cat >"$conf" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$first
SlurmdPort=$second
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.socket
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores RealMemory=1000 Gres=gpu:1 State=UNKNOWN
PartitionName=gpu Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    # a device that every machine has stands for the GPU: jobs ask for one, and do not use it
    echo "Name=gpu File=/dev/null" >"$folder/gres.conf"
    export SLURM_CONF="$conf"
    slurmctld -f "$conf"
    slurmd -f "$conf"
    for _ in $(seq 120); do
        if sinfo --noheader --format=%t 2>/dev/null | grep -q idle; then exit 0; fi
        sleep 0.5
    done
    echo "slurm: the node did not come up; see $folder/log" >&2
    tail -n 20 "$folder"/log/*.log >&2
    exit 1
    ;;
stop)
    export SLURM_CONF="$conf"
    for name in slurmd slurmctld munged; do
        if [ -f "$folder/run/$name.pid" ]; then kill "$(cat "$folder/run/$name.pid")" || true; fi
    done
    ;;
*)
    echo "slurm: $action is neither start nor stop" >&2
    exit 2
    ;;
esac
