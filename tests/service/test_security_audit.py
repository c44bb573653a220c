"""What the audit of dependencies makes of what pip-audit finds, and of not reaching anybody."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[2] / ".ci" / "audit"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the script is for bash")

SOUND = {"name": "sound", "version": "1.0", "vulns": []}
BROKEN = {
    "name": "broken",
    "version": "1.0",
    "vulns": [{"id": "GHSA-1", "fix_versions": ["1.1"], "aliases": ["CVE-1"]}],
}


def audit(
    folder: Path, *, packages: list[dict[str, object]] | None, status: int, said: str, rule: str
) -> subprocess.CompletedProcess[str]:
    """Run the script with a pip-audit that reports these packages, or nothing."""
    report = "" if packages is None else json.dumps({"dependencies": packages, "fixes": []})
    fake = folder / "pip-audit"
    fake.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"report, said, status = {report!r}, {said!r}, {status}\n"
        "if report:\n"
        "    open(sys.argv[sys.argv.index('--output') + 1], 'w').write(report)\n"
        "print(said, file=sys.stderr)\n"
        "sys.exit(status)\n"
    )
    fake.chmod(0o755)
    return subprocess.run(
        [AUDIT],
        check=False,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PIP_AUDIT": str(fake),
            "PYTHON": sys.executable,
            "AUDIT_REACHABLE": rule,
        },
    )


@pytest.mark.parametrize("rule", ["optional", "required"])
def test_a_vulnerable_package_fails_it_whatever_the_rule(tmp_path: Path, rule: str) -> None:
    done = audit(tmp_path, packages=[SOUND, BROKEN], status=1, said="Found 1", rule=rule)
    assert done.returncode == 1
    assert "broken 1.0: GHSA-1, CVE-1; mended in 1.1" in done.stdout


@pytest.mark.parametrize("rule", ["optional", "required"])
def test_sound_packages_pass(tmp_path: Path, rule: str) -> None:
    done = audit(tmp_path, packages=[SOUND], status=0, said="", rule=rule)
    assert (done.returncode, done.stdout) == (0, "audit: 1 packages looked up\n")


@pytest.mark.parametrize(("rule", "status"), [("optional", 0), ("required", 2)])
def test_offline_it_says_so_and_passes_only_where_that_was_allowed(
    tmp_path: Path, rule: str, status: int
) -> None:
    said = "requests.exceptions.ConnectionError: Max retries exceeded"
    done = audit(tmp_path, packages=None, status=1, said=said, rule=rule)
    assert done.returncode == status
    assert "could not be looked up" in done.stderr


@pytest.mark.parametrize(("rule", "status"), [("optional", 0), ("required", 2)])
def test_an_index_that_knows_no_package_is_as_good_as_none(
    tmp_path: Path, rule: str, status: int
) -> None:
    unknown = [
        {"name": f"package-{number}", "skip_reason": "not found on PyPI"} for number in range(170)
    ]
    done = audit(tmp_path, packages=unknown, status=0, said="", rule=rule)
    assert (done.returncode, done.stdout) == (status, "")
    said = done.stderr.splitlines()
    assert said[0] == (
        "not looked up: 170 (package-0, package-1, package-2, package-3, package-4, ...)"
    )
    assert len(said) == 2
    assert "could not be looked up" in said[1]
    assert ("NOT DONE" in said[1]) is (rule == "optional")


def test_packages_that_are_not_looked_up_are_told_beside_those_that_are(tmp_path: Path) -> None:
    own = {"name": "own", "skip_reason": "not found on PyPI"}
    done = audit(tmp_path, packages=[SOUND, own], status=0, said="", rule="required")
    assert (done.returncode, done.stdout) == (0, "audit: 1 packages looked up\n")
    assert done.stderr == "not looked up: 1 (own)\n"


def test_other_failures_are_failures(tmp_path: Path) -> None:
    done = audit(tmp_path, packages=None, status=1, said="KeyError: 'x'", rule="optional")
    assert done.returncode == 2
