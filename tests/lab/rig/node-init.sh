#!/bin/bash
# The first process of a node, already inside the node's own mount, pid, net, uts, ipc
# and cgroup namespaces.  Builds the node's file system (an overlay of this machine's /,
# so that every installed tool is there), waits on stdin for the word "go" (the network
# card has been plugged in), then becomes systemd (or, on a plain node, a shell that only
# reaps).
#
#   node-init.sh NODE TOP systemd|plain
#
# TOP holds nodes/NODE/{up,work,root,seed,home,srv,docker,containerd}: "seed" is copied
# over the fresh root at the first boot only; the others survive a crash and a boot.
set -euo pipefail
node=$1 top=$2 kind=$3
dir=$top/nodes/$node root=$top/nodes/$node/root

mount --make-rprivate /
mount -t overlay "lab-$node" -o "lowerdir=/,upperdir=$dir/up,workdir=$dir/work" "$root"
cd "$root"

mount -t proc proc proc
mount -t sysfs sysfs sys
# Kernel settings other than the node's own network ones stay the machine's.
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
[ ! -e proc/sysrq-trigger ] || mount --bind /dev/null proc/sysrq-trigger
nsnet=$(mktemp -d /run/lab-net.XXXXXX)
mount -t proc proc "$nsnet"
mount --bind "$nsnet/sys/net" proc/sys/net
umount -l "$nsnet"; rmdir "$nsnet"

mount -t tmpfs -o mode=755 dev dev
for spec in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0; do
  IFS=: read -r name major minor <<<"$spec"
  mknod -m 666 "dev/$name" c "$major" "$minor"
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for n in 0:stdin 1:stdout 2:stderr; do ln -s "fd/${n%%:*}" "dev/${n#*:}"; done

mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=1777 tmp tmp
# One kernel serves all nodes, yet each of their boots is one of its own.
cat proc/sys/kernel/random/uuid >run/lab-boot-id
chmod 444 run/lab-boot-id
mount --bind run/lab-boot-id proc/sys/kernel/random/boot_id
mount -t tmpfs -o mode=755 cgroup sys/fs/cgroup
while IFS=: read -r _ h _; do
  case $h in ''|name=*) continue ;; esac
  mkdir "sys/fs/cgroup/$h"
  mount -t cgroup -o "$h" cgroup "sys/fs/cgroup/$h"
done </proc/self/cgroup
mkdir sys/fs/cgroup/systemd sys/fs/cgroup/unified
mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
mount -t cgroup2 cgroup2 sys/fs/cgroup/unified

# What people and services keep on this machine is none of the node's business, and Docker
# cannot keep its layers on an overlay: plain folders of the node's own.
for own in home:root srv:srv docker:var/lib/docker containerd:var/lib/containerd; do
  mkdir -p "${own#*:}"
  mount --bind "$dir/${own%%:*}" "${own#*:}"
done
if [ ! -e "$dir/seeded" ]; then
  rm -rf etc/systemd/system etc/docker etc/knot
  mkdir -p etc/systemd/system
  cp -a "$dir/seed/." .
  chmod 700 root
  : >"$dir/seeded"
fi
mkdir -p lab
mount --bind "$top/shared" lab
while IFS=$'\t' read -r src dst; do
  [ -d "$src" ] || continue
  mkdir -p ".$dst"
  mount --bind "$src" ".$dst"
done <"$dir/binds"

while read -r path; do
  mount --bind "$path" "$path"
  mount -o remount,bind,ro "$path"
done <"$dir/readonly"

read -r go
[ "$go" = go ]
hostname "$node"
ip link set lo up
bash "$dir/net.sh"

mkdir -p .host
pivot_root . .host
umount -l /.host
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
if [ "$kind" = plain ]; then
  : >/run/lab-ready
  exec env -i "PATH=$PATH" HOME=/root bash -c 'while :; do sleep 1000 & wait; done' </dev/null
fi
exec env -i "PATH=$PATH" container=lab /lib/systemd/systemd --system </dev/null
