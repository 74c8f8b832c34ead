"""A stand-in for Apptainer where only this machine's packages run: Debian 12 has none.

It is not Apptainer. It understands `apptainer exec` with the options of
docs/examples/cromwell-slurm.conf, runs a sandbox folder in new user, mount and PID namespaces, and
is as strict as Apptainer where tests rely on it: read-only binds, a small environment, /tmp and
the home in --workdir.
"""

from __future__ import annotations

from tests.lab.slurm import SlurmLab

SCRIPT = r"""#!/bin/bash
# The stand-in for Apptainer of pman's test lab.
set -eu
[ "$1" = exec ] || { echo "FATAL: stand-in: only exec" >&2; exit 255; }
shift
binds=()
while [[ $1 == -* ]]; do
    case "$1" in
        --containall | --nv) ;;
        --workdir) work=$2; shift ;;
        --bind) binds+=("$2"); shift ;;
        *) echo "FATAL: stand-in: $1 is unknown" >&2; exit 255 ;;
    esac
    shift
done
image=$1; shift
[ -d "$image" ] || { echo "FATAL: stand-in: could not open image $image" >&2; exit 255; }

if [ -z "${STAND_IN-}" ]; then  # outside: begin again inside of the new namespaces
    given=(exec --workdir "$work")
    for bind in "${binds[@]}"; do given+=(--bind "$bind"); done
    exec env STAND_IN=1 unshare --user --map-current-user --keep-caps --mount --pid --fork \
        --kill-child "$0" "${given[@]}" "$image" "$@"
fi

top=$work/top
mkdir -p "$top" "$work/tmp"
mount -t tmpfs tmpfs "$top"
for entry in "$image"/*; do
    name=${entry##*/}
    if [ -L "$entry" ]; then
        cp -P "$entry" "$top/$name"
    elif [ -d "$entry" ]; then
        mkdir "$top/$name"
        [[ $name == @(proc|dev|sys|tmp|share) ]] || mount --rbind -o ro "$entry" "$top/$name"
    fi
done
mount -t proc proc "$top/proc"
mount --rbind /dev "$top/dev"
mount --bind "$work/tmp" "$top/tmp"
for bind in "${binds[@]}"; do
    IFS=: read -r from to mode <<< "$bind"
    [ -d "$from" ] || { echo "FATAL: mount source $from doesn't exist" >&2; exit 255; }
    mkdir -p "$top$to"
    mount --bind "$from" "$top$to"
    [ "$mode" != ro ] || mount -o remount,bind,ro "$top$to"
done
exec /usr/sbin/chroot "$top" \
    /usr/bin/setpriv --bounding-set=-all --inh-caps=-all --ambient-caps=-all \
    /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp "$@"
"""


def install(lab: SlurmLab) -> None:
    """Let the jobs of a lab of the machine's release find it, in the PATH of the user's profile."""
    program = lab.root / "bin" / "apptainer"
    program.write_text(SCRIPT)
    program.chmod(0o755)
