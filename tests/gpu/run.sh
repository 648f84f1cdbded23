#!/bin/bash
# tests/gpu (and more, if named), files dealt out over this host's GPUs, those that judge times first
# and alone.
#   tests/gpu/run.sh OUT_FOLDER [file or folder of tests ...]
# Each part's output is OUT_FOLDER/part-*.txt; exit status 1 if a test failed.
set -u
cd "$(dirname "$0")/../.." || exit 3
out=${1:?where to write}
shift
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export out python=${PYTHON:-python3}
gpus=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU)
[ "$gpus" -gt 0 ] || gpus=1
# The longest first: lines of a file are all that is known of how long it takes.
mapfile -t files < <(find tests/gpu "$@" -name 'test_*.py' -exec wc -l {} + | grep -v ' total$' |
  sort -rn | awk '{print $2}' | uniq)

part() { # name, GPU, then what pytest is to run
  local name=$1 gpu=$2
  shift 2
  CUDA_VISIBLE_DEVICES=$gpu "$python" -m pytest -q -rfE -p no:cacheprovider --durations=5 "$@" \
    >"$out/part-$name.txt" 2>&1
  local status=$?
  echo "$name: $(tail -1 "$out/part-$name.txt")"
  grep -a "^FAILED\|^ERROR" "$out/part-$name.txt"
  [ $status = 0 ] || [ $status = 5 ] # 5: no test of that kind
}
export -f part

failed=0
part timed 0 -s -m timed "${files[@]}" || failed=1
printf '%s\0' "${files[@]}" | xargs -0 -n 1 -P "$gpus" --process-slot-var=GPU bash -c \
  'part "$(basename "$1" .py)" "$GPU" -m "not timed" "$1"' part || failed=1
exit $failed
