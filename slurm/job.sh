#!/bin/bash
# What all job scripts share:  . job.sh VERB ARGUMENTS   runs `fdscale VERB ARGUMENTS`, one task per rank, and decides
# whether the job is worth another start. FDSCALE_SOURCE is the directory that holds fdscale/ and slurm/, FDSCALE_PYTHON
# the interpreter. Everything it keeps is in RUN/slurm/job-JOBID/.

: "${FDSCALE_SOURCE:?is set by the job script}" "${FDSCALE_PYTHON:?is set by the job script}"
: "${FDSCALE_FRUITLESS_RESTARTS:=3}" # so many restarts in a row may end without a newer checkpoint

say() { echo "$(date '+%F %T') $*"; }

verb=$1
args=("${@:2}")
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || args=("${args[@]//%a/$SLURM_ARRAY_TASK_ID}") # %a is the array task's number
run='' ds=''
for ((i = 0; i < ${#args[@]}; i++)); do
  case ${args[i]} in
    --run) run=${args[i + 1]:-} ;;
    --run=*) run=${args[i]#*=} ;;
    --ds) ds=${args[i + 1]:-} ;;
    --ds=*) ds=${args[i]#*=} ;;
  esac
done
if [ -z "$run" ]; then
  say "no --run DIR among the arguments: $*"
  exit 2
fi
# The last task of an array has the array's own number as its SLURM_JOB_ID: by that, Slurm would requeue all tasks.
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
job=$run/slurm/job-$id
mkdir -p "$job" || exit 1

. "$FDSCALE_SOURCE/slurm/env.sh"
export PYTHONPATH=$FDSCALE_SOURCE${PYTHONPATH:+:$PYTHONPATH}
[ -z "${RANK:-}" ] || unset MASTER_ADDR MASTER_PORT # of a torchrun around sbatch, like those below
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE    # Slurm says who is who
fdscale=("$FDSCALE_PYTHON" -P -m fdscale.cli) # -P: the source is that one, even where the job starts in another

# ---- is another start worth it? --------------------------------------------------------------------------------------

newest() { cat "$run/checkpoints/latest" 2>/dev/null || echo none; }

give_up_if_fruitless() { # COUNT: restarts in a row that made no newer checkpoint
  if (($1 > FDSCALE_FRUITLESS_RESTARTS)); then
    say "gave up: $FDSCALE_FRUITLESS_RESTARTS restarts in a row made no checkpoint newer than $before;" \
      "$job/rank-*.log say why. Put it right, then submit the job again"
    exit 1
  fi
}

still_ours() { # not a node that Slurm had lost: the job may run elsewhere by now, and requeueing it would stop it there
  local now
  now=$(scontrol show job --oneliner "$id") || return 1
  [[ $now == *" Restarts=$restart "* ]]
}

restart=${SLURM_RESTART_COUNT:-0} before=$(newest) fruitless=0
if [ -e "$job/progress" ]; then # written by the start before, which may have ended in any way
  read -r fruitless last <"$job/progress"
  [ "$before" = "$last" ] && fruitless=$((fruitless + 1)) || fruitless=0
  give_up_if_fruitless "$fruitless"
fi
echo "$fruitless $before" >"$job/progress"

# ---- signals ---------------------------------------------------------------------------------------------------------

srun='' stopping='' cancelled=''
# shellcheck disable=SC2317 # the traps call it
forward() { # bash runs this at once only while it waits for a background process
  say "$1: saving, then stopping"
  stopping=yes
  [ "$1" != TERM ] || cancelled=yes # scancel, or Slurm needs the nodes; then Slurm itself requeues
  [ -z "$srun" ] || kill -USR1 "$srun" 2>/dev/null # srun passes it on to all tasks
}
trap 'forward USR1' USR1 # the time limit is near (--signal)
trap 'forward TERM' TERM

step() { # srun's code, which says little: with --kill-on-bad-exit it is often 143, whatever the rank's was
  [ -z "$stopping" ] || return 1
  srun "$@" &
  srun=$!
  local code=0
  while :; do # a trap ends `wait` early
    wait "$srun"
    code=$?
    kill -0 "$srun" 2>/dev/null || break
  done
  srun=''
  return "$code"
}

free_port() { # of this node, which is rank 0's; not one of those that the kernel gives to outgoing connections
  "$FDSCALE_PYTHON" -I -S -c 'import random, socket
for port in random.sample(range(15000, 32000), 100):
    try:
        socket.create_server(("", port)).close()
    except OSError:
        continue
    print(port)
    break'
}

# ---- run -------------------------------------------------------------------------------------------------------------

say "job $id, restart $restart, on $SLURM_JOB_NODELIST: fdscale $verb ${args[*]}"
say "from $before; the ranks' output is in $job/rank-*.log"

# --overlap and --mem=0: it takes nothing away from the next step, which may begin before Slurm has noted its end.
code=0
step --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --overlap --mem=0 \
  --output="$job/build.log" --open-mode=append bash "$FDSCALE_SOURCE/slurm/node.sh" "$ds" "${fdscale[@]}" || code=$?
if [ "$code" = 77 ]; then # of node.sh
  say "a directory of a node must not be used; $job/build.log says which"
  exit 2
fi
[ "$code" = 0 ] || say "building ahead failed or was stopped ($job/build.log); the ranks will try for themselves"

ended=$job/ended-$restart # -RANK
MASTER_PORT=${MASTER_PORT:-$(free_port)} step --kill-on-bad-exit=1 --output="$job/rank-%5t.log" --open-mode=append \
  bash "$FDSCALE_SOURCE/slurm/task.sh" "$ended" "${fdscale[@]}" "$verb" "${args[@]}"
trap '' USR1
trap - TERM # it ends the script, as scancel should; so does the requeue below

# ---- how did it end? -------------------------------------------------------------------------------------------------

codes=" $(cat "$ended"-* 2>/dev/null | sort -n | uniq | tr '\n' ' ')"
say "the ranks ended with codes${codes}(none: killed); newest checkpoint $(newest)"
if [ "$(cat "$ended-0" 2>/dev/null)" = 0 ]; then
  say "done"
  exit 0
fi
for code in 2 3 76; do # to be put right, diverged, taken over by another start: one more would change nothing
  if [[ $codes == *" $code "* ]]; then
    say "code $code is not worth another start; $job/rank-*.log say why"
    exit "$code"
  fi
done
if [ -n "$cancelled" ]; then
  say "stopped from outside, and not requeued from here; after scancel, submit the job again to go on"
  exit 75
fi
[ "$(newest)" = "$before" ] && give_up_if_fruitless $((fruitless + 1))
if ! still_ours; then
  say "not requeued from here: Slurm has given this start up and requeued the job itself, or does not answer"
  exit 75
fi
say "another start is worth it; Slurm usually waits two minutes before it"
scontrol requeue "$id" || say "Slurm does not requeue this job: submit it again to go on"
exit 75
