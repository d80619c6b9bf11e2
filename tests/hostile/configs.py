"""Hostile TOML: configs of conversions, and plans."""

from __future__ import annotations

import random
from collections.abc import Iterator

from hostile.case import Case, Expect
from hostile.containers import patched

GOOD = b"""source = "model"
output = "m.parquet"
compression = "zstd"
[quantization]
quant_type = "int4"
group_size = 64
symmetric = false
mixed_precision_layers = ["embed", "norm"]
[[override]]
pattern = "^head"
quant_type = "int8"
[calibration]
sentences = 256
correction = 0.25
"""
PLAN = b'[[override]]\npattern = "^embed$"\nquant_type = "int4"\n'
SMALL = b'source = "a"\noutput = "b.parquet"\n'


def case(what: str, text: bytes, expect: Expect = "refused", plan: bool = False, sparse: int = 0) -> Case:
    name = "plan.toml" if plan else "c.toml"
    return Case(f"toml: {what}", {name: text}, expect, "config", sparse={name: sparse} if sparse else {})


def cases() -> Iterator[Case]:
    yield case("a good one", GOOD, "any")
    for text, plan in ((GOOD, False), (PLAN, True)):
        generator = random.Random(len(text))
        for bit in generator.sample(range(len(text) * 8), 300):
            yield case(f"bit {bit}", patched(text, bit // 8, bytes([text[bit // 8] ^ 1 << bit % 8])), "any", plan)
        for end in range(0, len(text), 3):
            yield case(f"ends at {end}", text[:end], "any", plan)
    for what, line in LINES.items():
        yield case(what, SMALL + line)
        yield case(f"{what}, in a table", SMALL + b"[quantization]\n" + line)
        yield case(f"{what}, in a plan", line, plan=True)
    for what, text in long_texts().items():
        yield case(f"long: {what}", SMALL + text)
    for key, values in VALUES.items():
        for value in values:
            yield case(f"{key} = {value[:30]}", SMALL + b"[quantization]\n" + f"{key} = {value}\n".encode())
    for key in (
        "source",
        "output",
        "quantization",
        "override",
        "calibration",
        "train",
        "allocate",
        "plan",
        "compression",
    ):
        for value in ("1", "[]", "[[]]", "[1]", "true", "1979-05-27", "inf", "[{}]"):
            if (key, value) != ("override", "[]"):
                yield case(
                    f"{key} = {value}", SMALL.replace(key.encode() + b" =", b"x =") + f"{key} = {value}\n".encode()
                )
    yield case("64 GiB of nothing", b"#", sparse=64 << 30)
    yield case("64 GiB of nothing, as a plan", b"#", plan=True, sparse=64 << 30)
    yield Case("toml: a device", {}, kind="config", links={"c.toml": "/dev/zero"})


def long_texts() -> dict[str, bytes]:
    """What is long or deep, at lengths at which a quadratic reader would show."""
    many = 100_000
    return {
        "brackets": b"x = " + b"[" * many,
        "closed brackets": b"x = " + b"[" * many + b"]" * many,
        "braces": b"x = " + b"{a=" * many,
        "a dotted key": b".".join([b"a"] * many) + b" = 1",
        "dotted keys": b"".join(b"a.b%d.c.d.e.f.g.h = 1\n" % i for i in range(20_000)),
        "a dotted table": b"[" + b".".join([b"a"] * many) + b"]\nb = 1",
        "keys of 32 dots": b"".join(b"k%d" % i + b".a" * 32 + b" = 1\n" for i in range(3300)),
        "tables of 32 dots": b"".join(b"[k%d" % i + b".a" * 32 + b"]\n" for i in range(3300)),
        "tables": b"".join(b"[t%d]\n" % i for i in range(50_000)),
        "lists of tables": b"[[x]]\n" * many,
        "nested lists of tables": b"".join(b"[[x%s]]\n" % (b".y" * i) for i in range(300)),
        "a comment": b"#" + b"x" * 250_000 + b"\nx = 1",
        "a string": b'x = "' + b"x" * 250_000 + b'"',
        "a key": b"x" * 250_000 + b" = 1",
        "escapes": b'x = "' + b"\\u0041" * 40_000 + b'"',
        "a string without an end": b'x = """' + b"x" * 250_000,
        "spaces": b"x = " + b" " * 250_000 + b"1",
        "newlines": b"\n" * 250_000 + b"x = 1",
        "a list": b"x = [" + b"1," * 40_000 + b"]",
        "digits": b"x = " + b"9" * 5000,
        "more digits": b"x = " + b"9" * 250_000,
        "hexadecimal digits": b"x = 0x" + b"f" * 250_000,
        "digits of a float": b"x = 1." + b"9" * 250_000,
        "an exponent": b"x = 1e" + b"9" * 250_000,
        "512 KiB of lines": b"a = 1\n" + b"# comment\n" * (1 << 19 >> 3),
    }


LINES: dict[str, bytes] = {
    "no UTF-8": b'x = "\xff\xfe"\n',
    "UTF-16": "x = 1\n".encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbfx = 1\n",
    "a NUL": b'x = "\0"\n',
    "a control character": b'x = "\x1b[2J"\n',
    "a lone surrogate": b'x = "\\ud800"\n',
    "an unknown key": b"outputs = 1\n",
    "an unknown key with control characters": b'"\\u001b[2J" = 1\n',
    "a key twice": b"x = 1\nx = 2\n",
    "an empty key": b'"" = 1\n',
    "a table twice": b"[x]\n[x]\n",
    "a date": b"x = 1979-05-27T07:32:00Z\n",
}
VALUES: dict[str, tuple[str, ...]] = {
    "quant_type": ("8", '"int9"', '""', "true", "[]", "{}", '"' + "x" * 250_000 + '"', '"int8\\u0000"'),
    "group_size": ("-1", "2147483648", "9" * 4000, "1.5", "nan", "true", '"64"', "1e400", "0x" + "f" * 1000),
    "per_channel": ("1", '"false"', "0.0"),
    "symmetric": ("0", "nan"),
    "solver": ("1", '"gptqq"', "[]"),
    "mixed_precision_layers": ('"embed"', "[1]", "[[]]", "[" + "1," * 10**5 + "]"),
    "on_nonfinite": ("0", '"keeps"'),
    "rotate": ('"yes"', "1"),
}
PATTERNS = (
    "(", "a{99999999999999}", "(" * 10**4 + ")" * 10**4, "(" * 150 + "a" + ")" * 150, "(?P<a>a)(?P<a>b)", "[", "\\\\",
    "(((a{1,1000}){1,1000}){1,1000}){1,1000}", "(?<=a*)b", "a**", "(?z)", "(?:" * 5000 + ")" * 5000,
)  # fmt: skip


def patterns() -> Iterator[Case]:
    """Regular expressions that are none, or that are hard."""
    for pattern in PATTERNS:
        text = f"[[override]]\npattern = '{pattern}'\nquant_type = 'int8'\n".encode()
        yield case(f"pattern {pattern[:30]}", SMALL + b"[quantization]\nquant_type = 'int4'\n" + text, "any")
        yield case(f"pattern {pattern[:30]}, in a plan", text, "any", plan=True)
