#!/usr/bin/env bash
# bash experiments/gpu/rehearse.sh DATA, in the repository: what measure.sh does, on a CPU with the
# packages of the image and a tiny network, cut off in the middle of a run and gone on with as on
# another machine. Prepares it itself, for DATA as prepare.sh has it.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=${1:?the folder with cifar10 in it}
base=${BASE:-/tmp/gpu_rehearsal}
venv=$base/venv
if [ ! -x "$venv/bin/python" ]; then
    python3.12 -m venv "$venv"
    "$venv/bin/python" -m pip install -q jax==0.11.2 numpy==2.5.2 flax optax orbax-checkpoint etils \
        scipy scikit-learn pillow opencv-python-headless rich matplotlib psutil pyarrow requests \
        tqdm toolz wrapt attrs six cloudpickle fsspec zipp tensorboard pytest absl-py
fi
measure() {  # NUMBER BUDGET STEPS
    rm -rf "$base/out$1" "$base/work$1"
    SMALL=1 PYTHON=$venv/bin/python OUT=$base/out$1 WORK=$base/work$1 BUDGET=$2 STEPS=$3 \
        bash "$here/measure.sh"
}
bash "$here/prepare.sh" "$data"
CURVES=75 measure 1 600 "smoke warm bits curves"
bash "$here/prepare.sh" "$data" "$base/out1"
ROWS=pytorch:1 measure 2 560 "curves rows"
bash "$here/prepare.sh" "$data"  # or these states would travel to the machine
