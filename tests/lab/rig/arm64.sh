#!/bin/bash
# Fills FOLDER with an arm64 Debian Python (qemu-user runs it on the amd64 rig): about
# 14 MB of downloads, 70 MB on disk, seconds.  No debootstrap: the packages' files alone
# will do, and nothing of this machine's own apt state is touched.
#
#   arm64.sh FOLDER
set -euo pipefail
top=$1 work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists/partial,cache/archives/partial,debs} "$top"
: >"$work/status"
cat >"$work/apt.conf" <<C
APT::Architecture "arm64"; APT::Architectures {"arm64";}; APT::Sandbox::User "root";
Dir::State "$work"; Dir::State::lists "$work/lists"; Dir::State::status "$work/status";
Dir::Cache "$work/cache"; Acquire::Languages "none";
C
export APT_CONFIG=$work/apt.conf
apt-get -qq update
cd "$work/debs"
apt-get -qq download python3.11 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 \
  zlib1g libexpat1 libssl3 libffi8 libsqlite3-0 libbz2-1.0 liblzma5 libreadline8 libtinfo6 libuuid1 \
  libcrypt1 libgcc-s1 libncursesw6 libnsl2 libtirpc3 libdb5.3 libstdc++6 libgssapi-krb5-2 libkrb5-3 \
  libk5crypto3 libcom-err2 libkrb5support0 libkeyutils1 media-types busybox-static
for d in *.deb; do dpkg -x "$d" "$top"; done
# Emulated, compiling takes most of a start: do it once, natively.  The bytecode of one
# 3.11 is good for any other.
python3.11 -m compileall -q --invalidation-mode unchecked-hash "$top/usr/lib/python3.11" >/dev/null || true

cat >"$top/python3" <<'C'
#!/bin/sh
# Stands where a node's python3 would: the arm64 one, emulated.
exec /usr/bin/qemu-aarch64-static -0 "$0" -L /opt/arm64 /opt/arm64/usr/bin/python3.11 "$@"
C
cat >"$top/uname" <<'C'
#!/bin/sh
exec /usr/bin/qemu-aarch64-static /opt/arm64/bin/busybox uname "$@"
C
cat >"$top/native" <<'C'
#!/bin/sh
# native CMD...: in here arm64 programs can be executed like any other (binfmt_misc is
# private to a user namespace since Linux 6.7); nothing outside is changed.
[ "$LAB_NATIVE" ] || exec env LAB_NATIVE=1 unshare --user --map-root-user --mount -- "$0" "$@"
unset LAB_NATIVE
mount -t tmpfs none /opt/arm64/mnt && mkdir /opt/arm64/mnt/b && mount -t binfmt_misc none /opt/arm64/mnt/b
printf %s ':arm64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:/usr/bin/qemu-aarch64-static:FP' >/opt/arm64/mnt/b/register
export QEMU_LD_PREFIX=/opt/arm64
exec "$@"
C
mkdir -p "$top/mnt"
chmod +x "$top"/{python3,uname,native}
