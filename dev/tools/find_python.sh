#!/bin/sh
# find_python.sh MODULE...: prints a Python that has all these modules: $PYTHON, python3 or Debian's own.
for python in "${PYTHON:-python3}" python3 /usr/bin/python3; do
    if "$python" -c "$(printf 'import %s\n' "$@")" >/dev/null 2>&1; then
        echo "$python"
        exit 0
    fi
done
echo "no Python with $* found; install them (Debian: python3-torch, python3-numpy) or set PYTHON" >&2
exit 1
