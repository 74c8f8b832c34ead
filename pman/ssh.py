"""Make one SSH connection: the way there (ssh_config, jump hosts), whom to trust, how to log in.

Nothing here is tried twice: pman.shell decides when to try again. Every failure is an Unavailable
whose message says what was tried and what to do about it.
"""

import contextlib
import getpass
import logging
import re
import shlex
import socket
import subprocess
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import paramiko

from pman.errors import SettingsError, Unavailable

STEP_TIMEOUT = 10.0  # for each of: the TCP connection, the SSH handshake, the login
KEEP_ALIVE = 15  # seconds
GLOBAL = Path("/etc/ssh/ssh_known_hosts")

# paramiko logs a traceback at ERROR for each refused connection. pman says it in its own words;
# set this logger to DEBUG to follow the protocol.
PARAMIKO_LOG = "pman.ssh.paramiko"
logging.getLogger(PARAMIKO_LOG).setLevel(logging.CRITICAL)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hop:
    """One machine on the way: the jump hosts, then the login node."""

    name: str  # as the operator wrote it
    host: str
    port: int
    user: str
    key_files: tuple[Path, ...]  # none: the agent's keys and ~/.ssh/id_*
    known_hosts: tuple[Path, ...]
    known_as: str  # its name in the known_hosts files
    proxy_command: str | None = None

    def __str__(self) -> str:
        real = f"{self.host} port {self.port}"
        return real if self.name == self.host else f"{self.name} ({real})"


class Route:
    """The hops to a host, from an ssh_config. What the operator set goes before the config."""

    def __init__(
        self,
        host: str,
        *,
        port: int | None = None,
        user: str | None = None,
        key_file: Path | None = None,
        known_hosts: Path | None = None,
        config_file: Path | None = None,
    ) -> None:
        self._key_file, self._known_hosts = key_file, known_hosts
        self._file = config_file or _expand("~/.ssh/config")
        try:
            self._config = self._file.read_text() if config_file or self._file.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"the SSH config file {self._file} cannot be read ({error}); check SSH_CONFIG_FILE"
            ) from error
        if re.search(r"^\s*include\b", self._config, re.I | re.M):
            log.warning("%s: Include is not followed; put the lines in the file", self._file)
        self.hops = tuple(self._towards(host, port, user, ()))

    def _towards(
        self, name: str, port: int | None, user: str | None, coming_from: tuple[str, ...]
    ) -> Iterator[Hop]:
        if name in coming_from:
            way = " -> ".join((*coming_from, name))
            raise SettingsError(
                f"{self._file}: ProxyJump goes round in a circle: {way}. Give the jump host a "
                "Host block of its own with `ProxyJump none`"
            )
        jumps, hop = self._look_up(name, port, user, is_target=not coming_from)
        if jumps:  # as with ssh: the first is reached by its own config, the others through it
            first, *others = (_parse_jump(self._file, jump) for jump in jumps)
            yield from self._towards(*first, (*coming_from, name))
            for jump in others:
                yield self._look_up(*jump, is_target=False)[1]
        yield hop

    def _look_up(
        self, name: str, port: int | None, user: str | None, is_target: bool
    ) -> tuple[list[str], Hop]:
        """The jump hosts before this one, and this one."""
        config = self._options(name, port, user)
        host = config["hostname"]
        try:
            number = int(config.get("port", 22))
            user = config.get("user") or getpass.getuser()
        except ValueError as error:
            raise SettingsError(f"{self._file}: the Port of {name} is not a number") from error
        except (KeyError, OSError) as error:  # a container that runs under any uid
            raise SettingsError(f"this uid has no user name: set SSH_USER for {name}") from error
        files = [file for file in config.get("identityfile", ()) if file.lower() != "none"]
        key_files = tuple(map(_expand, files))
        if self._key_file and (is_target or not files):
            key_files = (self._key_file,)
        known_hosts = map(
            _expand, shlex.split(config.get("userknownhostsfile", "~/.ssh/known_hosts"))
        )
        hop = Hop(
            name=name,
            host=host,
            port=number,
            user=user,
            key_files=key_files,
            known_hosts=(*((self._known_hosts,) if self._known_hosts else known_hosts), GLOBAL),
            known_as=config.get("hostkeyalias")
            or (host.lower() if number == 22 else f"[{host.lower()}]:{number}"),
        )
        # Of these two ssh takes the one that comes first in the file.
        proxy = next((key for key in config if key in ("proxyjump", "proxycommand")), "")
        way = config.get(proxy) or "none"
        if way.lower() == "none":
            return [], hop
        if proxy == "proxyjump":
            return way.split(","), hop
        return [], replace(hop, proxy_command=way)

    def _options(self, name: str, port: int | None, user: str | None) -> dict[str, Any]:
        own = {key: value for key, value in (("port", port), ("user", user)) if value}
        if not self._config:  # paramiko's look-up asks for this uid's name: it may have none
            return {"hostname": name, **own}
        # ssh takes the first value that it meets, so what the operator set stands on top.
        lines = [f"Host {name}", *(f"{key} {value}" for key, value in own.items()), "Host *"]
        try:
            text = "\n".join([*lines, self._config])
            return dict(paramiko.SSHConfig.from_text(text).lookup(name))
        except (paramiko.SSHException, ValueError) as error:
            raise SettingsError(f"{self._file} cannot be understood: {error}") from error
        except (KeyError, OSError) as error:
            raise SettingsError(
                f"{self._file} cannot be used: this uid has no user name; set USER in pman's "
                "environment"
            ) from error


def _expand(file: str) -> Path:
    try:
        return Path(file).expanduser()
    except RuntimeError:  # a container's uid may have no home: then there is nothing in it
        return Path(file)


def _parse_jump(file: Path, text: str) -> tuple[str, int | None, str | None]:
    """[ssh://][user@]host[:port]"""
    match = re.fullmatch(
        r"(?:ssh://)?(?:(?P<user>[^@]+)@)?(?P<host>\[[^]]+\]|[^:]+)(?::(?P<port>\d+))?/?",
        text.strip(),
    )
    if not match:
        raise SettingsError(f"{file}: ProxyJump {text!r} is not of the form [user@]host[:port]")
    return match["host"].strip("[]"), int(match["port"] or 0) or None, match["user"]


class Connection:
    """An open, verified, logged-in connection, with all that it stands on."""

    def __init__(self, route: Route) -> None:
        self._parts = contextlib.ExitStack()  # closed last part first
        self._closing = threading.Lock()
        via: paramiko.Transport | None = None
        try:
            for hop in route.hops:
                try:
                    via = self._step(hop, via)
                except Exception as error:
                    raise Unavailable(_explain(hop, error)) from error
        except BaseException:
            self.close()
            raise
        assert via
        self.transport = via

    def _step(self, hop: Hop, via: paramiko.Transport | None) -> paramiko.Transport:
        transport = paramiko.Transport(self._reach(hop, via))
        self._parts.callback(_close, transport)
        transport.set_log_channel(PARAMIKO_LOG)
        transport.banner_timeout = transport.handshake_timeout = STEP_TIMEOUT
        transport.auth_timeout = STEP_TIMEOUT
        trusted = KnownHosts(hop)
        options = transport.get_security_options()
        options.key_types = sorted(options.key_types, key=lambda kind: kind not in trusted.kinds)
        transport.start_client(timeout=STEP_TIMEOUT)
        if not transport.initial_kex_done:  # start_client gives up without a word
            raise TimeoutError
        trusted.verify(transport.get_remote_server_key())
        _log_in(hop, transport)
        transport.set_keepalive(KEEP_ALIVE)
        return transport

    def _reach(self, hop: Hop, via: paramiko.Transport | None) -> socket.socket | paramiko.Channel:
        if via:
            there, here = (hop.host, hop.port), ("127.0.0.1", 0)
            return via.open_channel("direct-tcpip", there, here, timeout=STEP_TIMEOUT)
        if hop.proxy_command:
            # Not paramiko.ProxyCommand: it spins when the command has ended, and leaves a zombie.
            ours, theirs = socket.socketpair()
            with theirs:
                command = subprocess.Popen(
                    ["/bin/sh", "-c", f"exec {hop.proxy_command}"],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                )
            self._parts.callback(command.wait)
            self._parts.callback(command.kill)
            self._parts.callback(ours.close)
            return ours
        tcp = socket.create_connection((hop.host, hop.port), timeout=STEP_TIMEOUT)
        tcp.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )  # or each command waits 40 ms more
        self._parts.callback(tcp.close)
        return tcp

    def close(self) -> None:
        with self._closing:
            self._parts.close()


def _close(transport: paramiko.Transport) -> None:
    transport.close()
    if transport.is_alive():
        transport.join(STEP_TIMEOUT)  # close() does not wait for its thread


# --- whom to trust ---


@dataclass(frozen=True)
class KnownKey:
    where: str  # "file line 7"
    revoked: bool
    kind: str
    base64: str


class KnownHosts:
    """The host keys on file for one hop.

    Not paramiko.HostKeys: that one knows neither patterns (`*.hpc.org`) nor @revoked, and only
    one key of a kind for a name, while the login nodes behind one name often have a key each.
    """

    def __init__(self, hop: Hop) -> None:
        self._hop = hop
        self._keys = [key for file in hop.known_hosts for key in _known_keys(file, hop.known_as)]
        #: the algorithms to ask the server for first
        self.kinds = {kind for key in self._keys for kind in _algorithms(key.kind)}

    def verify(self, key: paramiko.PKey) -> None:
        hop, shown = self._hop, f"{key.get_name()} {key.fingerprint}"
        same = [known for known in self._keys if known.base64 == key.get_base64()]
        if revoked := next((known for known in same if known.revoked), None):
            raise Unavailable(
                f"the host key of {hop}, {shown}, is marked as revoked in {revoked.where}. "
                "Do not connect; ask the site's admin."
            )
        if same:
            return
        files = ", ".join(map(str, hop.known_hosts))
        learn = f"ssh-keyscan -p {hop.port} {hop.host} >> {hop.known_hosts[0]}"
        if hop.known_as.strip("[]").partition("]")[0] != hop.host.lower():
            learn += f" (under the name {hop.known_as})"
        if not self._keys:
            raise Unavailable(
                f"the host key of {hop} is unknown: it shows {shown}, and {hop.known_as} is not "
                f"in {files}. Compare the fingerprint with the one that the site publishes, then "
                f"add it by hand: {learn}"
            )
        known = "; ".join(f"{known.where} has {known.kind}" for known in self._keys)
        raise Unavailable(
            f"the host key of {hop} has CHANGED: it shows {shown}, but {known}. Somebody may be "
            "in between, or the machine was set up anew: ask the site's admin. If the change is "
            f"real, remove the old line by hand and add the new key: {learn}"
        )


def _known_keys(file: Path, name: str) -> Iterator[KnownKey]:
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:  # the message of verify names the file
        return
    for number, line in enumerate(lines, 1):
        words = line.split()
        marker = words.pop(0) if words and words[0].startswith("@") else ""
        # Host certificates (@cert-authority) are nothing that paramiko could check.
        if len(words) >= 3 and marker in ("", "@revoked") and _names(words[0], name):
            yield KnownKey(f"{file} line {number}", bool(marker), words[1], words[2])


def _names(patterns: str, name: str) -> bool:
    """Is the name meant by the first column of a known_hosts line?"""
    if patterns.startswith("|1|"):
        try:
            return paramiko.HostKeys.hash_host(name, patterns) == patterns
        except (ValueError, AssertionError, IndexError):
            return False
    hits = {
        pattern[:1] == "!"
        for pattern in patterns.lower().split(",")
        if re.fullmatch(
            re.escape(pattern.lstrip("!")).replace(r"\*", ".*").replace(r"\?", "."), name.lower()
        )
    }
    return hits == {False}  # a pattern with ! takes the name out again


def _algorithms(kind: str) -> tuple[str, ...]:
    return ("rsa-sha2-512", "rsa-sha2-256") if kind == "ssh-rsa" else (kind,)


# --- how to log in ---


def _log_in(hop: Hop, transport: paramiko.Transport) -> None:
    agent = paramiko.Agent()
    try:
        keys = _Keys(hop, agent)
        for key in keys.usable.values():
            try:
                more = transport.auth_publickey(hop.user, key)
            except paramiko.AuthenticationException:
                if transport.is_active():
                    continue
                break  # sshd hangs up after too many keys (MaxAuthTries)
            if transport.is_authenticated():
                return
            raise Unavailable(
                f"{hop} wants more than a key from user {hop.user} ({', '.join(more)}): a service "
                "cannot answer that. Ask the site for an account that logs in by key alone."
            )
    finally:
        agent.close()
    refused = f"{hop} did not let user {hop.user} in."
    missing = f"there is no key to log in to {hop} with, as user {hop.user}."
    raise Unavailable(
        f"{refused if keys.usable else missing} {keys} Check SSH_USER and SSH_KEY_FILE, and that "
        "the public key is in that account's ~/.ssh/authorized_keys there."
    )


class _Keys:
    """The keys to offer, by name, and what is wrong with the others.

    Where files are named they alone are offered, nothing of the agent before them: sshd counts.
    """

    def __init__(self, hop: Hop, agent: paramiko.Agent) -> None:
        self.usable: dict[str, paramiko.PKey] = {}
        self._problems: list[str] = []
        self._held = agent.get_keys()
        files: Iterable[Path] = hop.key_files
        if not files:
            for key in self._held:
                self.usable[f"{key.comment or key.fingerprint} of the agent"] = key
            usual = (_expand(f"~/.ssh/id_{kind}") for kind in ("ed25519", "ecdsa", "rsa"))
            files = filter(Path.exists, usual)
        for file in files:
            self._add(file)

    def _add(self, file: Path) -> None:
        try:
            self.usable[str(file)] = paramiko.PKey.from_path(file)
        except (TypeError, paramiko.PasswordRequiredException):  # TypeError: cryptography's way
            if held := self._held_for(file):
                self.usable[f"{file} (held by the agent)"] = held
            else:
                self._problems.append(
                    f"The key file {file} is protected by a passphrase: load it with `ssh-add "
                    f"{file}` into an ssh-agent that pman can reach (SSH_AUTH_SOCK)."
                )
        except OSError as error:
            self._problems.append(f"The key file {file} cannot be read: {error.strerror}.")
        except Exception as error:  # ValueError, UnsupportedAlgorithm, UnknownKeyType, ...
            kind = type(error).__name__
            self._problems.append(f"{file} is not a private key that can be used ({kind}).")

    def _held_for(self, file: Path) -> paramiko.PKey | None:
        try:
            public = Path(f"{file}.pub").read_text().split()
        except (OSError, UnicodeDecodeError):
            return None
        return next((key for key in self._held if key.get_base64() in public), None)

    def __str__(self) -> str:
        tried = ", ".join(self.usable) or "none"
        agent = f"an ssh-agent with {len(self._held)} key(s)" if self._held else "no ssh-agent key"
        return " ".join([f"Tried: {tried}; there is {agent}.", *self._problems])


# --- what went wrong, in words ---

REASONS: tuple[tuple[type[Exception], str], ...] = (
    (Unavailable, "{error}"),
    (socket.gaierror, "the name of {hop} cannot be resolved ({error}): check SSH_HOST and the DNS"),
    (ConnectionRefusedError, "{hop} refuses connections: does sshd run there, is the port right?"),
    (TimeoutError, "{hop} does not answer within 10 s: is it down, or is a firewall in between?"),
    (paramiko.ChannelException, "the jump host could not reach {hop}: {error.text}"),
    (EOFError, "{hop} hung up during the handshake: too many connections, or a ban?"),
    (OSError, "{hop} cannot be reached: {error}"),
    (paramiko.SSHException, "SSH with {hop} failed: {error}"),
)


def _explain(hop: Hop, error: Exception) -> str:
    for kind, words in REASONS:
        if isinstance(error, kind):
            return words.format(hop=hop, error=error)
    raise error
