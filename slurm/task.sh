#!/bin/bash
# One task of srun:  task.sh FILE COMMAND...   runs the command and writes its exit code to FILE-RANK, since srun hides
# the codes of ranks.
trap : TERM USR1 # the command gets them too, and ends as it sees fit
code=0
"${@:2}" || code=$?
echo "$code" >"$1-$SLURM_PROCID"
# With another code than 0 srun kills the other ranks, which may still be saving: not where all agreed to end.
case $code in 3 | 75 | 76) code=0 ;; esac
exit "$code"
