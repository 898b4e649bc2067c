# One call of the plan on a GPU machine without a network: gpu.sh "CALL..." COMMIT [SECONDS]
#
# Run in the repository's root. Expects wheels in .gpu/whl, prompts in .gpu/data, generators as
# ~/kit/models/*.gguf (kit.py), and, in a later lease, earlier parts of the lab in .gpu/lab*/.
# Leaves the lab in ~/lab, so that the next call of the same lease goes on; writes what is new to
# $OUT. RESULTS_OPTIONS=--dry makes everything tiny.
set -u
call=$1 commit=$2 budget=${3:-535}
[ -d /tmp/site ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
  --target /tmp/site .gpu/whl/*.whl
export PYTHONPATH=/tmp/site:src:. LENVM_CACHE=$HOME/cache PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
lab=$HOME/lab
if [ ! -d "$lab" ]; then
  for parts in .gpu/lab*/; do
    [ -e "$parts/lab.tar.0" ] && python3 -m recipes.results unpack "$parts" "$lab"
  done
fi
generators=""
for name in coder05=qwen2.5-coder-0.5b coder15=qwen2.5-coder-1.5b smollm2=smollm2; do
  file=$HOME/kit/models/${name#*=}.gguf
  [ -e "$file" ] && generators="$generators --generator ${name%%=*}=$file"
done
timeout $((budget + 30)) python3 -m recipes.results run $call --lab "$lab" --data .gpu/data \
  $generators ${RESULTS_OPTIONS:-} --budget "$budget" --commit "$commit" >"$OUT/log.txt" 2>&1 || echo "rc $?"
timeout 40 python3 -m recipes.results pack "$lab" "$OUT" || echo "pack: rc $?"
ls -l "$OUT"
grep -v "it/s\|Loading weights" "$OUT/log.txt" | cut -c1-700 | tail -60
