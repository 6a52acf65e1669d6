"""Bytes to frames, in both directions; no sockets."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import drivers

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut *data* at *cuts* (taken modulo its length)."""
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[low:high] for low, high in pairwise(places)]


def frames(buffer: drivers.FrameBuffer, chunks: list[bytes]) -> list[bytes]:
    """Feed *chunks* one by one; return every frame that comes out."""
    found: list[bytes] = []
    for chunk in chunks:
        buffer.feed(chunk)
        while (frame := buffer.next_frame()) is not None:
            found.append(frame)
    return found


@pytest.mark.parametrize("size", [1, 2, 7, 10**6], ids=["bytewise", "two", "seven", "whole"])
@pytest.mark.parametrize(
    ("data", "expected", "rest"),
    [
        (b'{"return": {}}\n', [b'{"return": {}}'], b""),
        (b"a\nb\n", [b"a", b"b"], b""),
        (b"\n\r\n \t\na\n\n", [b"a"], b""),
        (b"a\ntrailing", [b"a"], b"trailing"),
        (b"", [], b""),
    ],
)
def test_lines_come_out_whole_and_the_rest_stays(
    data: bytes, expected: list[bytes], rest: bytes, size: int
) -> None:
    buffer = drivers.FrameBuffer()
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    assert frames(buffer, chunks) == expected
    assert frames(buffer, [b"!\n"]) == [rest + b"!"]


@given(st.binary(max_size=300), st.lists(st.integers(min_value=0), max_size=6))
def test_any_bytes_give_replies_or_a_protocol_error(data: bytes, cuts: list[int]) -> None:
    buffer = drivers.FrameBuffer(limit=100)
    try:
        for frame in frames(buffer, pieces(data, cuts)):
            reply = drivers.parse_reply(frame)
            assert ("return" in reply) != ("error" in reply)
    except drivers.ProtocolError as error:
        assert "\n" not in str(error)
        assert str(error).isprintable()


@given(st.lists(JSON, max_size=5), st.lists(st.integers(min_value=0), max_size=6))
def test_replies_survive_any_cutting(values: list[object], cuts: list[int]) -> None:
    data = b"".join(json.dumps({"return": value}).encode() + b"\n" for value in values)
    found = frames(drivers.FrameBuffer(), pieces(data, cuts))
    assert [drivers.parse_reply(frame)["return"] for frame in found] == values


def test_a_line_without_end_is_refused_at_the_limit() -> None:
    buffer = drivers.FrameBuffer(limit=10)
    buffer.feed(b"x" * 10)
    assert buffer.next_frame() is None
    buffer.feed(b"x")
    with pytest.raises(drivers.FrameError) as caught:
        buffer.next_frame()
    assert caught.value.raw == b"x" * 11


@given(st.binary(max_size=200).filter(lambda data: b"\xff" not in data), st.integers(0, 200))
def test_everything_up_to_the_mark_is_dropped(noise: bytes, cut: int) -> None:
    buffer = drivers.FrameBuffer()
    buffer.feed(noise[:cut])
    buffer.skip_to_mark()
    assert frames(buffer, [noise[cut:], b"more\n\xff", b"kept\n"]) == [b"kept"]


def test_skipped_bytes_are_not_held() -> None:
    buffer = drivers.FrameBuffer(limit=100)
    buffer.skip_to_mark()
    for _ in range(100):
        buffer.feed(b"x" * 1000)
        assert buffer.next_frame() is None
    assert frames(buffer, [b"x\xffkept\n"]) == [b"kept"]


def test_deeply_nested_json_is_a_frame_error() -> None:
    with pytest.raises(drivers.FrameError):
        drivers.parse_reply(b"[" * 100_000)


@pytest.mark.parametrize(
    "reply",
    [
        b"1",
        b"[]",
        b"{}",
        b'{"return": 1, "error": {"class": "a", "desc": "b"}}',
        b'{"error": 1}',
        b'{"error": {"class": "a"}}',
        b'{"error": {"class": 1, "desc": "b"}}',
        b'{"error": null}',
    ],
)
def test_what_is_no_reply_is_a_reply_error(reply: bytes) -> None:
    with pytest.raises(drivers.ReplyError):
        drivers.parse_reply(reply)


# --- requests, as the stand-in cuts them ---


def values(splitter: drivers.RequestSplitter, chunks: list[bytes]) -> list[object]:
    """Feed *chunks*; return the values, and the class ValueError for each refusal."""
    found: list[object] = []
    for chunk in chunks:
        splitter.feed(chunk)
        while True:
            try:
                value = splitter.next_value()
            except ValueError:
                found.append(ValueError)
                continue
            if value is None:
                break
            found.append(value)
    return found


@pytest.mark.parametrize("size", [1, 3, 10**6], ids=["bytewise", "three", "whole"])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"a":1}{"b":2}', [{"a": 1}, {"b": 2}]),
        (b' {"a":"}{\\"\\\\"}\n[1]', [{"a": '}{"\\'}, [1]]),
        (b'{"a":{"b":[{}]}}', [{"a": {"b": [{}]}}]),
        (b'{"a":"\xc3\xa4\\u00e4\\ud83d\\ude00"}', [{"a": "ää😀"}]),
        (b'\xff{"a":1}', [ValueError, {"a": 1}]),
        (b'{"execute":"gu\xff{"a":1}', [ValueError, {"a": 1}]),
        (b'{"execute":"gu\xff\xff{"a":1}', [ValueError, ValueError, {"a": 1}]),
        (b'{"a": 1}\xff{"a":1}', [{"a": 1}, ValueError, {"a": 1}]),
    ],
)
def test_requests_are_cut_wherever_they_arrive_in_pieces(
    data: bytes, expected: list[object], size: int
) -> None:
    chunks = [data[at : at + size] for at in range(0, len(data), size)]
    assert values(drivers.RequestSplitter(), chunks) == expected


@given(st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=5), st.lists(st.integers(0)))
def test_requests_survive_any_cutting(requests: list[object], cuts: list[int]) -> None:
    for ascii_only in (True, False):
        data = "".join(json.dumps(item, ensure_ascii=ascii_only) for item in requests)
        sent = pieces(data.encode(), cuts)
        assert values(drivers.RequestSplitter(), sent) == requests


@pytest.mark.parametrize("junk", [b"hello world\n", b"}", b'{"a" 1}', b'{"a": nonsense}', b"{1}"])
def test_what_is_no_request_is_refused_at_once(junk: bytes) -> None:
    splitter = drivers.RequestSplitter()
    assert values(splitter, [junk]) == [ValueError]
    assert values(splitter, [b'{"a":1}']) == [{"a": 1}]


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_any_bytes_give_values_or_refusals_and_a_reset_brings_it_back(chunks: list[bytes]) -> None:
    splitter = drivers.RequestSplitter()
    values(splitter, chunks)
    assert values(splitter, [b'\xff{"a":1}'])[-1] == {"a": 1}
