#!/bin/sh
# The whole test suite: three backends, the slow checks once, the core on the
# oldest Keras. Set BIN and OLDEST (see Makefile).
#
# `run_all.sh` puts all lanes into a queue, the longest first, from which
# WORKERS (2) take one after the other; `run_all.sh jax slow` runs these two.
set -u
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Compiling takes longer than running here.
export JAX_DISABLE_MOST_OPTIMIZATIONS=1
lanes="tensorflow-hub tensorflow jax jax-hub torch torch-hub slow oldest"
hub="tests/hub_sweep_test.py tests/hub_test.py tests/hub_blocks_test.py
    tests/hub_experts_test.py"

# A lane's name is its backend and, after a dash, its part of the tests.
lane() {
    case $1 in
    slow) try torch -m slow ;;
    # KerasHub itself asks for a newer Keras than our oldest, and that one has
    # warnings on a newer PyTorch. Of the contract it runs two kinds of layer,
    # and nothing of what reads KerasHub's models or draws. The site's recipes
    # are for the newest Keras, which has more formats to export to.
    oldest)
        PYTHONPATH=$OLDEST${PYTHONPATH:+:$PYTHONPATH} \
            try torch -m "not slow and not once" -W default \
            -k "not contract_test or dense or conv_2d" $(without_hub) \
            --ignore=tests/exchange --ignore=tests/plots \
            --ignore=tests/examples_test.py --ignore=tests/readme_test.py \
            --ignore=tests/site_test.py
        ;;
    *-hub) try "${1%-hub}" -m "not slow" $hub ;;
    *) try "$1" -m "not slow" $(without_hub) ;;
    esac
}

try() { # backend, then pytest's arguments
    backend=$1
    shift
    [ "$backend" != jax ] || without_fusions
    KERAS_BACKEND=$backend "$BIN/python" -m pytest -p no:cacheprovider "$@"
}

# They take more than half of the time of compiling. A flag that jaxlib does
# not know would end every process.
without_fusions() {
    flags="--xla_cpu_use_fusion_emitters=false ${XLA_FLAGS:-}"
    if XLA_FLAGS=$flags "$BIN/python" -c "import jax; jax.numpy.zeros(1)"; then
        export XLA_FLAGS="$flags"
    fi
}

without_hub() {
    for file in $hub; do
        echo "--ignore=$file"
    done
}

if [ "${1:-}" = --lane ]; then
    start=$(date +%s)
    lane "$2" >"$LOGS/$2" 2>&1
    result=$?
    seconds=$(($(date +%s) - start))
    [ $result = 0 ] || cat "$LOGS/$2"
    echo "== $2: $((seconds / 60)) min $((seconds % 60)) s," \
        "$(tail -n 1 "$LOGS/$2")"
    exit $result
fi

LOGS=$(mktemp -d)
export LOGS
trap 'rm -rf "$LOGS"' EXIT
printf '%s\n' ${*:-$lanes} | xargs -n 1 -P "${WORKERS:-2}" sh "$0" --lane
