#!/bin/sh
# need.sh PACKAGE...: makes sure that what these Debian packages bring is there. Where it is not, installs them if this is
# Debian or Ubuntu and we may, and otherwise says what to install.
missing=
for package in "$@"; do
    case $package in
        g++) command -v "${CXX:-g++}" >/dev/null 2>&1 && continue ;;
        clang) command -v clang++ >/dev/null 2>&1 && continue ;;
        doctest-dev) echo '#include <doctest/doctest.h>' | "${CXX:-g++}" -x c++ -E - >/dev/null 2>&1 && continue ;;
        libboost-context-dev)  # the library too: other packages bring the headers alone
            printf '#include <boost/context/detail/fcontext.hpp>\nint main() {}\n' | "${CXX:-g++}" -x c++ - -lboost_context -o /dev/null 2>/dev/null && continue ;;
        libopenblas-dev) echo '#include <cblas.h>' | "${CXX:-g++}" -x c++ -E - >/dev/null 2>&1 && continue ;;
        *) dpkg -s "$package" >/dev/null 2>&1 && continue ;;
    esac
    missing="$missing $package"
done
[ -z "$missing" ] && exit 0
sudo=
[ "$(id -u)" = 0 ] || sudo=sudo
if command -v apt-get >/dev/null 2>&1 && { [ -z "$sudo" ] || command -v sudo >/dev/null 2>&1; }; then
    echo "installing$missing"
    $sudo apt-get install -y --no-install-recommends $missing >/dev/null 2>&1 && exit 0
    $sudo apt-get update >/dev/null && $sudo apt-get install -y --no-install-recommends $missing >/dev/null && exit 0
fi
echo "missing:$missing. Install what these Debian packages hold (a C++20 compiler with OpenMP; the doctest header; Boost.Context; OpenBLAS), then try again." >&2
exit 1
