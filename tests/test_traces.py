"""Traces: each format is read as documented, malformed rows are refused or counted, a plain csv reads back the same."""

import dataclasses
import gzip
import itertools
import json
import os
import pickle
import re
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vecsim as sim
from vecsim.traces import FORMATS, Trace, read_columns, write_csv

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319601,3180,8
2023-11-16 18:17:05,110,27
"""
MOONCAKE = """{"timestamp": 27, "input_length": 1025, "output_length": 5, "hash_ids": [7, 9, 4]}
{"timestamp": 3027, "input_length": 512, "output_length": 6, "hash_ids": [7]}
{"timestamp": 3027.5, "input_length": 513, "output_length": 7, "hash_ids": [7, 30]}
"""
QWEN = """\
{"chat_id": 1, "parent_chat_id": -1, "timestamp": 61.1, "input_length": 20, "output_length": 5, "type": "text", \
"turn": 1, "hash_ids": [1089, 1090]}
{"chat_id": 2, "parent_chat_id": 1, "timestamp": 61.4, "input_length": 33, "output_length": 2, "type": "search", \
"turn": 2, "hash_ids": [1089, 1090, 12]}
{"chat_id": 3, "parent_chat_id": -1, "timestamp": 62.1, "input_length": 1, "output_length": 9, "type": "text", \
"turn": 1, "hash_ids": [5]}
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118.5,GPT-4,417,276,693,API log
"""
BURSTGPT_2 = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,"a,b",0.5,ChatGPT,472,18,490,Conversation log
"""
VIDUR = """num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio
3772,54,3826,69.85185185185185
2015,156,2171,12.916666666666666
"""
PLAIN = """arrived_at,prompt_tokens,output_tokens,max_tokens,class,block_ids
0.1,100,5,10,chat,70 80
0.3,33,7,7,"code, long",70
0.7,4,1,2,chat,
"""
FILES = {
    "azure": AZURE,
    "mooncake": MOONCAKE,
    "burstgpt": BURSTGPT,
    "qwen-bailian": QWEN,
    "vidur": VIDUR,
    "csv": "prompt_tokens,output_tokens\n3,4\n5,6\n",
}


@pytest.fixture
def read(tmp_path):
    """Read a text, or bytes, that are the file `trace`."""

    def read(text, format, *args, name="trace", **kwargs):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_columns(path, format, *args, **kwargs)

    return read


def same(one: Trace, other: Trace) -> bool:
    """Equal values of equal types."""
    return all(
        a is b is None or (a.dtype == b.dtype and np.array_equal(a, b)) if isinstance(a, np.ndarray | None) else a == b
        for a, b in zip(one, other, strict=True)
    )


def test_azure(read):
    trace = read(AZURE, "azure")
    assert trace.arrived_at.tolist() == [0.0, 0.0520001, 1.02004]
    assert trace.prompt_tokens.tolist() == [4808, 3180, 110]
    assert trace.output_tokens.tolist() == [10, 8, 27]
    assert trace.max_tokens is None
    assert trace.block_ids.tolist() == []
    assert trace.block_counts.tolist() == [0, 0, 0]
    assert trace.class_.tolist() == [0, 0, 0]
    assert trace[6:8] == (0, ())
    assert trace.skipped == 0


@pytest.mark.parametrize("zone", ["+00:00", "Z", "+0000", "+00", "-05:00"])
def test_azure_times_with_a_zone(read, zone):
    text = f"TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 23:59:59.5{zone},1,1\n2024-05-11 00:00:01{zone},1,1\n"
    assert read(text, "azure").arrived_at.tolist() == [0.0, 1.5]


def test_azure_times_of_different_zones(read):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 12:00:00,1,1\n2024-05-10 12:00:00+02:00,2,1\n"
    trace = read(text, "azure")
    assert trace.arrived_at.tolist() == [0.0, 7200.0]
    assert trace.prompt_tokens.tolist() == [2, 1]


def test_mooncake(read):
    trace = read(MOONCAKE, "mooncake")
    assert trace.arrived_at.tolist() == [0.0, 3.0, 3.0005]
    assert trace.prompt_tokens.tolist() == [1025, 512, 513]
    assert trace.output_tokens.tolist() == [5, 6, 7]
    assert trace.block_ids.tolist() == [0, 1, 2, 0, 0, 3]
    assert trace.block_counts.tolist() == [3, 1, 2]
    assert trace.id_block_tokens == 512


def test_ids_may_be_of_any_size(read):
    text = '{"timestamp": 0, "input_length": 1025, "output_length": 5, "hash_ids": [18446744073709551615, -1, 3]}\n'
    assert read(text, "mooncake").block_ids.tolist() == [0, 1, 2]


def test_qwen(read):
    trace = read(QWEN, "qwen-bailian")
    np.testing.assert_allclose(trace.arrived_at, [0, 0.3, 1], atol=1e-12)
    assert trace.prompt_tokens.tolist() == [20, 33, 1]
    assert trace.classes == ("text", "search")
    assert trace.class_.tolist() == [0, 1, 0]
    assert trace.block_ids.tolist() == [0, 1, 0, 1, 2, 3]
    assert trace.block_counts.tolist() == [2, 3, 1]
    assert trace.id_block_tokens == 16


def test_burstgpt(read):
    trace = read(BURSTGPT, "burstgpt")
    assert trace.arrived_at.tolist() == [0, 40, 113.5]
    assert trace.prompt_tokens.tolist() == [472, 1087, 417]
    assert trace.output_tokens.tolist() == [18, 230, 276]
    assert trace.classes == ("Conversation log", "API log")
    assert trace.class_.tolist() == [0, 0, 1]
    assert read(BURSTGPT_2, "burstgpt").prompt_tokens.tolist() == [472]


def test_burstgpt_failures_are_malformed(read):
    text = BURSTGPT + "119,ChatGPT,7,0,7,API log\n"
    with pytest.raises(ValueError, match=r"line 5: Response tokens must be a whole number >= 1, got '0' \(on_error="):
        read(text, "burstgpt")
    trace = read(text, "burstgpt", "skip")
    assert trace.skipped == 1
    assert len(trace.prompt_tokens) == 3


def test_vidur(read):
    trace = read(VIDUR, "vidur")
    assert trace.arrived_at is None
    assert trace.prompt_tokens.tolist() == [3772, 2015]
    assert trace.output_tokens.tolist() == [54, 156]
    trace = read("arrived_at,num_prefill_tokens,num_decode_tokens\n2.5,7,8\n2.25,9,10\n", "vidur")
    assert trace.arrived_at.tolist() == [0, 0.25]
    assert trace.prompt_tokens.tolist() == [9, 7]


def test_plain_csv(read):
    trace = read(PLAIN, "csv", id_block_tokens=64)
    np.testing.assert_allclose(trace.arrived_at, [0, 0.2, 0.6], atol=1e-15)
    assert trace.prompt_tokens.tolist() == [100, 33, 4]
    assert trace.output_tokens.tolist() == [5, 7, 1]
    assert trace.max_tokens.tolist() == [10, 7, 2]
    assert trace.classes == ("chat", "code, long")
    assert trace.class_.tolist() == [0, 1, 0]
    assert trace.block_ids.tolist() == [0, 1, 0]
    assert trace.block_counts.tolist() == [2, 1, 0]
    assert trace.id_block_tokens == 64


def test_columns_have_their_types(read):
    trace = read(PLAIN, "csv", id_block_tokens=64)
    assert trace.arrived_at.dtype == np.float64
    arrays = (trace.prompt_tokens, trace.output_tokens, trace.max_tokens, trace.block_ids, trace.block_counts)
    assert all(array.dtype == np.int64 for array in (*arrays, trace.class_))


def test_columns_in_any_order_with_others_and_spaces(read):
    text = "output_tokens , note,prompt_tokens\n 4 ,x, 3\n6.0,,5\n"
    trace = read(text, "csv")
    assert trace.prompt_tokens.tolist() == [3, 5]
    assert trace.output_tokens.tolist() == [4, 6]


@pytest.mark.parametrize("format", FORMATS)
def test_any_format_may_be_compressed_have_a_bom_other_line_ends_and_blank_lines(read, format):
    text = FILES[format]
    expected = read(text, format)
    assert len(expected.prompt_tokens) > 1
    odd = "\ufeff" + text.replace("\n", "\r\n  \r\n\r\n")
    assert same(read("\r\n" + odd.removeprefix("\ufeff"), format), expected)
    assert same(read(odd, format), expected)
    assert same(read(odd.rstrip(), format), expected)
    assert same(read(text.replace("\n", "\r"), format), expected)
    assert same(read(gzip.compress(odd.encode()), format, name="trace.gz"), expected)
    assert same(read(gzip.compress(text.encode()), format, name="no-ending"), expected)


def test_line_numbers_are_those_of_the_file(read):
    with pytest.raises(ValueError, match="trace, line 6: prompt_tokens"):
        read("\n\nprompt_tokens,output_tokens\r\n1,2\r\n\r\nx,2\r\n", "csv")


def test_rows_out_of_order_are_sorted_and_numbered_anew(read):
    text = """arrived_at,prompt_tokens,output_tokens,max_tokens,class,block_ids
9,1,1,1,late,5
2.5,2,2,2,early,8 5
7,3,3,3,late,
2.5,4,4,4,other,6 8
"""
    trace = read(text, "csv", id_block_tokens=1)
    assert trace.arrived_at.tolist() == [0, 0, 4.5, 6.5]
    for column in (trace.prompt_tokens, trace.output_tokens, trace.max_tokens):
        assert column.tolist() == [2, 4, 3, 1]
    assert trace.classes == ("early", "other", "late")
    assert trace.class_.tolist() == [0, 1, 2, 2]
    assert trace.block_ids.tolist() == [0, 1, 2, 0, 1]
    assert trace.block_counts.tolist() == [2, 2, 0, 1]


def test_a_row_left_out_leaves_no_class_and_no_id(read):
    text = PLAIN.replace("0.1,100", "0.1,0")
    trace = read(text, "csv", "skip", id_block_tokens=64)
    assert trace.classes == ("code, long", "chat")
    assert trace.block_ids.tolist() == [0]
    assert trace.arrived_at[0] == 0
    assert trace.skipped == 1


JSON_ROW = {"timestamp": 1, "input_length": 600, "output_length": 3, "hash_ids": [1, 2], "type": "text"}
LONG = 2**30 + 1


def json_row(**changed):
    return json.dumps({name: value for name, value in (JSON_ROW | changed).items() if value != "left out"})


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("azure", "2023-11-16 18:17:03,1,abc", "GeneratedTokens must be a whole number >= 1, got 'abc'"),
        ("azure", "2023-11-16 18:17:03,,1", "ContextTokens must be a whole number >= 1, got ''"),
        ("azure", "2023-11-16 18:17:03,1.5,1", "ContextTokens must be a whole number >= 1, got '1.5'"),
        ("azure", "2023-11-16 18:17:03,-1,1", "ContextTokens must be a whole number >= 1, got '-1'"),
        ("azure", "2023-11-16 18:17:03,nan,1", "ContextTokens must be a whole number >= 1, got 'nan'"),
        ("azure", "2023-11-16 18:17:03,1_0,1", "ContextTokens must be a whole number >= 1, got '1_0'"),
        (
            "azure",
            "2023-11-16 18:17:03,inf,1",
            "ContextTokens must be a whole number >= 1 and <= 1073741824, got 'inf'",
        ),
        ("azure", f"2023-11-16 18:17:03,1,{LONG}", "whole number >= 1 and <= 1073741824, got '1073741825'"),
        ("azure", "2023-11-16 18:17:03,1", "a row must have 3 values, got 2"),
        ("azure", "2023-11-16 18:17:03,1,1,", "a row must have 3 values, got 4"),
        ("azure", '2023-11-16 18:17:03,1,"1', "a row must be csv on one line, got '2023-11-16 18:17:03,1,\"1"),
        ("azure", ",1,1", "TIMESTAMP must be a time such as 2023-11-16 18:17:03.9799600, got ''"),
        ("azure", "2023-02-30 18:17:03,1,1", "TIMESTAMP must be a time such as 2023-11-16 18:17:03.9799600, got "),
        ("azure", "2023-11-16 18:17:03.12345678,1,1", "TIMESTAMP must be a time such as "),
        ("azure", "2023-11-16,1,1", "TIMESTAMP must be a time such as "),
        ("azure", "12.5,1,1", "TIMESTAMP must be a time such as "),
        ("burstgpt", "-1,m,1,1,2,a", "Timestamp must be a number >= 0, got '-1'"),
        ("burstgpt", "nan,m,1,1,2,a", "Timestamp must be a number >= 0, got 'nan'"),
        ("burstgpt", "inf,m,1,1,2,a", "Timestamp must be a number >= 0 and <= 1e+12, got 'inf'"),
        ("burstgpt", ",m,1,1,2,a", "Timestamp must be a number >= 0, got ''"),
        ("burstgpt", "1,m,1,1,2, ", "Log Type must be a text, got ' '"),
        ("mooncake", "{", "a row must be a JSON object, got '{'"),
        ("mooncake", "[" * 100_000, "a row must be a JSON object, got '[[["),
        ("mooncake", "[1, 2]", "a row must be a JSON object, got '[1, 2]'"),
        ("mooncake", "a,b", "a row must be a JSON object, got 'a,b'"),
        ("mooncake", json_row(timestamp="left out"), "timestamp must be a number >= 0, got nothing"),
        ("mooncake", json_row(timestamp=-3), "timestamp must be a number >= 0, got -3"),
        ("mooncake", json_row(timestamp=1e16), "timestamp must be a number >= 0 and <= 1e+15, got 1e+16"),
        ("mooncake", json_row(timestamp=[1]), "timestamp must be a number >= 0, got [1]"),
        ("mooncake", json_row(input_length=None), "input_length must be a whole number >= 1, got nothing"),
        ("mooncake", json_row(input_length=True), "input_length must be a whole number >= 1, got True"),
        (
            "mooncake",
            json_row(input_length=10**400),
            "input_length must be a whole number >= 1 and <= 1073741824, got 1",
        ),
        ("mooncake", json_row(output_length=0), "output_length must be a whole number >= 1, got 0"),
        ("mooncake", json_row(output_length=2.5), "output_length must be a whole number >= 1, got 2.5"),
        (
            "mooncake",
            json_row(hash_ids=[1]),
            "hash_ids must be 2 whole numbers, for 600 tokens in blocks of 512, got 1",
        ),
        ("mooncake", json_row(hash_ids=[1, 2, 3]), "hash_ids must be 2 whole numbers, for 600 tokens in blocks of 512"),
        ("mooncake", json_row(hash_ids=[1, 2.0]), "hash_ids must be 2 whole numbers, for 600 tokens in blocks of 512"),
        ("mooncake", json_row(hash_ids=[1, True]), "hash_ids must be 2 whole numbers, for 600 tokens in blocks of 512"),
        ("mooncake", json_row(hash_ids="1 2"), "hash_ids must be 2 whole numbers, for 600 tokens in blocks of 512"),
        ("mooncake", json_row(hash_ids="left out"), "in blocks of 512, got nothing"),
        ("qwen-bailian", json_row(), "hash_ids must be 38 whole numbers, for 600 tokens in blocks of 16, got 2"),
        ("qwen-bailian", json_row(input_length=20, type=3), "type must be a text, got 3"),
        ("qwen-bailian", json_row(input_length=20, type="left out"), "type must be a text, got nothing"),
        ("vidur", "0,1,1,0", "num_prefill_tokens must be a whole number >= 1, got '0'"),
    ],
)
def test_malformed_rows(read, format, row, message):
    text = FILES[format] + row + "\n" + FILES[format].splitlines()[-1] + "\n"
    number = len(FILES[format].splitlines()) + 1
    with pytest.raises(ValueError, match=rf"/trace, line {number}: .*{re.escape(message)}") as caught:
        read(text, format)
    assert len(str(caught.value)) < 400
    trace = read(text, format, on_error="skip")
    assert trace.skipped == 1
    assert len(trace.prompt_tokens) == len(read(FILES[format], format).prompt_tokens) + 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,5,5,4,a,1", "max_tokens must be a whole number >= 5, got '4'"),
        ("0,5,5,,a,1", "max_tokens must be a whole number >= 5, got ''"),
        (f"0,5,5,{LONG},a,1", "max_tokens must be a whole number >= 5 and <= 1073741824, got '1073741825'"),
        ("0,5,5,5,,1", "class must be a text, got ''"),
        ("0,65,5,5,a,1 2 3", "block_ids must be at most 2 whole numbers, for 65 tokens in blocks of 64, got 3"),
        ("0,5,5,5,a,x", "block_ids must be at most 1 whole numbers, for 5 tokens in blocks of 64, got 'x'"),
        ("0,5,5,5,a,1_0", "block_ids must be at most 1 whole numbers, for 5 tokens in blocks of 64, got '1_0'"),
        ("0,5,5,5,a,1.0", "block_ids must be at most 1 whole numbers, for 5 tokens in blocks of 64, got '1.0'"),
        ('0,5,5,5,"two', "a row must be csv on one line, got '0,5,5,5,\"two"),
    ],
)
def test_malformed_rows_of_plain_csv(read, row, message):
    with pytest.raises(ValueError, match=rf"trace, line 5: {re.escape(message)}"):
        read(PLAIN + row + "\n", "csv", id_block_tokens=64)
    trace = read(PLAIN + row + "\n0.2,1,1,1,a,\n", "csv", "skip", id_block_tokens=64)
    assert trace.skipped == 1
    assert len(trace.prompt_tokens) == 4


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        ("azure", "", "lacks the column TIMESTAMP, ContextTokens, GeneratedTokens; it has none"),
        ("azure", AZURE.splitlines()[0], "there are no valid rows; 0 malformed ones were skipped"),
        (
            "azure",
            "TIMESTAMP,ContextToken\n",
            "ContextTokens, GeneratedTokens; it has TIMESTAMP, ContextToken; did you",
        ),
        ("vidur", VIDUR.split("\n", 1)[1], "lacks the column num_prefill_tokens, num_decode_tokens; it has 3772, 54"),
        ("csv", "prompt_tokens,output_tokens,prompt_tokens\n1,2,3\n", "has the column prompt_tokens more than once"),
        ("csv", 'prompt_tokens,"output_tokens\n1,2\n', "trace, header: a row must be csv on one line"),
        ("mooncake", "", "there are no valid rows; 0 malformed ones were skipped"),
        ("mooncake", b"\xff\xfe{\x00", "trace is not UTF-8 text (invalid start byte)"),
        (
            "mooncake",
            gzip.compress(MOONCAKE.encode(), mtime=0)[:-12],
            "trace can't be read (Compressed file ended before",
        ),
        ("mooncake", b"\x1f\x8bnothing at all", "trace can't be read (Unknown compression method)"),
        ("mooncake", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 90, "trace can't be read (Error -3 while decompress"),
        (
            "csv",
            "Arrived_At,prompt_tokens,output_tokens\n1,2,3\n",
            "has the column Arrived_At, .*; did you mean arrived_at?",
        ),
        ("csv", "arrival_time,prompt_tokens,output_tokens\n1,2,3\n", "arrival_time, .*; did you mean arrived_at?"),
        ("csv", "timestamp,prompt_tokens,output_tokens\n1,2,3\n", "timestamp, .*; did you mean arrived_at?"),
        ("csv", "prompt_tokens,output_tokens,Class\n1,2,a\n", "the column Class, .*; did you mean class?"),
        ("csv", "prompt_tokens,output_tokens,block_id\n1,2,a\n", "the column block_id, .*; did you mean block_ids?"),
        ("csv", "input_tokens,output_tokens\n1,2\n", "lacks the column prompt_tokens; .*; did you mean input_tokens?"),
        ("csv", "Prompt Tokens,output\n1,2\n", "; did you mean Prompt Tokens?"),
        ("vidur", "arrivedat,num_prefill_tokens,num_decode_tokens\n1,2,3\n", "did you mean arrived_at?"),
        ("csv", "prompt_tokens;output_tokens\n1;2\n", "header: there must be commas between columns, got semicolons"),
        ("csv", "prompt_tokens\toutput_tokens\n1\t2\n", "header: there must be commas between columns, got tabs"),
        ("csv", PLAIN, "id_block_tokens is needed: the tokens that an id of the column block_ids covers"),
    ],
)
def test_files_that_are_refused(read, format, text, message, on_error):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        read(text, format, on_error)


@pytest.mark.parametrize("name", ["num_tokens", "total_tokens", "note", "model", "class_size", "pd_ratio"])
def test_other_columns_are_allowed(read, name):
    assert read(f"{name},prompt_tokens,output_tokens\n1,2,3\n", "csv").prompt_tokens.tolist() == [2]


@pytest.mark.parametrize(("own", "other"), [*itertools.permutations(FORMATS, 2)])
def test_a_file_of_another_format_is_refused_with_the_name_of_its_own(read, own, other):
    with pytest.raises(ValueError, match=f'trace.*; did you mean format="{own}"\\?'):
        read(FILES[own], other)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("text", ["x" * 100_000, "x," * 100_000, ";" * 100_000, '{"x": [' + "1," * 100_000 + "1]}"])
def test_long_lines_are_shown_in_part(read, format, text):
    for content in (text, FILES[format].splitlines()[0] + "\n" + text):
        with pytest.raises(ValueError, match="trace") as error:
            read(content, format)
        assert len(str(error.value)) < 400


def test_the_rows_that_were_skipped_are_counted_where_none_is_left(read):
    with pytest.raises(ValueError, match="there are no valid rows; 2 malformed ones were skipped"):
        read("prompt_tokens,output_tokens\n0,1\n1,0\n", "csv", "skip")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"/none\.csv can't be read \(No such file or directory\)"):
        read_columns(tmp_path / "none.csv", "csv")
    with pytest.raises(ValueError, match=r"can't be read \(Is a directory\)"):
        read_columns(str(tmp_path), "csv", "skip")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "moncake"}, "format must be one of azure, mooncake, .*got 'moncake'; did you mean mooncake"),
        ({"format": None}, "format must be one of azure, mooncake, .*got None"),
        ({"on_error": "ignore"}, "on_error must be raise or skip, got 'ignore'"),
        ({"id_block_tokens": 16}, "id_block_tokens must be left out where the file has no block_ids, got 16"),
    ],
)
def test_arguments_that_are_refused(read, arguments, message):
    with pytest.raises(ValueError, match=message):
        read(FILES["csv"], **({"format": "csv"} | arguments))


@pytest.mark.parametrize(("value", "allowed"), [(0, ">= 1"), (1.5, "a whole number"), ("16", "a whole number")])
def test_sizes_of_blocks_that_are_refused(read, value, allowed):
    with pytest.raises(ValueError, match=f"id_block_tokens must be {allowed}, got {value!r}"):
        read(PLAIN, "csv", id_block_tokens=value)
    with pytest.raises(ValueError, match="must be left out where the file has ids of 512 tokens, got"):
        read(MOONCAKE, "mooncake", id_block_tokens=value)


@pytest.mark.parametrize("name", ["out.csv", "out.csv.gz"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_plain_csv_reads_back_the_same(read, tmp_path, format, name):
    trace = read(FILES[format], format)
    (tmp_path / name).write_text("an older file")
    write_csv(trace, tmp_path / name)
    assert same(read_columns(tmp_path / name, "csv", id_block_tokens=trace.id_block_tokens or None), trace)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "trace"]


def test_what_is_written(read, tmp_path):
    write_csv(read(PLAIN, "csv", id_block_tokens=64), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes().decode() == (
        "arrived_at,prompt_tokens,output_tokens,max_tokens,class,block_ids\n"
        "0.0,100,5,10,chat,0 1\n"
        '0.19999999999999998,33,7,7,"code, long",0\n'
        "0.6,4,1,2,chat,\n"
    )


@dataclasses.dataclass
class Request:
    """What a row may hold."""

    time: float
    prompt_tokens: int
    output_tokens: int
    more_tokens: int
    label: str
    ids: list[int]


LABELS = st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1).filter(lambda t: t == t.strip())
REQUESTS = st.builds(
    Request,
    time=st.floats(0, 1e9),
    prompt_tokens=st.integers(1000, 2**30),
    output_tokens=st.integers(1, 2**29),
    more_tokens=st.integers(0, 2**29),
    label=LABELS,
    ids=st.lists(st.integers(0, 6), max_size=5),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=12))
def test_any_trace_reads_back_the_same(requests):
    requests.sort(key=lambda request: request.time)
    known_ids = {id_: i for i, id_ in enumerate(dict.fromkeys(id_ for request in requests for id_ in request.ids))}
    known_labels = {label: i for i, label in enumerate(dict.fromkeys(request.label for request in requests))}
    trace = Trace(
        arrived_at=np.array([request.time - requests[0].time for request in requests]),
        prompt_tokens=np.array([request.prompt_tokens for request in requests]),
        output_tokens=np.array([request.output_tokens for request in requests]),
        max_tokens=np.array([request.output_tokens + request.more_tokens for request in requests]),
        block_ids=np.array([known_ids[id_] for request in requests for id_ in request.ids], np.int64),
        block_counts=np.array([len(request.ids) for request in requests]),
        id_block_tokens=200,
        classes=tuple(known_labels),
        class_=np.array([known_labels[request.label] for request in requests]),
        skipped=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_csv(trace, Path(folder) / "trace.csv")
        assert same(read_columns(Path(folder) / "trace.csv", "csv", id_block_tokens=200), trace)


def test_a_long_prompt_beside_a_quoted_label_reads_back(read, tmp_path):
    ids = " ".join(map(str, range(50_000)))
    trace = read(f'prompt_tokens,output_tokens,class,block_ids\n800000,1,"a,b",{ids}\n', "csv", id_block_tokens=16)
    assert len(trace.block_ids) == 50_000
    write_csv(trace, tmp_path / "out.csv")
    assert same(read_columns(tmp_path / "out.csv", "csv", id_block_tokens=16), trace)


def test_what_can_not_be_written(read, tmp_path):
    trace = read(PLAIN, "csv", id_block_tokens=64)
    for label in ("", " a", "a\nb", "a\rb"):
        with pytest.raises(ValueError, match="the label of a class must be one line with no space around it, got "):
            write_csv(trace._replace(classes=(label, "b")), tmp_path / "out.csv")
    with pytest.raises(ValueError, match="there is no folder"):
        write_csv(trace, tmp_path / "none" / "out.csv")
    with pytest.raises(ValueError, match=r"a name that ends in \.csv or \.gz is needed"):
        write_csv(trace, tmp_path / "out.txt")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        write_csv(trace, tmp_path / "folder.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.csv", "trace"]


def test_a_write_that_fails_leaves_the_older_file(read, tmp_path):
    trace = read(PLAIN, "csv", id_block_tokens=64)
    write_csv(trace, tmp_path / "out.csv")
    before = (tmp_path / "out.csv").read_bytes()
    with pytest.raises(ValueError, match="shorter"):
        write_csv(trace._replace(output_tokens=trace.output_tokens[:2]), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "trace"]


def test_a_load_warns_once_of_rows_left_out(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("prompt_tokens,output_tokens\n3,4\n0,5\n5,0\n6,7\n")
    with pytest.warns(
        UserWarning, match=r"trace.csv: malformed rows left out: 2; the first: line 3: prompt_tokens must"
    ):
        load = sim.read_trace(path, on_error="skip")
    again = msgspec.structs.replace(load, rate_scale=2.0)  # warnings are errors here
    assert again.prompt_tokens.array.tolist() == [3, 6]


@pytest.mark.parametrize(
    ("format", "fields", "message"),
    [
        ("azure", {"output_tokens": 5}, "output_tokens must be left out where a file has it, got 5"),
        ("azure", {"prompt_tokens": [1, 2, 3]}, "prompt_tokens must be left out where a file has it, got [1, 2, 3]"),
        ("azure", {"arrived_at": [0, 1, 2]}, "arrived_at must be left out where a file has it, got [0, 1, 2]"),
        ("azure", {"id_block_tokens": 16}, "id_block_tokens must be left out where the file has no block_ids, got 16"),
        ("mooncake", {"id_block_tokens": 16}, "must be left out where the file has ids of 512 tokens, got 16"),
        (
            "mooncake",
            {"block_ids": [[1], [1], [1]]},
            "block_ids must be left out where a file has it, got [[1], [1], [1]]",
        ),
        ("burstgpt", {"class_names": "abc"}, "class_names must be left out where a file has it, got 'abc'"),
    ],
)
def test_what_contradicts_a_file_is_refused(tmp_path, format, fields, message):
    path = tmp_path / "trace"
    path.write_text(FILES[format])
    with pytest.raises(ValueError, match=re.escape(message)):
        sim.read_trace(path, format, **fields)


def test_what_a_file_lacks_may_be_given_beside_it(tmp_path):
    path = tmp_path / "trace"
    path.write_text(VIDUR)
    load = sim.read_trace(path, "vidur", arrived_at=[0, 2.5])
    assert load.arrived_at.array.tolist() == [0, 2.5]
    assert sim.TraceLoadGenerator.from_toml(load.to_toml()) == load


@pytest.mark.parametrize("format", FORMATS)
def test_a_load_is_read_again_from_another_file_alone(tmp_path, format):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text(FILES[format])
    other.write_text(FILES[format].rstrip("\n").rpartition("\n")[0])
    load = sim.read_trace(one, format)
    assert sim.TraceLoadGenerator.from_toml(load.to_toml()) == load
    shorter = msgspec.structs.replace(load, file=str(other))
    assert shorter == msgspec.structs.replace(sim.read_trace(other, format), classes=load.classes)
    one.unlink()
    assert pickle.loads(pickle.dumps(load)) == load
    assert msgspec.structs.replace(load, seed=1).prompt_tokens == load.prompt_tokens


PUBLISHED = [
    # file, format, rows, span [s], (mean, median, 99th percentile, most) of prompt and of output tokens, distinct ids
    ("azure2023_code.csv", "azure", 8819, 3436, (2048, 1469, 7436, 7437), (28, 13, 251, 1899), 0),
    ("azure2023_conv.csv", "azure", 19366, 3502, (1155, 1020, 4142, 14050), (211, 129, 601, 1000), 0),
    (
        "mooncake_conversation.jsonl", "mooncake", 12031, 3537,
        (12035, 6909, 85400, 126195), (343, 350, 1119, 2000), 182_790,
    ),
    ("mooncake_synthetic.jsonl", "mooncake", 3993, 1022, (15325, 11587, 66456, 191378), (149, 69, 768, 893), 43_924),
    (
        "vidur_arxiv_summarization_lengths.csv", "vidur", 28257, None,
        (2588, 2730, 3933, 4054), (291, 167, 3271, 4056), 0,
    ),
]  # fmt: skip


def figures(tokens):
    return tuple(np.round([tokens.mean(), *np.percentile(tokens, [50, 99]), tokens.max()]).astype(int))


@pytest.mark.data
@pytest.mark.skipif("VECSIM_DATA" not in os.environ, reason="VECSIM_DATA is not set")
@pytest.mark.parametrize(
    ("name", "format", "rows", "span", "prompt", "output", "distinct"), PUBLISHED, ids=[row[0] for row in PUBLISHED]
)
def test_published_traces_have_their_known_figures(name, format, rows, span, prompt, output, distinct, tmp_path):
    trace = read_columns(Path(os.environ["VECSIM_DATA"]) / "data" / "traces" / name, format)
    assert trace.skipped == 0
    assert len(trace.prompt_tokens) == rows
    assert figures(trace.prompt_tokens) == prompt
    assert figures(trace.output_tokens) == output
    assert len(np.unique(trace.block_ids)) == trace.block_ids.max(initial=-1) + 1 == distinct
    if span is None:
        assert trace.arrived_at is None
    else:
        assert round(trace.arrived_at[-1]) == span
        assert (np.diff(trace.arrived_at) >= 0).all()
    write_csv(trace, tmp_path / "out.csv.gz")
    assert same(read_columns(tmp_path / "out.csv.gz", "csv", id_block_tokens=trace.id_block_tokens or None), trace)


@pytest.mark.data
@pytest.mark.skipif("VECSIM_DATA" not in os.environ, reason="VECSIM_DATA is not set")
def test_times_of_published_traces():
    folder = Path(os.environ["VECSIM_DATA"]) / "data" / "traces"
    between = np.diff(read_columns(folder / "azure2023_code.csv", "azure").arrived_at)
    assert between.std() / between.mean() == pytest.approx(13.2, abs=0.05)
    between = np.diff(read_columns(folder / "azure2023_conv.csv", "azure").arrived_at)
    assert between.std() / between.mean() == pytest.approx(1.09, abs=0.005)
    trace = read_columns(folder / "mooncake_conversation.jsonl", "mooncake")
    assert len(np.unique(trace.arrived_at)) == 1180
    # A block is a hit if it came before in any request: blocks less distinct ones.
    assert 1 - 182_790 / len(trace.block_ids) == pytest.approx(0.366, abs=0.0005)
