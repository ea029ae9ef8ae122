#!/bin/bash
# hf_latest.sh: make test_hf_latest. Runs the suites that use PyTorch or Hugging Face's packages with the newest of them, in an
# environment of its own, build/hf_latest, which is made or brought up to date first: some 7 GB, as PyTorch comes with CUDA.
cd "$(dirname "$0")/.." || exit 1
environment=$PWD/build/hf_latest
if ! python=$(dev/tools/find_python.sh venv ensurepip 2>/dev/null); then
    echo "no Python that can make an environment (Debian: python3-venv)" >&2
    exit 1
fi
unset PYTHONPATH
[ -x "$environment/bin/python" ] || "$python" -m venv "$environment" || exit 1
"$environment/bin/python" -m pip install -q --upgrade pip torch numpy transformers accelerate safetensors tokenizers 'lm-eval[hf]' \
    tensorboard wandb matplotlib tiktoken || exit 1

passed=0 failed=0
for suite in "dev/reference/make_dumps.py --check" test/test_{reference,tokenizer,hf,lm_eval,watch}.py; do
    echo "== $suite"
    # shellcheck disable=SC2086
    PATH="$environment/bin:$PATH" PYTHON="$environment/bin/python" "$environment/bin/python" $suite | tee "$environment/log"
    status=${PIPESTATUS[0]}
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed' "$environment/log" | tail -1)
    read -r p _ f _ <<<"${line:-0 x 0}"
    [ "$status" -eq 0 ] || [ "$f" -gt 0 ] || f=1  # it ended before it could count
    passed=$((passed + p)) failed=$((failed + f))
done
"$environment/bin/python" -m pip list 2>/dev/null |
    grep -E '^(torch|numpy|transformers|accelerate|safetensors|tokenizers|lm_eval|datasets|tensorboard|wandb|matplotlib) '
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
