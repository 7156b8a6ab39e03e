#!/usr/bin/env bash
# Build a stand-in for NVIDIA's Triton image: the same folders, user and way to start, around a real tritonserver.
#
#   tests/stand_in_image.sh IMAGE TRITON
#
# IMAGE is the name to give it; TRITON is the folder that holds the unpacked wheel nvidia-pytriton. The rest is this
# machine's own Linux release (Debian or Ubuntu), and pip in it trusts the certificates that this machine trusts.
# The label mnist.stand-in tells it from NVIDIA's own image. Needs mmdebstrap and Docker, and no root where the kernel lets
# ordinary users make user namespaces.
set -euo pipefail

image="$1"
wheel="$2"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
codename="$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)"
python="$(apt-cache depends python3 | sed -n 's/^ *Depends: \(python3\.[0-9]*\)$/\1/p')"

# apt knows the nearest archive; Ubuntu keeps pip in universe.
archive="$(apt-get indextargets --format "\$(REPO_URI)" "Identifier: Packages" "Codename: $codename" "Component: main" | sed -n 1p)"
components="$(apt-get indextargets --format "\$(COMPONENT)" "Identifier: Packages" "Codename: $codename" | sort -u | paste -sd,)"

server="$folder/opt/tritonserver"
mkdir -p "$server/bin" "$server/backends" "$folder/opt/nvidia" "$folder/etc/ssl/certs"
cp "$wheel/pytriton/tritonserver/bin/tritonserver" "$server/bin"
cp -R "$wheel/nvidia_pytriton.libs" "$server/lib"
cp -R "$wheel/pytriton/tritonserver/backends/python" "$server/backends"
cp "$wheel/pytriton/tritonserver/python_backend_stubs/${python#python}/triton_python_backend_stub" \
  "$server/backends/python"
printf '#!/bin/sh\nexec "$@"\n' >"$folder/opt/nvidia/nvidia_entrypoint.sh"
cp -L /etc/ssl/certs/ca-certificates.crt "$folder/etc/ssl/certs"
# pip unpacks programs with the modes that the wheel gives them.
chmod -R a+rX "$folder"
chmod a+x "$server/bin/tritonserver" "$server/backends/python/triton_python_backend_stub" "$folder"/opt/nvidia/*

mmdebstrap --quiet --variant=apt --components="$components" \
  --include="python3,python3-pip,lib$python,ca-certificates" \
  --customize-hook="copy-in $folder/opt /" --customize-hook="copy-in $folder/etc/ssl/certs/ca-certificates.crt /etc/ssl/certs" \
  --customize-hook="chroot \"\$1\" useradd --uid 1000 --user-group triton-server" \
  --customize-hook="chroot \"\$1\" chown -R 1000:1000 /opt/tritonserver" \
  "$codename" - "$archive" |
  docker import \
    --change 'ENV PATH=/opt/tritonserver/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
    --change 'ENV LD_LIBRARY_PATH=/opt/tritonserver/lib' \
    --change 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt' \
    --change 'WORKDIR /opt/tritonserver' \
    --change 'ENTRYPOINT ["/opt/nvidia/nvidia_entrypoint.sh"]' \
    --change 'LABEL mnist.stand-in=yes' \
    - "$image"
