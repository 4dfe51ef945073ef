"""How one value is written: parse it, write it back, and describe it as JSON Schema.

The message of a parser never holds the value, which may be that of a variable (`${VAR}`).
"""

from __future__ import annotations

import datetime
import difflib
import ipaddress
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from exporter.config.files import open_file, reason
from exporter.config.secret import Secret

VARIABLE = r"\$\{"
"""In the JSON Schema every text may hold a variable instead of a value of its form."""


CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class InvalidValue(Exception):
    """A value that is not valid. `shown`: the message is followed by what is written in the file."""

    def __init__(self, message: str, suggestion: str = "", *, shown: bool = True) -> None:
        super().__init__(message)
        self.message = message
        self.suggestion = suggestion
        self.shown = shown


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The nearest known word, or ""."""
    return next(iter(difflib.get_close_matches(word[:64].lower(), known, 1)), "")


class Kind:
    """One way to write a value. `private`: the written text is never shown in a message."""

    private = False

    def parse(self, value: object, directory: Path) -> Any:
        """The typed value of a YAML scalar; relative paths start at `directory`. Raises InvalidValue."""
        raise NotImplementedError

    def write(self, value: Any) -> object:
        """The value as a user writes it."""
        return value

    def schema(self) -> dict[str, object]:
        """The JSON Schema of the written form."""
        raise NotImplementedError


class Boolean(Kind):
    def parse(self, value: object, directory: Path) -> bool:
        if not isinstance(value, bool):
            raise InvalidValue("want true or false")
        return value

    def schema(self) -> dict[str, object]:
        return {"type": "boolean"}


class Number(Kind):
    """A finite number, above or at least a limit."""

    def __init__(self, *, whole: bool = False, above: int | None = None, least: int | None = None) -> None:
        self.whole, self.above, self.least = whole, above, least
        limit = f" above {above}" if above is not None else f" of at least {least}" if least is not None else ""
        self.want = f"want a {'whole ' if whole else ''}number{limit}"

    def parse(self, value: object, directory: Path) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            raise InvalidValue(self.want)
        if not abs(value) < 2**63 or math.isnan(value):
            raise InvalidValue(self.want)
        if (self.above is not None and value <= self.above) or (self.least is not None and value < self.least):
            raise InvalidValue(self.want)
        return value if self.whole else float(value)

    def write(self, value: Any) -> object:
        return int(value) if value == int(value) else value

    def schema(self) -> dict[str, object]:
        schema: dict[str, object] = {"type": "integer" if self.whole else "number"}
        if self.above is not None:
            schema["exclusiveMinimum"] = self.above
        if self.least is not None:
            schema["minimum"] = self.least
        return schema


class Text(Kind):
    """Text of a form. Control characters are refused: the text goes into headers, labels and log lines."""

    def __init__(self, want: str = "text that is not empty", pattern: str = r".+", *, private: bool = False) -> None:
        self.want = f"want {want}"
        self.pattern = pattern
        self.private = private
        self._match = re.compile(pattern, re.DOTALL).fullmatch

    def parse(self, value: object, directory: Path) -> Any:
        if not isinstance(value, str) or not self._match(value):
            raise InvalidValue(self.want)
        if CONTROL.search(value):
            raise InvalidValue(f"{self.want}, without control characters", shown=False)
        return value

    def schema(self) -> dict[str, object]:
        return {"type": "string", "pattern": f"^(?:{self.pattern})$|{VARIABLE}"}


class Choice(Kind):
    """One of a few words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def parse(self, value: object, directory: Path) -> str:
        if isinstance(value, str) and value in self.words:
            return value
        near = did_you_mean(value, self.words) if isinstance(value, str) and len(value) > 2 else ""
        raise InvalidValue(f"want {', '.join(self.words[:-1])} or {self.words[-1]}", near)

    def schema(self) -> dict[str, object]:
        return {"anyOf": [{"enum": list(self.words)}, {"type": "string", "pattern": VARIABLE}]}


class Duration(Text):
    """`30s`, `5m`, `2h`, `7d`, `1h30m`; seconds."""

    LONGEST = 3650 * 86400
    _UNITS: ClassVar = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}

    def __init__(self, *, zero: bool = False) -> None:
        super().__init__(
            "a duration like 30s, 5m, 2h or 7d",
            r"(?=[0-9])(?:[0-9]{1,9}d)?(?:[0-9]{1,9}h)?(?:[0-9]{1,9}m)?(?:[0-9]{1,9}s)?(?:[0-9]{1,9}ms)?",
        )
        self.zero = zero

    def parse(self, value: object, directory: Path) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            whole = isinstance(value, int) and 0 <= value < 10**9
            raise InvalidValue("a duration needs a unit: s, m, h or d", f"{value}s" if whole else "", shown=False)
        text = super().parse(value, directory)
        seconds = sum(int(n) * self._UNITS[unit] for n, unit in re.findall(r"([0-9]+)(ms|[dhms])", text))
        if seconds > self.LONGEST:
            raise InvalidValue("want a duration of at most 3650d")
        if not seconds and not self.zero:
            raise InvalidValue("want a duration above 0s")
        return float(seconds)

    def write(self, value: Any) -> str:
        for unit in ("d", "h", "m"):
            # People write 24h and 60s: a unit is used from two of it on.
            if value >= 2 * self._UNITS[unit] and not value % self._UNITS[unit]:
                return f"{value / self._UNITS[unit]:.0f}{unit}"
        return f"{value:.0f}s" if value == int(value) else f"{value * 1000:.0f}ms"


class Size(Text):
    """`64MiB`; bytes."""

    _UNITS: ClassVar = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}

    def __init__(self) -> None:
        super().__init__("a size like 512KiB, 64MiB or 1GiB", r"[0-9]{1,13}(?:B|KiB|MiB|GiB)")

    def parse(self, value: object, directory: Path) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            near = f"{value}B" if 0 < value < 10**12 else ""
            raise InvalidValue("a size needs a unit: B, KiB, MiB or GiB", near, shown=False)
        text = super().parse(value, directory)
        number = text.rstrip("BKMGi")
        size = int(number) * self._UNITS[text[len(number) :]]
        if not 1024 <= size <= 2**40:
            raise InvalidValue("want a size from 1KiB to 1024GiB")
        return size

    def write(self, value: Any) -> str:
        unit = next(unit for unit, size in self._UNITS.items() if not value % size)
        return f"{value // self._UNITS[unit]}{unit}"


class Share(Text):
    """`20%`; a number, 1.0 for 100%."""

    LARGEST = 200

    def __init__(self) -> None:
        super().__init__("a share like 20%", r"[0-9]{1,3}(?:\.[0-9]{1,3})?%")

    def parse(self, value: object, directory: Path) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            percent = value * 100 if isinstance(value, float) else value
            near = f"{percent:g}%" if 0 <= percent <= self.LARGEST else ""
            raise InvalidValue("a share needs a percent sign", near, shown=False)
        percent = float(super().parse(value, directory).removesuffix("%"))
        if percent > self.LARGEST:
            raise InvalidValue(f"want a share of at most {self.LARGEST}%")
        return percent / 100

    def write(self, value: Any) -> str:
        return f"{value * 100:g}%"


class Timezone(Text):
    """`+08:00`."""

    def __init__(self) -> None:
        super().__init__("a distance from UTC like +08:00", r"[+-](?:0[0-9]|1[0-4]):[0-5][0-9]")

    def parse(self, value: object, directory: Path) -> datetime.timezone:
        text = super().parse(value, directory)
        minutes = int(text[1:3]) * 60 + int(text[4:6])
        return datetime.timezone(datetime.timedelta(minutes=-minutes if text[0] == "-" else minutes))

    def write(self, value: Any) -> str:
        return str(value)[3:] or "+00:00"


class Address(Text):
    """`HOST:PORT`, `[::1]:PORT`, `:PORT` for every address; port 0 takes a free one."""

    def __init__(self) -> None:
        super().__init__("HOST:PORT, [IPV6]:PORT or :PORT", r"(?:\[[0-9A-Fa-f:.%a-z]+\]|[A-Za-z0-9._-]*):[0-9]{1,5}")

    def parse(self, value: object, directory: Path) -> str:
        text: str = super().parse(value, directory)
        host, _, port = text.rpartition(":")
        if int(port) > 65535:
            raise InvalidValue("want a port from 0 to 65535")
        if host.startswith("["):
            try:
                ipaddress.IPv6Address(host[1:-1])
            except ValueError:
                raise InvalidValue("want an IPv6 address inside the brackets") from None
        return text


class HostName(Text):
    """A host name or IP address without a port; lower case, an IPv6 address without brackets."""

    def __init__(self) -> None:
        super().__init__("a host name or IP address without a port", r"[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]+\]?")

    def parse(self, value: object, directory: Path) -> str:
        text = str(super().parse(value, directory)).lower().strip("[]").rstrip(".")
        if ":" in text:
            try:
                return str(ipaddress.IPv6Address(text))
            except ValueError:
                raise InvalidValue(self.want) from None
        if not text:
            raise InvalidValue(self.want)
        return text

    def write(self, value: Any) -> str:
        return str(value)


class TelemetryPath(Text):
    """An absolute path that hides none of the exporter's own pages."""

    def __init__(self) -> None:
        super().__init__("a path like /metrics", r"(?:/[A-Za-z0-9._~-]+)+")

    def parse(self, value: object, directory: Path) -> str:
        text: str = super().parse(value, directory)
        parts = text.split("/")[1:]
        if parts[0] in ("-", "api") or "." in parts or ".." in parts or text == "/failures":
            raise InvalidValue("want a path like /metrics outside /-/, /api/ and /failures")
        return text


class ScopeId(Text):
    """The number of a business or set, as number or text."""

    def __init__(self, want: str = "a positive number", pattern: str = r"[1-9][0-9]{0,18}") -> None:
        super().__init__(want, pattern)

    def parse(self, value: object, directory: Path) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value) if 0 < value < 2**63 else ""
        return str(super().parse(value, directory))

    def schema(self) -> dict[str, object]:
        return {"anyOf": [{"type": "integer", "minimum": 1}, super().schema()]}


class ScopePattern(ScopeId):
    """The id of a scope as number or text, or a pattern for its name."""

    def __init__(self) -> None:
        super().__init__("an id or a pattern for a name", r".+")


class Url(Text):
    """The base of an API: http or https, no credentials, no query; without its trailing slash."""

    credentials = False

    def __init__(self) -> None:
        super().__init__("an http:// or https:// URL", r"https?://[^\s/?#]+.*", private=True)

    def parse(self, value: object, directory: Path) -> Any:
        text = super().parse(value, directory)
        try:
            parts = urlsplit(text)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise InvalidValue("the URL is malformed", shown=False) from None
        if not host or " " in text:
            raise InvalidValue("the URL is malformed", shown=False)
        if "@" in parts.netloc and not self.credentials:
            raise InvalidValue("no user and password in URLs; use blueking.auth", shown=False)
        if parts.query or parts.fragment or "?" in text or "#" in text:
            raise InvalidValue("no query and no fragment in the URL", shown=False)
        return text.rstrip("/")


class ProxyUrl(Url):
    """The URL of an HTTP proxy. It may carry credentials, so it is a secret."""

    credentials = True

    def parse(self, value: object, directory: Path) -> Secret:
        return Secret(super().parse(value, directory))


class File(Text):
    """A file that can be read at the start; absolute."""

    def __init__(self) -> None:
        super().__init__("a path")

    def parse(self, value: object, directory: Path) -> Path:
        file: Path = directory / super().parse(value, directory)
        try:
            with open_file(file) as stream:
                stream.read(1)
        except (OSError, ValueError) as error:
            raise InvalidValue(f"cannot be read: {reason(error)}", shown=False) from None
        return file

    def write(self, value: Any) -> str:
        return str(value)


class KeyFile(File):
    """The file of a private key."""


class SecretText(Text):
    """A secret in the configuration itself, best as `${VAR}`."""

    def __init__(self) -> None:
        super().__init__(private=True)

    def parse(self, value: object, directory: Path) -> Secret:
        return Secret(super().parse(value, directory))


class SecretFile(Text):
    """A file whose content is a secret; it is read at once and again whenever it changes."""

    def __init__(self) -> None:
        # private, because people write the secret itself here
        super().__init__("a path", private=True)

    def parse(self, value: object, directory: Path) -> Secret:
        try:
            return Secret.from_file(directory / super().parse(value, directory))
        except OSError as error:
            raise InvalidValue(f"cannot be read: {reason(error)}", shown=False) from None
        except ValueError as error:
            raise InvalidValue(f"the file {error}", shown=False) from None
