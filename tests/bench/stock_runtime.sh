#!/bin/sh
# An OCI runtime in front of runc for the bench: `create` of a container is answered with
# `runc restore` of a plain `runc checkpoint` image, and a later `start` does nothing. Nothing
# more is needed to have CRIU behind the CRI calls; nothing here is quickthaw's.
#
# /run/bench/image names the image: a directory with `criu`, and rootfs.tar and shm.tar when the
# container had changed its root file system or /dev/shm.
set -eu
state=/run/bench/restored
for id; do :; done
case " $* " in
*" create "*) ;;
*" start "*)
    [ -e "$state/$id" ] && exit 0
    exec runc "$@" ;;
*" delete "*)
    rm -f "$state/$id"
    exec runc "$@" ;;
*) exec runc "$@" ;;
esac

globals="" bundle="" pid_file="" arguments="$*"
while [ "$1" != create ]; do
    globals="$globals $1"
    shift
done
shift
while [ $# -gt 1 ]; do
    case $1 in
    --bundle) bundle=$2 ;;
    --pid-file) pid_file=$2 ;;
    esac
    shift
done
if grep -q '"io.kubernetes.cri.container-type":"sandbox"' "$bundle/config.json"; then
    # shellcheck disable=SC2086 # containerd's arguments have no blanks
    exec runc $arguments
fi

read -r image </run/bench/image
[ -e "$image/rootfs.tar" ] && tar -xf "$image/rootfs.tar" -C "$bundle/rootfs"
if [ -e "$image/shm.tar" ]; then
    shm=$(sed -nE 's/.*"destination":"\/dev\/shm","type":"bind","source":"([^"]*)".*/\1/p' "$bundle/config.json")
    tar -xf "$image/shm.tar" -C "$shm"
fi
mkdir -p "$state" "/run/bench/logs/$id"
# shellcheck disable=SC2086 # as above
runc $globals restore --detach --bundle "$bundle" --pid-file "$pid_file" \
    --image-path "$image/criu" --work-path "/run/bench/logs/$id" "$id"
: >"$state/$id"
