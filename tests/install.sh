#!/usr/bin/env bash
# Have what some tests need beside Python: Chromium and its driver (the dashboard), promtool (the alerts),
# HAProxy and iproute2 (the network), mkfs.ext4 (slow disks).
# Debian-like systems, as root; elsewhere it says what to install, and the tests that need it are left out.
set -euo pipefail
cd "$(dirname "$0")/.."

have_browser() { command -v chromedriver >/dev/null && { command -v chromium || command -v google-chrome; } >/dev/null; }
have_network() { command -v haproxy >/dev/null && command -v ip >/dev/null && command -v ss >/dev/null; }
have_disks() { command -v mkfs.ext4 >/dev/null; }
have_promtool() { command -v promtool >/dev/null || [ -x .venv/bin/promtool ]; }

if have_browser && have_promtool && have_network && have_disks; then
  exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq
  if ! have_browser; then
    echo "Chromium is installed from the distribution's packages, for the tests of the dashboard" >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null || true
  fi
  if ! have_network; then
    echo "HAProxy and iproute2 are installed from the distribution's packages, for the tests of the network" >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends haproxy iproute2 >/dev/null || true
  fi
  if ! have_disks; then
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends e2fsprogs >/dev/null || true
  fi
  if ! have_promtool; then
    # Only the program: installing the package would start a Prometheus server on this machine.
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    chmod 755 "$folder"
    (cd "$folder" && apt-get download -qq prometheus >/dev/null && dpkg -x prometheus_*.deb .) || true
    if [ -x "$folder/usr/bin/promtool" ]; then
      install -m 755 "$folder/usr/bin/promtool" .venv/bin/promtool
    fi
  fi
fi
have_browser || echo "No Chromium with chromedriver: the tests of the dashboard are left out (Debian: chromium chromium-driver)" >&2
have_promtool || echo "No promtool: the alerts are only checked for their form (Debian: prometheus)" >&2
have_network || echo "No HAProxy or iproute2: the tests of the network are left out (Debian: haproxy iproute2)" >&2
have_disks || echo "No mkfs.ext4: the chaos tests fail (Debian: e2fsprogs)" >&2
