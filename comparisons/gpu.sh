#!/bin/bash
# What one GPU can tell, in pieces of at most eight minutes. From the root of the repository:
#
#     bash comparisons/gpu.sh PART [more options of its command]
#
#     bench     time and memory beside normflows, vectors and images, and the cost of the certificate
#     bench-classifiers  the cost of the certificate in classifiers, and torch.compile
#     classify  MNIST: vanilla and c = .9, four minutes each
#     density   MNIST: ours, Glow and Real NVP, at equal parameters and equal time
#     cifar     CIFAR-10: vanilla and c = .9 by the published recipe; many pieces
#
# A part that is not finished ends with exit code 75, and the same command goes on from its checkpoints.
# OUT is the folder of the results (gpu-results), DEVICE may be cpu to try the script, IRESFLOW_DATA names the data, and
# WHEELS, if set, is a folder of wheels to install from where no package index can be reached.
set -euo pipefail
part=${1:?give a part: bench, bench-classifiers, classify, density or cifar}; shift
out=${OUT:-gpu-results}/$part
device=${DEVICE:-cuda}
if [ -n "${WHEELS:-}" ]; then python -m pip install --quiet --no-index --find-links "$WHEELS" -e ".[comparisons]"; fi

case $part in
bench) set -- bench --batch 256 "$@" ;;
bench-classifiers) set -- bench --kind classifiers "$@" ;;
classify) set -- classify --data mnist --vanilla --c 0.9 --seconds 200 --batch 128 --piece 450 "$@" ;;
density)
    set -- run --task mnist --method ours --method nflows-glow --method nflows-realnvp --method normflows-glow \
        --seconds 90 --workers 1 --piece 450 "$@"
    ;;
cifar) set -- classify --data cifar10 --size paper --vanilla --c 0.9 --precision bf16-mixed --piece 450 "$@" ;;
*) echo "there is no part $part; there are: bench, bench-classifiers, classify, density, cifar" >&2; exit 2 ;;
esac
exec python -m comparisons "$@" --device "$device" --out "$out"
