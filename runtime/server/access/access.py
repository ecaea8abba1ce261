"""Whether a request may be answered: its token, its scope, and the number of requests before it."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

from unipinrec.errors import ConfigError
from unipinrec.runtime.server.access.files import Reloaded
from unipinrec.runtime.server.access.rate_limit import RateLimit
from unipinrec.runtime.server.access.tokens import Scope, Token, name_of
from unipinrec.runtime.server.bodies import ApiError

LIMITED = ("recommend", "events")  # a client that sends too much does not lock out operators
NETWORK_BITS = 64  # of an IPv6 address: one client may have all addresses of its network


@dataclass(frozen=True, kw_only=True, eq=False)
class Access:
    """Who may send requests, and how many.

    Attributes:
        tokens: Tokens by name; None = all routes except /admin are open.
        admin: One more token.
        limit: Requests of each token, or without tokens of each address; None = there is no limit.
        certificate: The TLS context; None = there is no TLS.
    """

    tokens: Reloaded[dict[str, Token]] | None = None
    admin: Token | None = None
    limit: RateLimit | None = None
    certificate: Reloaded[ssl.SSLContext] | None = None

    def guards(self, scope: Scope | None) -> bool:
        """Whether a scope needs a token."""
        return scope == "admin" or (scope is not None and self.tokens is not None)

    def statuses(self, scope: Scope | None) -> tuple[int, ...]:
        """Statuses with which requests are refused here."""
        limited = self.limit is not None and scope in LIMITED
        return (401, 403) * self.guards(scope) + (429,) * limited

    def token(self, scope: Scope | None, authorization: str) -> tuple[str, Token] | None:
        """A request's token and its name; None if it needs none.

        Raises:
            ApiError: 401, its token is missing, unknown or expired, which look the same.
        """
        if not self.guards(scope):
            return None
        tokens: Mapping[str, Token] = self.tokens.current if self.tokens is not None else {}
        if self.admin is not None:
            tokens = {**tokens, "--admin-token": self.admin}
        scheme, _, secret = authorization.partition(" ")
        name = name_of(secret.strip(), tokens, datetime.now(UTC))
        if name is None or scheme.lower() != "bearer":
            raise ApiError(401, "unauthorized", "send Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"})
        return name, tokens[name]

    def admit(self, scope: Scope | None, token: tuple[str, Token] | None, address: str) -> None:
        """Let a request in.

        Raises:
            ApiError: 403, its token lacks the scope; 429, the client sends too many requests.
        """
        name = None
        if token is not None:
            name, entry = token
            if scope not in entry.scopes:
                needed = f'Bearer error="insufficient_scope", scope="{scope}"'
                raise ApiError(403, "forbidden", f"this token lacks the scope {scope}", {"www-authenticate": needed})
        if self.limit is not None and scope in LIMITED:
            self.limit.take(_client(name, address))

    def charge(self, name: str | None, address: str, count: int) -> None:
        """Count further requests of a list that was admitted."""
        if self.limit is not None:
            self.limit.charge(_client(name, address), count)

    def files(self) -> Iterator[tuple[str, Reloaded[Any]]]:
        """The files that may change, by kind."""
        if self.tokens is not None:
            yield "tokens", self.tokens
        if self.certificate is not None:
            yield "certificate", self.certificate

    def tls(self) -> ssl.SSLContext | None:
        """A context for a socket; each handshake has the certificate that is then in use."""
        certificate = self.certificate
        if certificate is None:
            return None

        def renew(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = certificate.current

        context = certificate.current
        context.sni_callback = renew
        return context


def _client(name: str | None, address: str) -> str:
    """The key of a client for the limit."""
    if name is None:
        with suppress(ValueError):
            if isinstance(parsed := ip_address(address), IPv6Address):
                return parsed.exploded[: NETWORK_BITS // 16 * len("ffff:")]
    return address if name is None else name


def read_certificate(certificate: Path, key: Path) -> ssl.SSLContext:
    """A TLS context with a certificate (and those that lead to its root) and its key, both PEM.

    Raises:
        ConfigError: A file cannot be read, or they do not belong together.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key, password="")  # else OpenSSL asks the terminal for it
    except (OSError, ValueError) as error:
        message = f"{certificate} and {key} are no certificate and its key, in PEM without a password: {error}"
        raise ConfigError(message) from error
    return context
