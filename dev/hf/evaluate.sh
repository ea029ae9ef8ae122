#!/bin/sh
# evaluate.sh MODEL TASK... [-- FLAGS]: measures a model by lm-evaluation-harness; harness.py says what MODEL, TASK and FLAGS are.
here=$(dirname "$0")
python=$("$here/../tools/find_python.sh" torch lm_eval 2>/dev/null) || {
    echo "evaluate.sh: expected a Python with torch and lm_eval, found none;" \
        "pip install 'lm_eval[hf]', or set PYTHON to one that has it" >&2
    exit 1
}
exec "$python" "$here/harness.py" "$@"
