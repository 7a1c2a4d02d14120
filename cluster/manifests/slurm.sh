
# --- from here on the script is the same for every job ---
set -euo pipefail
cd "${DIRECTORY:-${SLURM_SUBMIT_DIR:-$PWD}}"
export PATH="$PWD/.venv/bin:$PATH"
export RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
environment

# Whoever reaches a node's ports needs the token; it is made for this start and stays in the job's environment.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if [ -n "$INTERFACE" ]; then
    head_ip=$(ip -4 -o addr show dev "$INTERFACE" | awk '{ sub("/.*", "", $4); print $4; exit }')
else
    head_ip=$(getent ahostsv4 "${hosts[0]}" | awk '$1 !~ /^127\./ { print $1; exit }')
    if [ -z "$head_ip" ] && [ "${#hosts[@]}" -eq 1 ]; then head_ip=127.0.0.1; fi
fi
if [ -z "$head_ip" ]; then
    echo "danlu: no address of ${hosts[0]} that the other nodes reach; set slurm.interface" >&2
    exit 2
fi
# By the job's number, so that two jobs on one machine do not meet.
export HEAD_IP=$head_ip PORT=$((20000 + SLURM_JOB_ID % 12000)) OBJECT_STORE_BYTES JOIN_S

# What every node runs: the first one the head, the others join it. The head counts as a worker too.
# shellcheck disable=SC2016  # expanded on the node
node='
set -eu
common="--num-cpus=$SLURM_CPUS_ON_NODE --num-gpus=${SLURM_GPUS_ON_NODE:-0} --object-store-memory=$OBJECT_STORE_BYTES --block"
if [ "$SLURM_NODEID" = 0 ]; then
    exec ray start --head --node-ip-address="$HEAD_IP" --port="$PORT" --temp-dir="/tmp/danlu-$SLURM_JOB_ID" \
        --include-dashboard=false $common
fi
for _ in $(seq "$JOIN_S"); do
    if (exec 3<> "/dev/tcp/$HEAD_IP/$PORT") 2> /dev/null; then
        exec ray start --address="$HEAD_IP:$PORT" $common
    fi
    sleep 1
done
echo "danlu: $(hostname): no head at $HEAD_IP:$PORT after $JOIN_S s" >&2
exit 1
'
# All of the allocation, which a step does not get by itself; --overlap: the driver needs none of its own.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --cpus-per-task="$SLURM_CPUS_ON_NODE" --mem=0 --overlap --kill-on-bad-exit=0 "${SRUN[@]}" bash -c "$node" &
ray=$!

driver='' again=''
# Some minutes before the time limit: stop at the next commit and queue the job again.
# Preempted jobs are queued again by Slurm itself; scancel ends the run for good.
trap 'again=yes; [ -z "$driver" ] || kill -TERM "$driver" 2> /dev/null || true' USR1
trap '[ -z "$driver" ] || kill -TERM "$driver" 2> /dev/null || true' TERM INT

code=0
if python -m cluster.ready --address "$HEAD_IP:$PORT" --nodes "$SLURM_JOB_NUM_NODES" --timeout "$JOIN_S"; then
    cpus=$((SLURM_CPUS_ON_NODE * SLURM_JOB_NUM_NODES))
    python -m pipelines run "$RECIPE" --runs "$RUNS" --address "$HEAD_IP:$PORT" --workers "$cpus" &
    driver=$!
    if [ -n "$again" ]; then kill -TERM "$driver" 2> /dev/null || true; fi
    # a signal ends `wait` before the driver has ended; asked again, it tells the driver's own exit code
    while wait "$driver" || true; kill -0 "$driver" 2> /dev/null; do :; done
    wait "$driver" || code=$?
else
    code=$?
fi

kill -TERM "$ray" 2> /dev/null || true
wait "$ray" || true

if [ -n "$again" ] && [ "$code" -ne 0 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -lt "$REQUEUES" ]; then
        echo "danlu: the time is up; the job is queued again and goes on where it stopped"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "danlu: the time is up, and the job was restarted $REQUEUES times" >&2
    fi
fi
exit "$code"
