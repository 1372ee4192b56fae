#!/bin/sh
# Process 1 of a container: runs a command, hands SIGTERM and SIGINT on to it, and ends with its exit code.
# Linux drops a signal that process 1 has no handler for, and a Python has one only after its imports: a container that is
# stopped in its first second would not notice, and take its whole grace.
child='' early=''
trap 'early=TERM; test -z "$child" || kill -TERM "$child"' TERM
trap 'early=INT; test -z "$child" || kill -INT "$child"' INT
exec 3<&0  # what is put in the background would read from /dev/null
"$@" <&3 3<&- &
child=$!
exec 3<&-
test -z "$early" || kill "-$early" "$child"
wait "$child"
code=$?
# A signal ends a wait before the child has ended.
while kill -0 "$child" 2>/dev/null; do
  wait "$child"
  code=$?
done
exit "$code"
