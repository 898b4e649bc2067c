# One call of the GPU tool, with a queue behind it (job_queue.py):  SLICE=NN bash recipes/results/job_queue.sh SECONDS [pack]
#
# Carried: .gpu/tree_id (a name for this state of the tree), .gpu/jobs/*.json, once .gpu/data and .gpu/whl, earlier
# parts of the lab in .gpu/lab*/, and one folder .gpu/sNN a call: slice NN as `kit.py stage NN` lays it. Jobs run from
# a copy of the tree, DAY/tree-ID, so that the next call's tree does not change under them. The call returns when a
# job ends or SECONDS are over; with `pack` it brings back logs, small results and what is new in the lab.
#
# The machine goes back 30 s after a call, with all that is on it: send the calls of a lease in rows of at most a
# dozen (a longer row takes 30 s to write), and think before it or after it. A call carries 64 MiB, the working tree counted: move what is tracked
# and large (checkpoints/, docs/, src/lenvm/model/checkpoints/) out of it before the lease.
day=$HOME/day
if [ ! -d /tmp/site ] && [ ! -d .gpu/whl ]; then # the machine was given back in between: this is another one
  echo "BARE MACHINE: carry .gpu/whl and .gpu/data first" && exit 3
fi
mkdir -p "$day"/{jobs,logs,done,out,back}
install="python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target"
[ -d .gpu/data ] && [ ! -d "$day/data" ] && cp -r .gpu/data "$day/data"
[ -d .gpu/whl ] && [ ! -d /tmp/site ] && $install /tmp/site .gpu/whl/*.whl
[ -d .gpu/whl2 ] && [ ! -d /tmp/site2 ] && $install /tmp/site2 .gpu/whl2/*.whl
id=$(cat .gpu/tree_id) tree=$day/tree-$(cat .gpu/tree_id)
if [ ! -d "$tree" ]; then
  mkdir "$tree"
  tar -c --exclude=./.git --exclude=./.gpu --exclude=./shared . | tar -x -C "$tree"
fi
export PYTHONPATH=/tmp/site:$tree/src:$tree
for parts in .gpu/lab*/; do
  [ -e "$parts/lab.tar.0" ] && python3 -m recipes.results unpack "$parts" "$day/lab" && rm -r "$parts"
done
cp .gpu/jobs/*.json "$day/jobs/" 2>/dev/null # a job that waits may be changed
if ! pgrep -f "[q]ueue.py serve" >/dev/null; then
  nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
  mkdir -p "$day/bin" && cp recipes/results/job_queue.py "$day/bin/job_queue.py"
  setsid nohup python3 "$day/bin/job_queue.py" serve "$day" >"$day/queue.log" 2>&1 </dev/null &
fi
[ -n "${SLICE:-}" ] && bash ".gpu/s$SLICE/recv.sh" | tail -1 && rm -r ".gpu/s$SLICE"
python3 "$day/bin/job_queue.py" watch "$day" "$1"
tail -n 3 "$day/queue.log"
if [ "${2:-}" = pack ]; then
  for f in "$day"/logs/*.log; do tail -c 120000 "$f" >"$day/back/$(basename "$f")"; done
  tar czf "$OUT/day.tgz" -C "$day" --exclude='*.safetensors' --exclude='*.pt' back done out
  [ -d "$day/lab" ] && python3 -m recipes.results pack "$day/lab" "$OUT"
fi
nvidia-smi --query-gpu=memory.used,utilization.gpu --format=csv,noheader | tr '\n' ' '
ls -l "$OUT" | tail -8
