#!/usr/bin/env bash
# `kiln warmup --model` compiles exactly what the example host asks for: with compiling forbidden, two processes find every kernel on disk.
# Usage: host_test.sh KILN HOST MODEL_CONFIG
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HOME=$work
unset "${!KILN_@}"

${TEST_EMULATOR-} "$1" warmup --model "$3" --scheme w8a8-dynamic --tokens 1,64
processes=(1 2)
[[ -z ${TEST_EMULATOR-} ]] || processes=(1) # 30 s each
for process in "${processes[@]}"; do
  KILN_MISS=error ${TEST_EMULATOR-} "$2" --layers 1 --once | tee "$work/table"
  grep -Eq '^kernels: 0 compiled, [1-9][0-9]* from disk, [1-9][0-9]* times from memory$' "$work/table" || { echo "process $process compiled" >&2; exit 1; }
done
