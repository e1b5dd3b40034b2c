"""Who forge is to NATS: a user for each of its parts, each with a password in a file of its own.

The users and what they may do are in ``nats/nats-server.conf``. A process reads only the files of the users
that it needs, so a container is given only those. Without a directory forge connects as nobody in particular,
as a server without users wants it.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec

from forge.errors import SettingInvalid

OPERATOR = "operator"
API = "api"
WORKER = "worker"
PROJECTOR = "projector"
CLEANUP = "cleanup"
SUBSCRIBER = "subscriber"
USERS = (OPERATOR, API, WORKER, PROJECTOR, CLEANUP, SUBSCRIBER)

USER_OF_ROLE = {
    "generation": WORKER,
    "dispatcher": WORKER,
    "scheduler": WORKER,
    "projector": PROJECTOR,
    "cleanup": CLEANUP,
}
"""Which user a role of ``forge worker`` is; a process with several roles has a connection for each user."""


class Login(msgspec.Struct, frozen=True):
    """A user of NATS and its password."""

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Login({self.user}:…)"


def login(directory: Path | None, user: str) -> Login | None:
    """How to connect as this user; None without a directory.

    Raises:
        SettingInvalid: the directory has no password for it.
    """
    if directory is None:
        return None
    try:
        password = (directory / user).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise SettingInvalid(
            f"FORGE_NATS_PASSWORDS_DIR: {directory / user}: {reason}. "
            f"This process connects to NATS as {user!r}: put that user's password there"
        ) from None
    if not password:
        raise SettingInvalid(f"FORGE_NATS_PASSWORDS_DIR: {directory / user} is empty")
    return Login(user, password)


def generate(directory: Path) -> dict[str, str]:
    """A password for every user that has none there; the variables that tell nats-server all of them.

    Passwords that are there stay, so that a subscriber's own goes on being good.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for user in USERS:
        if not (directory / user).exists():
            half = directory / f"{user}.half"
            descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(24) + "\n")
            half.replace(directory / user)
    # quoted, because the server reads a variable as a piece of its configuration: 123e4 would be a number
    return {
        f"FORGE_NATS_{user.upper()}_PASSWORD": f"'{(directory / user).read_text().strip()}'" for user in USERS
    }
