#!/usr/bin/env bash
# Makes sure that a program of the web app's tools is there: `need.sh node`, `need.sh chromium`. Installs Debian's where
# it may (as root, with apt-get), else says what to do.
set -euo pipefail

node_is_new_enough() {
    command -v npm >/dev/null && node -e 'const [a, b] = process.versions.node.split("."); process.exit(a > 18 || (a == 18 && b >= 19) ? 0 : 1)' 2>/dev/null
}

chromium_is_there() {
    [ -n "${CHROMIUM:-}" ] || command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null
}

install() {
    command -v apt-get >/dev/null && [ "$(id -u)" = 0 ] || return 0
    echo "installing $* with apt-get" >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >&2 || true
}

case "${1:-}" in
node)
    node_is_new_enough || install nodejs npm
    node_is_new_enough || {
        echo "error: the web app is built with Node 18.19 or later and npm, found $(node --version 2>/dev/null || echo none)" >&2
        echo "hint: install them (https://nodejs.org, or apt-get install nodejs npm) and run this again" >&2
        exit 2
    }
    ;;
chromium)
    chromium_is_there || install chromium
    chromium_is_there || {
        echo "error: the web app is tested in Chromium or Chrome, found none" >&2
        echo "hint: install it (apt-get install chromium), or name one: CHROMIUM=/path/to/chrome make test-app" >&2
        exit 2
    }
    ;;
*)
    echo "usage: need.sh node|chromium" >&2
    exit 2
    ;;
esac
