#!/usr/bin/env bash
# bash experiments/gpu/prepare.sh DATA [RESULTS], in the repository: makes .gpu/, see README.md.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=${1:?the folder with cifar10 in it} results=${2:-}
python=${PYTHON:-python3}
[ -d "$data/cifar10" ] || { echo "$data has no cifar10 in it"; exit 2; }
mkdir -p .gpu/wheels .gpu/newer .gpu/resume
echo "$(git rev-parse HEAD)$(git diff --quiet HEAD || echo ' with uncommitted changes')" \
    > .gpu/revision

# What the image lacks, and what is taken only where its own are older than pyproject.toml allows.
lacking="ml-collections==1.1.0 tensorflow-datasets==4.9.10 array-record==0.8.6 grain==0.2.18
    portpicker==1.6.0 tensorboardX==2.6.5 tensorflow-metadata==1.21.0 immutabledict==4.3.1
    dm-tree==0.1.10 promise==2.3 toml==0.10.2 tabulate==0.10.0 markdown==3.11.3 clu==0.0.12"
newer="flax==0.12.12 optax==0.2.8 orbax-checkpoint==0.12.8 etils==1.15.0 protobuf==7.36.2"
wheels() {  # FOLDER NAME==VERSION...: of that version, or of whatever version there is
    local folder=$1 what; shift
    [ "$(cat "$folder/.whole" 2>/dev/null)" != "$*" ] || return 0
    rm -f "$folder"/*.whl
    for each in "$@"; do
        for what in "$each" "${each%%==*}" NONE; do
            [ "$what" != NONE ] || { echo "$each was not found"; exit 1; }
            "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
                --implementation cp --platform manylinux_2_28_x86_64 \
                --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
                --platform manylinux2014_x86_64 -d "$folder" "$what" 2>/dev/null && break
            "$python" -m pip wheel -q --no-deps -w "$folder" "$what" 2>/dev/null && break
        done
    done
    echo "$*" > "$folder/.whole"
}
wheels .gpu/wheels $lacking
wheels .gpu/newer $newer

# JPEGs of one quality repeat their tables: xz takes 19 MB for 50.
packed=$(cd "$data" && pwd && du -sb cifar10)
[ -e .gpu/cifar10.tar.xz ] && [ "$(cat .gpu/packed 2>/dev/null)" = "$packed" ] || {
    tar -C "$data" -cJf .gpu/cifar10.tar.xz.new cifar10
    mv .gpu/cifar10.tar.xz.new .gpu/cifar10.tar.xz
    echo "$packed" > .gpu/packed
}
rm -f .gpu/resume/*
[ -z "$results" ] || cp "$results"/logs.tar.xz "$results"/state*.tar.* "$results"/cache.tar.gz \
    .gpu/resume/ 2>/dev/null || true
tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -cb | tail -1 | cut -f1)
echo ".gpu has $(( $(du -sb .gpu | cut -f1) / 1048576 )) MiB, the working tree" \
    "$(( tree / 1048576 ))"
