#!/bin/bash
# Every shipped kernel under compute-sanitizer (memcheck, racecheck), shards side by side on all GPUs.
#   tests/gpu/sanitize.sh OUT_FOLDER [shards per tool = 8] [seconds per tool = 250] [tools] [batches] \
#       [file of digests of kernels that were checked and are left out, e.g. tests/gpu/checked.txt]
# With 15 shards on a GPU a call that takes 9 s alone takes over 100; it may take the tool's seconds.
# OUT_FOLDER/clean.txt: digests of the packs' kernels that every tool found nothing at.
# Takes the first compute-sanitizer that works: PATH, CUDA toolkits, those named in $SANITIZERS.
# Without one: guard zones instead, exit status 2.
set -u
cd "$(dirname "$0")/../.." || exit 3
out=${1:?where to write} shards=${2:-8} seconds=${3:-250} tools=${4:-"memcheck racecheck"}
batches=${5:-mixed,one} checked=${6:+--checked $6}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
python=${PYTHON:-python3}
gpus=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU) || gpus=1

works() { # a sanitizer may lack its libraries, or not know the driver
  local libraries
  libraries=$(dirname "$1")
  LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} timeout 120 "$1" \
    --launch-timeout 100 "$python" -c 'import torch; torch.ones(2, device="cuda").sum().item()' \
    2>&1 | tee "$out/probe.txt" | grep -q "ERROR SUMMARY: 0 errors"
}

find_sanitizer() {
  local file
  for file in $(command -v compute-sanitizer) /usr/local/cuda*/bin/compute-sanitizer \
    /usr/local/cuda*/compute-sanitizer/compute-sanitizer /opt/nvidia/*/compute-sanitizer \
    ${SANITIZERS:-}; do
    [ -x "$file" ] && [ -f "$file" ] && works "$file" && echo "$file" && return
  done
  return 1
}

run_shards() { # tool, then the command in front of python
  local tool=$1 i
  shift
  for ((i = 0; i < shards; i++)); do
    CUDA_VISIBLE_DEVICES=$((i % gpus)) timeout $((2 * seconds + 60)) "$@" "$python" \
      tests/gpu/sanitize_packs.py --shard "$i/$shards" --limit "$seconds" --stall "$seconds" --batches "$batches" $guards $checked \
      >"$out/$tool-$i.txt" 2>&1 &
  done
  wait
}

report() { # tool
  "$python" - "$out" "$1" "$shards" <<'PY'
import json, re, sys
from pathlib import Path
out, tool, shards = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
kernels = calls = errors = 0
bad, left, clean = [], [], set()
for i in range(shards):
    text = (out / f"{tool}-{i}.txt").read_text(errors="replace")
    found = re.findall(r"^\{.*\}$", text, re.M)
    if not found:
        bad.append(f"shard {i} did not end: {text.strip().splitlines()[-1:]}")
        continue
    summary = json.loads(found[-1])
    kernels, calls = kernels + summary["kernels"], calls + summary["calls"]
    bad += summary["failures"]
    left += summary["not_run"]
    told = re.findall(r"SUMMARY: (\d+) (?:error|hazard)", text)
    # The tool does not say which kernel an error is of.
    clean |= set(summary["clean"] if tool == "guards" or told and not int(told[-1]) else ())
    if tool != "guards" and not told:
        bad.append(f"shard {i}: {tool} gave no summary")
    if told and int(told[-1]):
        errors += int(told[-1])
        first = next((n for n, line in enumerate(text.splitlines()) if line.startswith("========= ")
                      and "COMPUTE-SANITIZER" not in line), 0)
        bad += [f"shard {i}: " + line for line in text.splitlines()[first:first + 8]]
(out / f"clean-{tool}.txt").write_text("".join(f"{one}\n" for one in sorted(clean)))
print(f"{tool}: {kernels} kernels, {calls} calls, {errors} errors or hazards, "
      f"{len(bad)} lines to look at, {len(left)} kernels not run")
for line in [*bad[:40], *(f"not run: {name}" for name in left[:10])]:
    print("  " + line[:240])
sys.exit(1 if bad or left else 0)
PY
}

guards="" status=0
if sanitizer=$(find_sanitizer); then
  "$sanitizer" --version | tail -1
  export LD_LIBRARY_PATH=$(dirname "$sanitizer")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  for tool in $tools; do
    options=(--tool "$tool" --error-exitcode 9 --print-limit 20 --launch-timeout 300)
    [ "$tool" = memcheck ] && options+=(--padding 4096)
    began=$SECONDS
    run_shards "$tool" "$sanitizer" "${options[@]}"
    report "$tool" || status=1
    echo "$tool took $((SECONDS - began)) s"
  done
  for tool in $tools; do cat "$out/clean-$tool.txt"; done | sort | uniq -c |
    awk -v tools="$(wc -w <<<"$tools")" '$1 == tools { print $2 }' >"$out/clean.txt"
  exit $status
fi
echo "compute-sanitizer was not found: guard zones instead"
guards=--guards
run_shards guards
report guards || status=1
[ $status = 0 ] && exit 2
exit $status
