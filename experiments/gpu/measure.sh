#!/usr/bin/env bash
# BUDGET=565 bash experiments/gpu/measure.sh, in the project's root on the machine with the GPU,
# with .gpu/ from prepare.sh. README.md says what the steps do. None of them stops the next, and
# what they make lies in $WORK, so that a second call goes on.
set -u
began=$(date +%s)
export OUT=${OUT:-/tmp/gpu_out} WORK=${WORK:-/tmp/gpu}  # what comes back; all else
BUDGET=${BUDGET:-565}  # seconds for all of it: 30 or more below the limit of the call
STEPS=${STEPS:-smoke warm curves}
FLAGS=${FLAGS:---config.max_per_device_batch=640 --config.eval_batch_size=2500 --config.tensorboard=false}
FIGURES=${FIGURES:-3a,5} SEEDS=${SEEDS:-1} SCALE=${SCALE:-paper}
NAMES=${NAMES-hybrid figure5_increased_lr figure5_increased_momentum}  # of curves; empty: all
AT_ONCE=${AT_ONCE:-1}  # runs that share the GPU; with 1, seconds a curve can be published
CURVES=${CURVES:-9999}  # seconds for them at most, so that rows can follow
RECORD=${RECORD-experiments/records/2026-11-26_h200}  # its runs are over; may be empty
ROWS=${ROWS:-pytorch:9 goodput:2 flax_norm:9} ROW_SECONDS=${ROW_SECONDS:-200}
PACKING=30  # seconds that are kept for it
python=${PYTHON:-python3}
settings=dtype=bfloat16
smoke=recipe.epochs=4,recipe.falls=\(\(1,5\),\(2,5\),\(3,5\)\)
if [ -n "${SMALL:-}" ]; then  # to rehearse on a CPU
    settings=$settings,model.depth=10,model.width=1,data.augment.crop=8,data.image_size=8
    smoke=recipe.epochs=0.6,recipe.falls=\(\(0.2,5\),\(0.3,5\),\(0.4,5\)\)
    FIGURES=6 SCALE=digits NAMES="" RECORD="" FLAGS=--config.tensorboard=false
fi
mkdir -p "$OUT" "$WORK/logs"
exec > >(tee -a "$OUT/measure.log") 2>&1

left() { echo $(( BUDGET - PACKING - $(date +%s) + began )); }
step() {  # NAME LIMIT COMMAND...: its output in a log of its own, the end of that here
    local name=$1 limit=$2 since status; shift 2
    [ "$limit" -lt "$(left)" ] || limit=$(left)
    [ "$limit" -gt 5 ] || { echo "-- $name: no time is left"; return 1; }
    since=$(date +%s)
    timeout --kill-after=20 "$limit" "$@" > "$WORK/logs/$name.log" 2>&1
    status=$?
    echo "-- $name: status $status after $(( $(date +%s) - since )) s, $(left) s left"
    tail -n "${TAIL:-12}" "$WORK/logs/$name.log" | cut -c1-300 | sed 's/^/   /'
    return $status
}
give_up() {
    echo "STOPPED before more time goes: $1"
    "$python" experiments/gpu/packing.py pack; sleep 0.2; exit 1
}

# Set up, once on each machine. JAX resolves the machine's own name, and ends where it cannot.
host=$(cat /proc/sys/kernel/hostname)
getent hosts "$host" > /dev/null || echo "127.0.0.1 $host" >> /etc/hosts
export PYTHONPATH=$WORK/site:$PWD PYTHONUNBUFFERED=1 XDG_CACHE_HOME=$WORK/cache
install=("$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade
         --target "$WORK/site")
if [ ! -e "$WORK/ready" ]; then
    { uname -a; nproc; free -g | head -2; nvidia-smi; } > "$WORK/logs/machine.log" 2>&1
    grep -E "NVIDIA (H|A)|Driver" "$WORK/logs/machine.log"
    TAIL=3 step unpack 60 "$python" experiments/gpu/packing.py unpack &
    unpacking=$!
    step install 90 "${install[@]}" .gpu/wheels/*.whl
    step packages 60 "$python" experiments/gpu/packages.py || {
        step newer 60 "${install[@]}" .gpu/newer/*.whl
        step packages 60 "$python" experiments/gpu/packages.py; } || give_up "packages are missing"
    wait $unpacking
    [ -d "$WORK/data" ] || give_up "the data are missing"
    XLA_PYTHON_CLIENT_PREALLOCATE=false step ceilings 60 "$python" experiments/gpu/ceilings.py ||
        [ -n "${SMALL:-}" ] || give_up "JAX finds no GPU"
    touch "$WORK/ready"
fi

epochs() {  # WORKDIR FLAG...: a few, with every batch that the presets have
    local workdir=$WORK/$1; shift
    "$python" -m bigbatch.main "--config=configs/cifar10.py:figure5_increasing_batch,$settings,$smoke" \
        "--config.data.dir=$WORK/data" $FLAGS "--workdir=$workdir" "$@"
}
bits() {  # the same bits from empty caches, and stopped on the way?
    epochs bits_1 --config.deterministic=true --compilation_cache= || return 1
    epochs bits_2 --config.deterministic=true --compilation_cache= --stop_after_phase=noise/1
    epochs bits_2 --config.deterministic=true --compilation_cache= || return 1
    cmp "$WORK/bits_1/metrics.jsonl" "$WORK/bits_2/metrics.jsonl" &&
        echo "$(wc -l < "$WORK/bits_1/metrics.jsonl") lines of metrics.jsonl are the same bytes"
}
export -f epochs bits
export python settings smoke FLAGS
for each in $STEPS; do
    case $each in
    smoke) rm -rf "$WORK/smoke"; step smoke 240 bash -c "epochs smoke" ;;
    warm) rm -rf "$WORK/warm"; step warm 90 bash -c "epochs warm --profile=20:5" ;;
    bits) rm -rf "$WORK"/bits_*; step bits 300 bash -c bits ;;
    curves)
        [ -z "$RECORD" ] || [ -e "$WORK/runs" ] || {
            tar -C "$WORK" -xzf "$RECORD/runs.tar.gz"; cp -n "$RECORD/trainings.json" "$WORK"; }
        # Told to stop 25 s before the end, which runs take to save.
        limit=$(left); [ "$CURVES" -lt "$limit" ] || CURVES=$limit
        step curves "$limit" timeout --kill-after=25 "$(( CURVES > 40 ? CURVES - 25 : 15 ))" \
            "$python" -m experiments.reproduce "--figure=$FIGURES" "--scale=$SCALE" \
            ${NAMES:+$(printf -- '--curve=%s ' $NAMES)} "--seeds=$SEEDS" "--at_once=$AT_ONCE" \
            "--workdir=$WORK" "--data_dir=$WORK/data" $FLAGS
        ;;
    rows)
        for row in $ROWS; do
            # Rows may measure compiling, so not programs are kept but which algorithms were fastest.
            XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_per_fusion_autotune_cache_dir=$WORK/autotuned" \
            step "row_${row%:*}" "$ROW_SECONDS" "$python" -m experiments.speed.table \
                --only="${row%:*}" --repeats="${row#*:}" \
                --output="$WORK/logs/speed_${row%:*}.json" ${SMALL:+--short}
        done ;;
    *) echo "-- $each is no step" ;;
    esac
done
TAIL=60 PACKING=12 step speeds 30 "$python" experiments/gpu/speeds.py
PACKING=0 TAIL=20 step pack 30 "$python" experiments/gpu/packing.py pack
echo "-- all: $(( $(date +%s) - began )) s"; sleep 0.2
