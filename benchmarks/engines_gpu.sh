# On the GPU machine, in the repository's root, after kit.py's slices of an engine and of smollm2:
#   bash benchmarks/engines_gpu.sh ENGINE PART COMMIT [options of engines.py]
# ENGINE vllm or sglang; PART truth, speed or profile. One call each, 2 to 6 minutes with start-up.
# Results land in $OUT after every point; `engines.py merge` makes one file of several calls'.
engine=$1 part=$2 commit=${3:-unknown}
export PYTHONPATH=$HOME/kit/site-$engine:$PWD/src PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
nvidia-smi --query-gpu=name,memory.used --format=csv,noheader
timeout 530 python3 benchmarks/engines.py "$engine" "$part" --real "$HOME/kit/models/smollm2.gguf" \
  --commit "$commit" --budget-s 480 --out "$OUT/engines_${engine}_$part.json" "${@:4}" \
  >"$OUT/${engine}_$part.txt" 2>&1
echo "rc $?"
(cd "$OUT" && for f in ${engine}_logs/*; do tail -c 150000 "$f" >"$f.t"; mv "$f.t" "$f"; done
 tar czf "${engine}_${part}_logs.tgz" "${engine}_logs" && rm -r "${engine}_logs")
tail -c 9000 "$OUT/${engine}_$part.txt"
