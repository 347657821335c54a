#!/usr/bin/env bash
# Proves this package on one NVIDIA GPU with 80 GB or more, without a network, in nine minutes:
#
#     benchmarks/gpu.sh [FOLDER]              results to FOLDER, else to $OUT, else to ./gpu-results
#     benchmarks/gpu.sh --rehearse [FOLDER]   the same stages at a small size on a CPU, in two minutes
#
# It needs Python with jax for CUDA, flax, optax, orbax-checkpoint and, to compare with, torch and transformers. What
# else it needs is carried beside it, in benchmarks/carried (see carry.py): wheels, and what the demo is drawn from.
set -euo pipefail
started=$SECONDS
root=$(cd "$(dirname "$0")/.." && pwd)
rehearse=()
if [[ ${1:-} == --rehearse ]]; then
  rehearse=(--rehearse)
  shift
  export JAX_PLATFORMS=cpu
  # Nearly all of its time goes into compiling.
  export XLA_FLAGS=${XLA_FLAGS:---xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true}
fi
folder=${1:-${OUT:-gpu-results}}
carried=$root/benchmarks/carried
python=${PYTHON:-python3}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# The package as it is here, whatever is installed; `convert` is imported as `qwenvl_convert`.
mkdir "$work/site"
ln -s "$root/qwenvl_jax" "$work/site/qwenvl_jax"
ln -s "$root/convert" "$work/site/qwenvl_convert"
if compgen -G "$carried/wheels/*.whl" >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/wheels" "$carried"/wheels/*.whl ||
    echo "the wheels in $carried cannot be installed; going on without them"
fi
export PYTHONPATH="$work/site:$work/wheels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false # several processes share the card
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$work/xla}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

assets=()
if [[ -n ${QWENVL_DEMO_ASSETS:-} ]]; then
  assets=(--assets "$QWENVL_DEMO_ASSETS")
elif [[ -d $carried/assets ]]; then
  assets=(--assets "$carried/assets")
fi
"$python" "$root/benchmarks/gpu.py" "$folder" --seconds $((530 - SECONDS + started)) \
  ${rehearse[@]+"${rehearse[@]}"} ${assets[@]+"${assets[@]}"}
