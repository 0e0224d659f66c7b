#!/bin/sh
# Installs cdkd-edge into a virtual environment: the packages of locks/, each wheel checked against its hash.
#
#   ./install.sh [cpu|desktop|jetpack6|jetpack7] [FOLDER]    default: what this machine is (a desktop's card: ask for it), .venv
#
# A Jetson's TensorRT is a package of JetPack: the environment sees it. `desktop` brings TensorRT for an NVIDIA card.
# Variables: PYTHON; JETSON_STATS, the release of the board's jtop, if it is not the one of the lock; TENSORRT for
# `desktop`; EXTRAS, e.g. `[export]`. Where a folder wheels/ lies beside this script (`make wheelhouse`), no network is used.
set -eu

fail() {
    echo "install.sh: $1" >&2
    exit 2
}

board=${1:-}
folder=${2:-.venv}
case $folder in /*) ;; *) folder=$PWD/$folder ;; esac
cd "$(dirname "$0")"

if [ -z "$board" ]; then
    release=$(sed -n 's/^# R\([0-9]*\).*/\1/p' /etc/nv_tegra_release 2>/dev/null || true)
    case $release in
        "") board=cpu ;;
        36) board=jetpack6 ;;
        38 | 39) board=jetpack7 ;;
        *) fail "Jetson Linux $release is neither JetPack 6 (36) nor JetPack 7 (38, 39): update JetPack" ;;
    esac
fi
lock=$board needed='' options=''
case $board in
    cpu | desktop) lock=x86-64 ;;
    jetpack6) needed=3.10 options=--system-site-packages ;;
    jetpack7) needed=3.12 options=--system-site-packages ;;
    *) fail "no board is called $board: take cpu, desktop, jetpack6 or jetpack7" ;;
esac
python=${PYTHON:-python3}
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ -n "$needed" ] && [ "$found" != "$needed" ]; then
    fail "$board has Python $needed, $python is $found: PYTHON=python$needed ./install.sh $board"
fi

package=".${EXTRAS:-}" offline=''
if [ -d wheels ]; then
    [ "$board" != desktop ] || fail "TensorRT's libraries come from NVIDIA: take cpu, or a checkout and a network"
    [ -e "locks/$lock.txt" ] || fail "this folder has $(ls locks), nothing for $board: make wheelhouse BOARD=$lock"
    sha256sum --check --quiet SHA256SUMS || fail "not as it was made: copy the folder again, or make it again"
    package=$(echo wheels/cdkd_edge-*.whl) offline='--no-index --find-links wheels'
    tag=cp$(echo "$found" | tr -d .)
    [ -e "$(echo wheels/numpy-*-"$tag"-*.whl)" ] || fail "the wheels here are not for Python $found: PYTHON=python3.X"
fi

# shellcheck disable=SC2086  # none, or several words
install() {
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check $offline "$@"
}
# shellcheck disable=SC2086
"$python" -m venv $options "$folder"
install --require-hashes -r "locks/$lock.txt"
if [ "$board" = desktop ]; then
    # What PyPI has of TensorRT's libraries is a stub, which fetches them from NVIDIA while it is installed. Built for
    # CUDA 12, which runs with older drivers than CUDA 13 does. JetPack 7.2 has 10.16.2.10: engines do not carry over.
    install -c constraints.txt "tensorrt-cu12==${TENSORRT:-10.16.1.11}" cuda-python==12.9.4 nvidia-ml-py
fi
if [ -n "${JETSON_STATS:-}" ]; then
    install --no-deps "jetson-stats==$JETSON_STATS"
fi
install -c constraints.txt "$package"
echo "installed; next: $folder/bin/cdkd-edge doctor"
