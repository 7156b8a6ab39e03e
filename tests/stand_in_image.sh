#!/usr/bin/env bash
# Build a stand-in for NVIDIA's Triton image: the same folders, user and way to start, around a real tritonserver.
#
#   tests/stand_in_image.sh IMAGE TRITON
#
# IMAGE is the name to give it; TRITON is the folder that holds the unpacked wheel nvidia-pytriton. The rest is this
# machine's own Linux release (Debian or Ubuntu), and pip in it trusts the certificates that this machine trusts.
# The label mnist.stand-in tells it from NVIDIA's own image. Needs root, debootstrap and Docker.
set -euo pipefail

image="$1"
wheel="$2"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
root="$folder/root"
codename="$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)"
python="$(apt-cache depends python3 | sed -n 's/^ *Depends: \(python3\.[0-9]*\)$/\1/p')"

# apt knows the nearest archive; Ubuntu keeps pip in universe.
archive="$(apt-get indextargets --format "\$(REPO_URI)" "Identifier: Packages" "Codename: $codename" "Component: main" | sed -n 1p)"
components="$(apt-get indextargets --format "\$(COMPONENT)" "Identifier: Packages" "Codename: $codename" | sort -u | paste -sd,)"
debootstrap --variant=minbase --components="$components" --include="python3,python3-pip,lib$python,ca-certificates" \
  "$codename" "$root" "$archive"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"

server="$root/opt/tritonserver"
mkdir -p "$server/bin" "$server/backends" "$root/opt/nvidia"
cp "$wheel/pytriton/tritonserver/bin/tritonserver" "$server/bin"
cp -R "$wheel/nvidia_pytriton.libs" "$server/lib"
cp -R "$wheel/pytriton/tritonserver/backends/python" "$server/backends"
cp "$wheel/pytriton/tritonserver/python_backend_stubs/${python#python}/triton_python_backend_stub" \
  "$server/backends/python"
# pip unpacks programs with the modes that the wheel gives them.
chmod -R a+rX "$server"
chmod a+x "$server/bin/tritonserver" "$server/backends/python/triton_python_backend_stub"
printf '#!/bin/sh\nexec "$@"\n' >"$root/opt/nvidia/nvidia_entrypoint.sh"
chmod a+x "$root/opt/nvidia/nvidia_entrypoint.sh"
chroot "$root" useradd --uid 1000 --user-group triton-server
chown -R 1000:1000 "$server"

tar -C "$root" -c . | docker import \
  --change 'ENV PATH=/opt/tritonserver/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
  --change 'ENV LD_LIBRARY_PATH=/opt/tritonserver/lib' \
  --change 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt' \
  --change 'WORKDIR /opt/tritonserver' \
  --change 'ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh"]' \
  --change 'LABEL mnist.stand-in=yes' \
  - "$image"
