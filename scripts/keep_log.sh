#!/bin/sh
# Runs a command, shows what it says and keeps it in a file: CMakeLists.txt wants ptxas's report.
#
#   scripts/keep_log.sh LOG COMMAND...
set -u
log=$1
shift
"$@" >"$log" 2>&1
status=$?
cat "$log"
exit $status
