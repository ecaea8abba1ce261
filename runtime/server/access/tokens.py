"""Bearer tokens. The file holds their hashes, so that it cannot be used to send requests.

Tokens are random (`openssl rand -hex 32`), so that a hash without salt tells nothing about them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from unipinrec.errors import ConfigError, decoding

Scope = Literal["recommend", "events", "metrics", "admin"]
SHORTEST_TOKEN = 16
REMEDY = (
    'each token is a table: [NAME], sha256 = "64 hexadecimal digits", scopes = ["recommend"], and if it ends '
    "expires = 2027-01-31T00:00:00Z; scopes are recommend, events, metrics and admin"
)


class Token(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token of the file.

    Attributes:
        sha256: Hash of the token, in lower case.
        scopes: Routes that it opens.
        expires: From then on it is refused; None = never.
    """

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    scopes: Annotated[frozenset[Scope], msgspec.Meta(min_length=1)]
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


def read_tokens(file: Path) -> dict[str, Token]:
    """The tokens of a TOML file, by name.

    Raises:
        ConfigError: The file cannot be read, has no token, has one twice, or breaks the format.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"the tokens cannot be read: {error}") from error
    with decoding(ConfigError, file, REMEDY):
        tokens = msgspec.toml.decode(content, type=dict[str, Token])
    if not tokens:
        raise ConfigError(f"{file}: holds no token; {REMEDY}")
    (digest, count), *_ = Counter(token.sha256 for token in tokens.values()).most_common(1)
    if count > 1:
        names = [name for name, token in tokens.items() if token.sha256 == digest]
        raise ConfigError(f"{file}: [{names[0]}] and [{names[1]}] have one hash; make a new token for one of them")
    return tokens


def read_admin_token(*, file: Path | None = None, variable: str | None = None) -> Token:
    """The token with the scope admin from a file, without spaces around it, or else from an environment variable.

    Raises:
        ConfigError: There is none, it is too short, or the file cannot be read.
    """
    if file is not None:
        try:
            secret = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the admin token cannot be read from {file}: {error}") from error
    else:
        secret = os.environ.get(variable or "", "")
        if not secret:
            raise ConfigError(f"the environment variable {variable} holds no admin token; set it, or name a file")
    if len(secret) < SHORTEST_TOKEN or not secret.isascii() or not secret.isprintable():
        raise ConfigError(
            f"an admin token must be at least {SHORTEST_TOKEN} printable ASCII characters, such as "
            "`openssl rand -hex 32` prints"
        )
    return Token(sha256=hashlib.sha256(secret.encode()).hexdigest(), scopes=frozenset({"admin"}))


def name_of(secret: str, tokens: Mapping[str, Token], now: datetime) -> str | None:
    """The name of a token that a client sent; None = unknown or expired.

    It is compared with each, in constant time, so that the time tells nothing about the tokens.
    """
    digest, found = hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest(), None
    for name, token in tokens.items():
        if hmac.compare_digest(digest, token.sha256) and (token.expires is None or now < token.expires):
            found = name
    return found
