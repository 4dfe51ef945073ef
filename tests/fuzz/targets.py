"""What is fuzzed: each target takes any bytes and raises for what must not happen."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import msgspec

from tests.fuzz import answers, inputs


class Target(msgspec.Struct, frozen=True):
    """`words` are put into inputs as they are."""

    run: Callable[[bytes], None]
    seeds: Sequence[bytes]
    words: Sequence[bytes] = ()


JSON_WORDS = (
    b"null", b"true", b"[]", b"{}", b"-1", b"1e400", b"9223372036854775808", b'"\\ud800"', b'"code":', b'"error":{',
    b'"data":', b"\xff", b'"status":', b'"result":false',
)  # fmt: skip
YAML_WORDS = (
    b"&a ", b"*a", b"!!x ", b"? ", b"- ", b"<<: ", b"|\n", b"${HOME}", b"${X:-", b"\t", b"---\n", b"\xef\xbb\xbf",
    b"\x00", b"012", b"no", b"5m", b"scopes:\n", b"\n--- scope file ---\n",
)  # fmt: skip
HTTP_WORDS = (
    b"\r\n", b"\r\n\r\n", b"HTTP/1.1", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"%00", b"name[]=",
    b"\x00", b"Expect: ", b"Connection: Upgrade\r\n", b"Host: ", b"q=0",
)  # fmt: skip

TARGETS: Mapping[str, Target] = {
    "decoders": Target(answers.decoders, answers.decoder_seeds(), JSON_WORDS),
    "polls": Target(answers.polls, [random.Random(number).randbytes(300) for number in range(8)]),
    "configuration": Target(inputs.configuration, inputs.configuration_seeds(), YAML_WORDS),
    "web_configuration": Target(inputs.web_configuration, inputs.web_configuration_seeds(), YAML_WORDS),
    "http": Target(inputs.http, inputs.http_seeds(), HTTP_WORDS),
}
