#!/bin/sh
# A newer Docker engine (Debian's next release) beside the one of this machine, in namespaces of its own, for tests. Root only.
#   modern-engine.sh build DIR                     makes DIR/root (about a minute, from the Debian mirror that apt uses here)
#   modern-engine.sh run DIR overlay2|containerd   becomes dockerd with that image store; its socket is DIR/STORE.sock
# /tmp is shared with the machine, so that bind mounts of tests mean the same on both sides.
set -eu
dir=$2
case $1 in
    build)
        mkdir -p "$dir"
        [ -x "$dir/root/usr/sbin/dockerd" ] && exit 0
        mirror=$(sed -n 's/^URIs: *\([^ ]*\).*/\1/p' /etc/apt/sources.list.d/*.sources 2>/dev/null | grep '/debian/*$' | head -1)
        [ -n "$mirror" ] || mirror=$(sed -n 's/^deb [^h]*\(http[^ ]*\/debian\) .*/\1/p' /etc/apt/sources.list | head -1)
        rm -rf "$dir/root.part"
        mmdebstrap --quiet --variant=minbase --aptopt='Acquire::Check-Valid-Until "false"' \
            --include=ca-certificates,docker.io,docker-cli,containerd,runc,iptables,iproute2,procps forky "$dir/root.part" "deb $mirror forky main"
        mv "$dir/root.part" "$dir/root"
        ;;
    run)
        store=$3
        mkdir -p "$dir/data-$store"
        export dir store
        exec unshare --mount --net --pid --fork --kill-child sh -euc '
            root=$dir/root.$store
            mkdir -p "$root"
            mount --make-rprivate /
            mount --bind "$dir/root" "$root"
            mount -t proc proc "$root/proc"
            mount --rbind /sys "$root/sys"
            mount --rbind /dev "$root/dev"
            mount -t tmpfs tmpfs "$root/run"
            mount --bind /tmp "$root/tmp"
            mkdir -p "$root/data" "$root/old" "$root/sockets"
            mount --bind "$dir/data-$store" "$root/data"
            mount --bind "$dir" "$root/sockets"
            on=false
            [ "$store" = containerd ] && on=true
            mkdir -p "$root/run/conf"
            echo "{\"features\":{\"containerd-snapshotter\":$on}}" >"$root/run/conf/daemon.json"
            cd "$root"
            pivot_root . old
            umount -l /old
            exec dockerd --config-file /run/conf/daemon.json --data-root /data --exec-root /run/docker --pidfile /run/docker.pid \
                --bridge=none --iptables=false --ip6tables=false -H "unix:///sockets/$store.sock" </dev/null
        '
        ;;
esac
