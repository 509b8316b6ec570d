#!/bin/sh
# The training steps of step_time.py, inference, and big_model.py on one NVIDIA
# card, in less than 8 minutes; see README.md beside it.
#
#     PYTHON=venv/bin/python OUT=gpu.jsonl sh benchmarks/gpu.sh
#
# Tables and messages go to the terminal, a JSON line for each goes to $OUT. A
# backend takes part if its GPU build can be imported and sees the card.
# $PEER_SCRIPT times HF PEFT beside PyTorch where that can be imported.
# DTYPE=mixed_bfloat16 takes another policy. Nothing is downloaded.
set -u

card=$(timeout 20 nvidia-smi --query-gpu=name,driver_version,memory.total \
    --format=csv,noheader 2>/dev/null) || card=
if [ -z "$card" ]; then
    echo "gpu.sh: nvidia-smi finds no NVIDIA card, so nothing is measured." >&2
    exit 1
fi
exec 2>&1
seconds=450 # for all that follows; its end may be 5 seconds late
deadline=$(($(date +%s) + seconds))

here=$(dirname "$0")
python=${PYTHON:-python3}
out=${OUT:-gpu.jsonl}
dtype=${DTYPE:-float32}
peer=${PEER_SCRIPT-$here/peft_step.py}
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
# Otherwise each process takes most of the memory as it starts.
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_FORCE_GPU_ALLOW_GROWTH=true
export TF_CPP_MIN_LOG_LEVEL=3
[ -t 1 ] || export COLUMNS=110

echo "$card" | sed 's/^/card, driver, memory: /'
first=$("$python" - "$card" <<'END'
import importlib.metadata
import json
import sys

found = {}
for name in ("keras-spectral keras keras-hub numpy torch jax jaxlib tensorflow "
             "peft transformers").split():
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
found = {"python": sys.version.split()[0], **found}
print(*(f"{name} {version}" for name, version in found.items()),
      sep=", ", file=sys.stderr)
print(json.dumps({"benchmark": "gpu", "card": sys.argv[1], "versions": found}))
END
) || exit

probe() { # BACKEND: prints its version and card, or why it is left out
    case $1 in
    torch) code='import torch
assert torch.cuda.is_available(), "it sees no GPU"
print(torch.__version__, torch.cuda.get_device_name())' ;;
    jax) code='import jax
print(jax.__version__, jax.devices("gpu")[0].device_kind)' ;;
    tensorflow) code='import tensorflow
gpus = tensorflow.config.list_physical_devices("GPU")
assert gpus, "it sees no GPU"
print(tensorflow.__version__, *gpus)' ;;
    esac
    timeout 40 "$python" -c "$code" 2>&1
}

backends= shares=0
for backend in torch jax tensorflow; do
    if said=$(probe $backend); then
        echo "$backend: $(echo "$said" | tail -n 1)"
        backends="$backends $backend"
        shares=$((shares + 4))
    else
        echo "$backend is left out: $(echo "$said" | tail -n 1)"
    fi
done
if [ -z "$backends" ]; then
    echo "gpu.sh: no backend sees the card, so nothing is measured."
    exit 1
fi
echo "$first" >>"$out"
case $backends in *torch*) shares=$((shares + 3)) ;; *) peer= ;; esac
if [ -n "$peer" ] && ! why=$(timeout 40 "$python" -c "import peft" 2>&1); then
    echo "HF PEFT is left out: $(echo "$why" | tail -n 1)"
    peer=
fi

failed=
piece() { # BACKEND SHARE COMMAND...: at most its share of the time that is left
    export KERAS_BACKEND=$1
    limit=$(((deadline - $(date +%s)) * $2 / shares))
    shares=$((shares - $2))
    shift 2
    [ "$limit" -gt 0 ] || limit=1
    echo "== $KERAS_BACKEND, $limit s at most: $*"
    timeout -k 5 "$limit" "$python" "$@" >>"$out"
    status=$?
    case $status in
    0) return ;;
    124 | 137) echo "gpu.sh: out of time after $limit s: $KERAS_BACKEND $*" ;;
    *) echo "gpu.sh: failed with exit status $status: $KERAS_BACKEND $*" ;;
    esac
    failed=yes
}

some="frozen lora dora spectral enable_lora"
common="--repeats 5 --jobs 3 --dtype $dtype"
for backend in $backends; do
    clock=wall
    if [ "$backend" = torch ]; then clock=cuda; else peer=; fi
    piece "$backend" 3 "$here/step_time.py" --case minilm --batch 128 $common \
        --clock $clock --variants $some full ${peer:+--peer-script "$peer"}
    piece "$backend" 1 "$here/step_time.py" --case dense --batch 4096 $common \
        --clock $clock --variants $some full --steps 25
done
case $backends in *torch*)
    piece torch 1 "$here/step_time.py" --case minilm --batch 128 $common \
        --clock cuda --variants $some --predict
    piece torch 2 "$here/big_model.py" --steps lora save merged merge spectral
    ;;
esac
echo "$out has the figures; $((seconds - deadline + $(date +%s))) seconds."
[ -z "$failed" ]
