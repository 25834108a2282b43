#!/usr/bin/env bash
# Have a ZooKeeper that the tests and the demo can start: the installed one, or Debian's package where root may add it.
# Where neither is to be had it says so and ends well: the demo then takes the embedded coordinator.
set -euo pipefail

have_java() { command -v java >/dev/null; }
have_zookeeper() {
  [ -e /usr/share/java/zookeeper.jar ] || { [ -n "${ZOOKEEPER_HOME:-}" ] && compgen -G "$ZOOKEEPER_HOME/lib/zookeeper-*.jar" >/dev/null; }
}

if have_java && have_zookeeper; then
  exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "ZooKeeper is installed from the distribution's packages" >&2
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends zookeeper default-jre-headless >/dev/null
  have_java && have_zookeeper && exit 0
fi
cat >&2 <<'TEXT'
No ZooKeeper was found. To get one: install your distribution's package (Debian, Ubuntu: zookeeper default-jre-headless),
or unpack a release and set ZOOKEEPER_HOME to its folder (Java is needed), or use zookeeper/compose.yaml.
TEXT
