#!/bin/sh
# need.sh PACKAGE...: makes sure that what these Debian packages bring is there; nvcc and cupti are the CUDA Toolkit's.
# Installs what is missing where there is apt-get and we are root, and otherwise says what to install. It never waits
# long for a network that is not there.
# shellcheck disable=SC2086
missing='' compiler=${CXX:-g++}
for package in "$@"; do
    case $package in
        nvcc | cupti) dev/tools/cuda.sh "$package" >/dev/null || exit 1; continue ;;
        g++)  # CXX, with OpenMP, which clang has in a package of its own for each version
            name=${compiler%% *} name=${name##*/}
            number=${name#clang++} number=${number#-}
            if command -v "${compiler%% *}" >/dev/null 2>&1; then
                echo '#include <omp.h>' | $compiler ${OPENMP:--fopenmp} -x c++ -E - >/dev/null 2>&1 && continue
                number=$($compiler -dumpversion) number=${number%%.*}
                $compiler --version | grep -q clang && package=libomp-$number-dev
            else
                case $name in
                    clang++*) package="clang${number:+-$number} libomp${number:+-$number}-dev" ;;
                    g++-*) package=$name ;;
                esac
            fi ;;
        emscripten) command -v em++ >/dev/null 2>&1 && continue ;;
        clang) command -v clang++ >/dev/null 2>&1 && continue ;;
        doctest-dev) echo '#include <doctest/doctest.h>' | $compiler -x c++ -E - >/dev/null 2>&1 && continue ;;
        libboost-context-dev)  # the library too: other packages bring the headers alone
            printf '#include <boost/context/detail/fcontext.hpp>\nint main() {}\n' | $compiler -x c++ - -lboost_context -o /dev/null 2>/dev/null && continue ;;
        libopenblas-dev) echo '#include <cblas.h>' | $compiler -x c++ -E - >/dev/null 2>&1 && continue ;;
        *) dpkg -s "$package" >/dev/null 2>&1 && continue ;;
    esac
    missing="$missing $package"
done
[ -z "$missing" ] && exit 0
install="apt-get install -y --no-install-recommends$missing"
if ! command -v apt-get >/dev/null 2>&1; then
    echo "missing:$missing. Install what these Debian packages hold (a C++20 compiler with OpenMP; the doctest header;" \
        "Boost.Context; OpenBLAS; on a Mac: brew install libomp doctest), then try again." >&2
    exit 1
elif [ "$(id -u)" != 0 ]; then
    echo "missing:$missing. Run this, then try again:  sudo $install" >&2
    exit 1
fi
echo "installing$missing"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
answered() { grep -qE '^(Get|Hit):' "$log"; }
# By itself apt-get tries servers that do not answer for minutes. It gets 10 s, and once one has answered all it takes.
apt-get update >"$log" 2>&1 &
update=$!
tries=0
while kill -0 $update 2>/dev/null && ! answered && [ $tries -lt 50 ]; do
    sleep 0.2
    tries=$((tries + 1))
done
if answered; then
    wait $update
    $install -o DPkg::Lock::Timeout=10 >"$log" 2>&1 && exit 0
fi
kill $update 2>/dev/null
echo "missing:$missing, and apt-get could not install it: $(grep -m 1 '^E:' "$log" || echo no server answered)." \
    "Try again:  $install" >&2
exit 1
