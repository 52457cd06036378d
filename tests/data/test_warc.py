import gzip
import io

import pytest

from qwench.data.documents import read_documents, read_item
from qwench.data.opening import ReadLimits
from qwench.data.warc import Damage, Record, read_warc

BODY = "<html><body><article><p>{}</p></article></body></html>".format(
    "A sentence of page %d, long enough to count. " * 6
)


def block(headers: dict[str, str], payload: bytes) -> bytes:
    lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    return f"WARC/1.0\r\n{lines}Content-Length: {len(payload)}\r\n\r\n".encode() + payload + b"\r\n\r\n"


def response(
    number: int, body: bytes, http: str = "Content-Type: text/html; charset=utf-8", status: str = "200 OK"
) -> bytes:
    headers = {
        "WARC-Type": "response",
        "WARC-Record-ID": f"<urn:uuid:{number:032d}>",
        "WARC-Date": "2024-05-01T00:00:00Z",
        "WARC-Target-URI": f"https://example.net/{number}",
        "Content-Type": "application/http; msgtype=response",
    }
    return block(headers, f"HTTP/1.1 {status}\r\n{http}\r\n\r\n".encode() + body)


def page(number: int) -> bytes:
    return response(number, (BODY.replace("%d", str(number))).encode())


def conversion(text: str) -> bytes:
    return block(
        {"WARC-Type": "conversion", "WARC-Target-URI": "https://example.net/w", "Content-Type": "text/plain"},
        text.encode(),
    )


def read(data: bytes, limits: ReadLimits | None = None) -> tuple[list[Record], list[Damage]]:
    both = list(read_warc(io.BytesIO(data), limits or ReadLimits()))
    return [one for one in both if isinstance(one, Record)], [one for one in both if isinstance(one, Damage)]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_pages_and_texts_of_an_archive(pack):
    records, damages = read(b"".join(pack(one) for one in (page(1), conversion("a text"), page(2))))
    assert [record.url for record in records] == [
        "https://example.net/1",
        "https://example.net/w",
        "https://example.net/2",
    ]
    assert [record.media_type for record in records] == ["text/html", "text/plain", "text/html"]
    assert records[1].data == b"a text"
    assert damages == []


def test_what_is_no_page_is_named():
    data = response(1, b"\x89PNG", "Content-Type: image/png") + response(2, b"gone", status="404 Not Found") + page(3)
    records, damages = read(data)
    assert len(records) == 1
    assert [damage.reason for damage in damages] == ["no page (image/png)", "HTTP status 404"]


def test_bodies_are_decoded_and_wrong_headers_forgiven():
    body = b"<p>hello</p>" * 20
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    kind = "Content-Type: text/html\r\n"
    data = (
        response(1, gzip.compress(body), kind + "Content-Encoding: gzip")
        + response(2, chunked, kind + "Transfer-Encoding: chunked")
        + response(3, body, kind + "Transfer-Encoding: chunked")
        + response(4, body, kind + "Content-Encoding: gzip")
    )
    records, damages = read(data)
    assert [record.data for record in records] == [body] * 4
    assert damages == []


@pytest.mark.parametrize("missing", [1, 20, 100, 200, 250])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_cut_archive_gives_what_is_whole_and_names_the_rest(pack, missing):
    members = [pack(page(number)) for number in range(4)]
    records, damages = read(b"".join(members)[:-missing])
    if missing == 1:  # of the line ends after the last record, or of the checksum
        assert len(records) in (3, 4)
        return
    assert len(records) == 3
    assert len(damages) == 1
    assert damages[0].offset in (sum(map(len, members[:2])), sum(map(len, members[:3])))


def test_damage_in_the_middle_costs_only_what_it_hits():
    members = [gzip.compress(page(number)) for number in range(5)]
    broken = bytearray(members[2])
    broken[40:60] = b"\xff" * 20
    records, damages = read(b"".join((*members[:2], bytes(broken), *members[3:])))
    assert [record.url[-1] for record in records] == ["0", "1", "3", "4"]
    assert damages
    assert all("damaged WARC" in damage.reason for damage in damages)


def test_limits_hold_for_records_and_for_what_they_unpack_to():
    limits = ReadLimits(max_page_bytes=10_000)
    bomb = response(2, gzip.compress(bytes(1_000_000)), "Content-Type: text/html\r\nContent-Encoding: gzip")
    records, damages = read(response(1, b"x" * 20_000) + bomb + page(3), limits)
    assert [record.url[-1] for record in records] == ["3"]
    assert [damage.reason for damage in damages] == ["page too large"] * 2


def test_other_files_are_no_archives():
    assert [damage.reason for damage in read(b"just text")[1]] == ["unreadable (no WARC records)"]
    assert read(b"") == ([], [])


def test_documents_of_archives(tmp_path):
    path = tmp_path / "crawl.warc.gz"
    latin = "<p>Größe und Länge, ein Satz der lang genug ist.</p>".encode("latin-1")
    path.write_bytes(
        gzip.compress(page(1)) + gzip.compress(response(2, latin, "Content-Type: text/html; charset=iso-8859-1"))
    )
    skipped = []
    documents = list(read_documents([path], skipped=skipped))
    assert [document.meta["url"] for document in documents] == ["https://example.net/1", "https://example.net/2"]
    assert "page 1, long enough" in documents[0].text
    assert "Größe und Länge" in documents[1].text
    assert {document.kind for document in documents} == {"web"}
    assert documents[0].id == "crawl.warc.gz@0"
    again = list(read_item({"files": [{"name": "crawl.warc.gz", "path": str(path)}]}, skipped))
    assert again == documents
    assert skipped == []
