#!/bin/sh
# Runs the compiler and keeps what it says (registers, shared memory, spills: -Xptxas=-v) beside the object, as
# OBJECT.ptxas, for tests/test_cuda_resources.py; prints it as well.
object=
previous=
for argument in "$@"; do
  [ "$previous" = "-o" ] && object=$argument
  previous=$argument
done
"$@" > "$object.ptxas" 2>&1
status=$?
cat "$object.ptxas" >&2
exit $status
