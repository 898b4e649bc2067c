# On the GPU machine, in the repository's root, after kit.py's slices of an engine and of smollm2:
#   bash benchmarks/engines_gpu.sh vllm COMMIT     (or sglang)
# vLLM takes under 420 s, start-up included. Results and logs land in $OUT.
engine=$1 commit=${2:-unknown}
export PYTHONPATH=$HOME/kit/site-$engine:$PWD/src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
nvidia-smi --query-gpu=name,memory.used --format=csv,noheader
timeout 425 python3 benchmarks/engines.py "$engine" --real "$HOME/kit/models/smollm2.gguf" \
  --commit "$commit" --budget-s 400 --out "$OUT/engines_$engine.json" "${@:3}" \
  >"$OUT/$engine.txt" 2>&1
echo "rc $?"
(cd "$OUT" && for f in ${engine}_logs/*.log; do tail -c 150000 "$f" >"$f.t"; mv "$f.t" "$f"; done
 tar czf "${engine}_logs.tgz" "${engine}_logs" && rm -r "${engine}_logs")
tail -c 9000 "$OUT/$engine.txt"
