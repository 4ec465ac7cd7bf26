"""The web app that ships is the one that apps/web builds."""

from __future__ import annotations

import json
from pathlib import Path

from fewstep.app.site import CONTENT_SECURITY_POLICY, STATIC
from fewstep.hashing import file_sha256

WEB = Path(__file__).parents[2] / "apps" / "web"
ALONE = ("index.html", "package.json", "package-lock.json", "tsconfig.json", "vite.config.ts")
SCHEMA = "../../src/fewstep/manifest.schema.json"


def test_shipped_app_is_built_from_these_sources() -> None:
    built = json.loads((STATIC / "build.json").read_text(encoding="utf-8"))["sources"]
    folders = [path for name in ("src", "public") for path in (WEB / name).rglob("*") if path.is_file()]
    paths = {*(path.relative_to(WEB).as_posix() for path in folders), *ALONE, SCHEMA}
    changed = sorted(path for path in paths | built.keys() if built.get(path) != _sha256(path))
    assert not changed, f"changed since the app was built: {changed}; run: make app-build"


def _sha256(path: str) -> str | None:
    return file_sha256(WEB / path) if (WEB / path).is_file() else None


def test_page_and_server_have_the_same_policy() -> None:
    assert CONTENT_SECURITY_POLICY in (STATIC / "index.html").read_text(encoding="utf-8")


def test_nothing_in_the_page_asks_another_origin() -> None:
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert "http://" not in page
    assert "https://" not in page


def test_versions_are_pinned_exactly() -> None:
    package = json.loads((WEB / "package.json").read_text(encoding="utf-8"))
    versions = {**package["devDependencies"], **package["peerDependencies"]}
    assert all(version[0].isdigit() for version in versions.values()), versions
