"""Token files and what a server is allowed to listen on; and the real server's logs."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autoq.cli import app
from autoq.errors import InputError, UnknownNameError
from autoq.service.guard.hosts import check_exposure
from autoq.service.guard.tokens import TokenFile, create_token, read_tokens, revoke_token
from autoq.wire import Scope


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


def test_a_token_is_256_random_bits_of_which_the_file_keeps_the_hash(file: Path) -> None:
    made = {create_token(file, f"n{number}", Scope.READ) for number in range(5)}
    assert len(made) == 5
    for token in made:
        assert re.fullmatch(r"autoq_[A-Za-z0-9_-]{43}", token)
        assert token not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [entry.name for entry in read_tokens(file)] == ["n0", "n1", "n2", "n3", "n4"]


def test_the_file_is_private_whatever_the_umask(file: Path) -> None:
    before = os.umask(0)
    try:
        create_token(file, "a", Scope.RUN)
        create_token(file, "b", Scope.RUN)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["tokens"]


def test_tokens_that_are_made_at_once_are_all_kept(file: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: create_token(file, f"n{number}", Scope.READ), range(24)))
    assert {entry.name for entry in read_tokens(file)} == {f"n{number}" for number in range(24)}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
def test_the_file_stays_its_owner_s_when_root_changes_it(file: Path) -> None:
    create_token(file, "a", Scope.RUN)
    os.chown(file, 4321, 8765)
    create_token(file, "b", Scope.RUN)
    revoke_token(file, "a")
    state = file.stat()
    assert (state.st_uid, state.st_gid, stat.S_IMODE(state.st_mode)) == (4321, 8765, 0o600)


def test_a_token_is_found_by_all_of_it(file: Path) -> None:
    token = create_token(file, "anna", Scope.RUN)
    tokens = TokenFile(file)
    found = tokens.find(token)
    assert found is not None
    assert (found.name, found.scope) == ("anna", Scope.RUN)
    for wrong in ("", token[:-1], token + "x", token.lower(), " " + token, found.sha256, "\udcff"):
        assert tokens.find(wrong) is None


def test_names_are_their_own(file: Path) -> None:
    create_token(file, "anna", Scope.READ)
    with pytest.raises(InputError, match="in use"):
        create_token(file, "anna", Scope.ADMIN)
    for name in ("", "-x", "a b", "a\n", "x" * 65, "é", '"'):
        with pytest.raises(InputError, match="a token's name"):
            create_token(file, name, Scope.READ)


def test_revoking(file: Path) -> None:
    kept, gone = (create_token(file, name, Scope.READ) for name in ("kept", "gone"))
    tokens = TokenFile(file)
    revoke_token(file, "gone")
    assert tokens.find(gone) is None
    assert tokens.find(kept) is not None
    with pytest.raises(UnknownNameError, match="there are: kept"):
        revoke_token(file, "gone")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o660, 0o777, 0o610])
def test_a_file_that_others_can_reach_is_refused(file: Path, mode: int) -> None:
    create_token(file, "anna", Scope.READ)
    file.chmod(mode)
    for use in (TokenFile, read_tokens, lambda path: create_token(path, "bo", Scope.READ)):
        with pytest.raises(InputError, match="chmod 600"):
            use(file)


@pytest.mark.parametrize(
    "line",
    [
        "x",
        "[]",
        "{}",
        '{"name": "a", "scope": "god", "sha256": "%s", "created": ""}' % ("0" * 64),
        '{"name": "a", "scope": "read", "sha256": "0", "created": ""}',
        '{"name": "a", "scope": "read", "sha256": "%s", "created": ""}' % ("A" * 64),
        '{"name": "a/b", "scope": "read", "sha256": "%s", "created": ""}' % ("0" * 64),
        '{"name": 1, "scope": "read", "sha256": "%s", "created": ""}' % ("0" * 64),
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_token_is_refused_and_not_repeated(file: Path, line: str) -> None:
    create_token(file, "anna", Scope.READ)
    with file.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(InputError, match="line 2") as caught:
        read_tokens(file)
    assert len(str(caught.value)) < 500


def test_a_pipe_or_folder_in_the_file_s_place_does_not_hold_the_server(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for strange in (tmp_path / "pipe", tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="token file"):
            TokenFile(strange)


def test_the_command_line_prints_a_token_once(file: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["token", *arguments, "--token-file", str(file)])
        assert result.exit_code == 0, result.output
        return result.stdout

    token = run("create", "--name", "anna", "--scope", "admin").strip()
    assert TokenFile(file).find(token) is not None
    made = json.loads(run("create", "--name", "bo", "--json"))
    assert (made["scope"], made["token"][:6]) == ("read", "autoq_")
    for listed in (run("list"), run("list", "--json")):
        assert "anna" in listed
        assert token not in listed
        assert read_tokens(file)[0].sha256 not in listed
    run("revoke", "anna")
    assert TokenFile(file).find(token) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_loopback_needs_no_token_and_says_what_that_means(host: str) -> None:
    (warning,) = check_exposure(host, None, False)
    assert "without a token" in warning


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.168.0.1", "autoq.example", "127.0.0.1.x"]
)
def test_off_loopback_it_takes_tokens(file: Path, host: str) -> None:
    with pytest.raises(InputError, match="needs tokens"):
        check_exposure(host, None, True)
    create_token(file, "anna", Scope.READ)
    assert check_exposure(host, file, True) == []
    (warning,) = check_exposure(host, file, False)
    assert "unencrypted" in warning
    revoke_token(file, "anna")
    with pytest.raises(InputError, match="needs tokens"):
        check_exposure(host, file, True)


def test_the_real_server_logs_no_token(tmp_path: Path, file: Path) -> None:
    token = create_token(file, "anna", Scope.READ)
    command = [sys.executable, "-m", "autoq", "serve", "--port", "0", "--workers", "0"]
    command += ["--store", f"sqlite:///{tmp_path / 's.db'}", "--token-file", str(file)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            assert server.stdout is not None
            url = ""
            while not url:
                line = server.stdout.readline()
                assert line, "the server ended"
                url = (re.search(r"http://\S+", line) or [""])[0]
            asked = [
                ("/v1/me", token, 200),
                (f"/v1/me?token={token}", token, 200),
                (f"/v1/studies/{token}", token, 404),
                (f"/studies/{token}", "", 200),
                ("/v1/me", token + "x", 401),
            ]
            for path, sent, status in asked:
                assert _status(url + path, sent) == status
        finally:
            server.terminate()
        said, _ = server.communicate(timeout=30)
    assert "/v1/me" in said, "there is a line for each request"
    assert token not in said
    assert "autoq_" not in said


def _status(url: str, token: str) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
