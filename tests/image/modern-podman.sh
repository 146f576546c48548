#!/bin/sh
# podman 5 (Debian trixie's) beside the podman of this machine, for tests: MILKTEA_PODMAN=DIR/podman. Root only.
#   modern-podman.sh build DIR          makes DIR/root (some minutes, from the Debian mirror that apt uses here) and DIR/podman
#   modern-podman.sh run DIR WORDS...   podman WORDS in it, with cgroup v2 as it wants; DIR/podman is this
# /tmp is shared with the machine, so that bind mounts of tests mean the same on both sides.
set -eu
dir=$2
case $1 in
    build)
        mirror=$(sed -n 's/^URIs: *\([^ ]*\).*/\1/p' /etc/apt/sources.list.d/*.sources 2>/dev/null | grep '/debian/*$' | head -1)
        [ -n "$mirror" ] || mirror=$(sed -n 's/^deb [^h]*\(http[^ ]*\/debian\) .*/\1/p' /etc/apt/sources.list | head -1)
        mkdir -p "$dir/store" "$dir/run"
        if [ ! -x "$dir/root/usr/bin/podman" ]; then
            rm -rf "$dir/root.part"
            mmdebstrap --quiet --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
                --include=ca-certificates,podman,crun trixie "$dir/root.part" "deb $mirror trixie main"
            mv "$dir/root.part" "$dir/root"
        fi
        cat >"$dir/root/etc/containers/storage.conf" <<CONF
[storage]
driver = "overlay"
graphroot = "/podman/store"
runroot = "/run/containers/storage"
CONF
        # a machine whose cgroup v1 has every controller leaves none to v2
        printf '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\npids_limit = 0\n' >"$dir/root/etc/containers/containers.conf"
        printf '#!/bin/sh\nPATH=/usr/sbin:/usr/bin:/sbin:/bin exec sh %s run %s "$@"\n' "$(cd "$(dirname "$0")" && pwd)/modern-podman.sh" "$dir" >"$dir/podman"
        chmod +x "$dir/podman"
        ;;
    run)
        at=$(pwd)
        shift 2
        export dir at
        unset CONTAINERS_CONF
        exec unshare --mount sh -euc '
            root=$dir/root
            mount --make-rprivate /
            mount --bind "$root" "$root"
            mount --rbind /proc "$root/proc"
            mount --rbind /sys "$root/sys"
            umount -R "$root/sys/fs/cgroup"
            mount -t cgroup2 none "$root/sys/fs/cgroup"
            mount --rbind /dev "$root/dev"
            mount --bind "$dir/run" "$root/run"
            mount --bind /tmp "$root/tmp"
            mkdir -p "$root/old" "$root/podman"
            mount --bind "$dir" "$root/podman"
            cd "$root"
            pivot_root . old
            umount -l /old
            cd "$at" 2>/dev/null || cd /
            exec podman "$@"' sh "$@"
        ;;
esac
