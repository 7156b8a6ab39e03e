#!/usr/bin/env bash
# Run the README's two commands on a bare Debian 13 (Python 3.13) and a bare Debian 12 (Python without its library), as
# an ordinary user without git and curl, with LANG=C, in a folder with a space and an umlaut. Takes about twenty minutes
# for each of them.
#
#   tests/bare_machine.sh [RELEASE …]
#
# RELEASE  the Debian releases; trixie and bookworm unless given
# PYTHONS  a folder with uv's list of Pythons, downloads.json, and what it names, for machines that cannot reach the host
#          from which uv downloads them
# TESTS    the tests to run; all unless given
#
# Needs Docker and mmdebstrap. ./scripts/test.sh skips what needs Docker there; pip trusts whom this machine trusts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder="$(mktemp -d)"
trap 'rm -rf "$folder"; docker image rm --force mnist-bare >/dev/null 2>&1' EXIT
git archive HEAD | tar -x -C "$folder"
chmod -R a+rX "$folder"
archive="$(apt-get indextargets --format "\$(REPO_URI)" "Identifier: Packages" "Component: main" | sed -n 1p)"
options=(--env=LANG=C --env=PIP_CERT=/etc/ssl/certs/ca-certificates.crt --volume="$folder:/project:ro")
if [[ -n "${PYTHONS:-}" ]]; then
  options+=(--volume="$PYTHONS:$PYTHONS:ro" --env="UV_PYTHON_DOWNLOADS_JSON_URL=$PYTHONS/downloads.json")
fi

(($#)) || set -- trixie bookworm
for release; do
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates \
    --customize-hook='upload /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt' \
    --customize-hook="chroot \"\$1\" useradd --create-home reader" "$release" - "$archive" | docker import - mnist-bare >/dev/null
  echo "Debian $release:"
  docker run --rm --init --shm-size=1g --user=reader "${options[@]}" mnist-bare bash -c '
    set -e
    mkdir "$HOME/Übung 1" && cp -R /project/. "$HOME/Übung 1" && cd "$HOME/Übung 1"
    ./scripts/quickstart.sh
    ./scripts/test.sh '"${TESTS:-}"
  docker image rm mnist-bare >/dev/null
done
