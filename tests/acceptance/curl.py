"""What `examples/guide.sh` needs of curl, for machines that have none: the same requests, sent by httpx."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import httpx


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("url")
    parser.add_argument("-sS", action="store_true", required=True)
    parser.add_argument("-X", default="GET", dest="method")
    parser.add_argument("-H", action="append", default=[], dest="headers")
    parser.add_argument("-d", dest="body")
    parser.add_argument("-F", dest="form")
    parser.add_argument("-D", type=Path, dest="head")
    parser.add_argument("-o", type=Path, dest="out")
    parser.add_argument("-w", default="", dest="after")
    parser.add_argument("--retry")
    given = parser.parse_args()
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in given.headers)]
    files = {}
    if given.form:
        name, _, path = given.form.partition("=@")
        files[name] = Path(path).read_bytes()
    answer = httpx.request(given.method, given.url, headers=headers, content=given.body, files=files or None)
    if given.head:
        given.head.write_text("".join(f"{name}: {value}\n" for name, value in answer.headers.items()))
    if given.out:
        given.out.write_bytes(answer.content)
    else:
        sys.stdout.buffer.write(answer.content)
    sys.stdout.write(given.after.replace("%{http_code}", str(answer.status_code)).replace("\\n", "\n"))


if __name__ == "__main__":
    main()
