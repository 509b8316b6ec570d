#!/bin/sh
# The whole test suite: three backends two at a time, then the slow checks
# once, then the core on the oldest Keras. Set BIN and OLDEST (see Makefile).
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

KERAS_BACKEND=jax run jax -m "not slow" &
(
    KERAS_BACKEND=torch run torch -m "not slow"
    KERAS_BACKEND=tensorflow run tensorflow -m "not slow"
) &
wait
report jax
report torch
report tensorflow
KERAS_BACKEND=torch run slow -m slow
report slow
# KerasHub itself asks for a newer Keras than our oldest, and that one has
# warnings on a newer PyTorch.
KERAS_BACKEND=torch PYTHONPATH=$OLDEST run oldest -m "not slow" -W default \
    --ignore tests/hub_sweep_test.py --ignore tests/hub_test.py
report oldest
rm -rf "$logs"
exit $failed
