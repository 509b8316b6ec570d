#!/bin/sh
# The whole test suite, in two lanes for two cores: three backends, the slow
# checks once, the core on the oldest Keras. Set BIN and OLDEST (see Makefile).
set -u
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Compiling takes longer than running here.
export JAX_DISABLE_MOST_OPTIMIZATIONS=1
logs=$(mktemp -d)
failed=0

run() { # name, then pytest's arguments
    name=$1
    shift
    "$BIN/python" -m pytest "$@" >"$logs/$name" 2>&1
    echo $? >"$logs/$name.rc"
}

report() { # name
    echo "== $1"
    cat "$logs/$1"
    [ "$(cat "$logs/$1.rc")" = 0 ] || failed=1
}

# KerasHub itself asks for a newer Keras than our oldest, and that one has
# warnings on a newer PyTorch. Of the contract it runs two kinds of layer.
(
    KERAS_BACKEND=jax run jax -m "not slow"
    KERAS_BACKEND=torch run slow -m slow
    KERAS_BACKEND=torch PYTHONPATH=$OLDEST run oldest -m "not slow" \
        -W default -k "not contract_test or dense or conv_2d" \
        --ignore tests/hub_sweep_test.py --ignore tests/hub_test.py \
        --ignore tests/hub_blocks_test.py
) &
(
    KERAS_BACKEND=torch run torch -m "not slow"
    KERAS_BACKEND=tensorflow run tensorflow -m "not slow"
) &
wait
for name in jax torch tensorflow slow oldest; do
    report $name
done
rm -rf "$logs"
exit $failed
