#!/bin/bash
# Once per node, before the ranks start:  node.sh DS_CONFIG FDSCALE...   makes the node's own directories and builds in
# them what DeepSpeed would otherwise compile when it is first used, in every rank at once.
set -e
umask 077
for folder in "$FDSCALE_LOCAL" "$TORCH_EXTENSIONS_DIR"; do
  mkdir -p "$folder"
  if [ ! -O "$folder" ]; then # what lies there is executed
    echo "$folder on $(hostname) belongs to somebody else: set FDSCALE_LOCAL to a directory of yours" >&2
    exit 77
  fi
done
built=$TORCH_EXTENSIONS_DIR/built-$( (echo "${@:2}" && cat "${1:-/dev/null}") | cksum | tr -d ' ')
[ ! -e "$built" ] || exit 0
exec 9>"$TORCH_EXTENSIONS_DIR/build.lock"
flock 9
# Nobody else builds here now, so a lock of torch's is left over from a build that was killed; ranks would wait for it.
case $TORCH_EXTENSIONS_DIR in "$FDSCALE_LOCAL"/*) find "$TORCH_EXTENSIONS_DIR" -name lock -delete ;; esac
"${@:2}" doctor --build "$1"
touch "$built"
