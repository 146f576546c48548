#!/bin/sh
# Installs every package of /work/debs at the locked version, up or down, then leaves no trace of the work.
set -eu
export DEBIAN_FRONTEND=noninteractive
# apt knows which to unpack and which to configure first; every file that it needs lies here, so it asks no mirror
apt-get install --yes --no-install-recommends --allow-downgrades --allow-change-held-packages \
  -o Dpkg::Options::=--force-confnew -o Dpkg::Options::=--force-unsafe-io /work/debs/*.deb
dpkg --audit
rm -rf /work /var/lib/apt/lists/* /var/cache/apt/archives/*.deb /var/cache/ldconfig/aux-cache /var/log/*.log /var/log/apt
rm -f /etc/ssh/ssh_host_* /etc/machine-id # they identify one machine, and are made at its first start
mkdir -p -m 0755 /run/sshd
