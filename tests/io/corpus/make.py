#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the corpus of the readers: small safetensors files and JSON texts, each with its verdict.

    python3 tests/io/corpus/make.py

files/NAME.safetensors and verdicts.txt ("accept NAME" or "refuse NAME | part of the message"): for every rule of
docs/formats.md at least two breaches and a good neighbour. json_cases.txt: "accept" or "refuse" and the text in hexadecimal.
Nothing here is random: the same files every time.
"""
import json
import pathlib
import shutil
import struct

HERE = pathlib.Path(__file__).parent
FILES = HERE / "files"
verdicts = []


def write(name, data, refuse=None):
    (FILES / f"{name}.safetensors").write_bytes(data)
    verdicts.append(f"refuse {name} | {refuse}" if refuse else f"accept {name}")


def whole(header, data=b"", pad=True):
    if isinstance(header, str):
        header = header.encode()
    if pad:
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def entry(name="t", dtype="U8", shape="[1]", offsets="[0,1]", more=""):
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{more}}}'


def one(data=b"\1", **kw):
    return whole("{" + entry(**kw) + "}", data)


BITS = dict(BOOL=8, F4=4, F6_E2M3=6, F6_E3M2=6, U8=8, I8=8, F8_E5M2=8, F8_E4M3=8, F8_E8M0=8, F8_E4M3FNUZ=8, F8_E5M2FNUZ=8,
            I16=16, U16=16, F16=16, BF16=16, I32=32, U32=32, F32=32, C64=64, F64=64, I64=64, U64=64)


def files():
    # 1: eight bytes of length
    write("r01_empty", b"", "8 bytes of header length")
    write("r01_seven", b"\2\0\0\0\0\0\0", "8 bytes of header length")
    write("r01_good_no_tensor", whole("{}", pad=False))
    # 2: the largest header
    write("r02_one_too_many", struct.pack("<Q", 100_000_001) + b"{}", "at most 100000000")
    write("r02_huge", struct.pack("<Q", 2**64 - 1) + b"{}", "at most 100000000")
    write("r02_top_bit", struct.pack("<Q", 2**63) + b"{}", "at most 100000000")
    write("r02_good_padded", whole("{}" + " " * 4096))
    # 3: the header lies inside the file
    write("r03_one_short", struct.pack("<Q", 3) + b"{}", "2 bytes left")
    write("r03_no_header", struct.pack("<Q", 2), "0 bytes left")
    write("r03_just_below_the_limit", struct.pack("<Q", 100_000_000) + b"{}", "2 bytes left")
    write("r03_zero", struct.pack("<Q", 0), "strict JSON")
    write("r03_good", struct.pack("<Q", 2) + b"{}")
    # 4: UTF-8
    for name, text in dict(overlong=b"\xc0\xaf", overlong3=b"\xe0\x80\xaf", overlong4=b"\xf0\x80\x80\xaf", lone=b"\x80",
                           surrogate=b"\xed\xa0\x80", beyond=b"\xf4\x90\x80\x80", cut=b"\xe2\x82", latin=b"\xe9",
                           ff=b"\xff").items():
        write(f"r04_{name}", whole(b"{" + entry().encode().replace(b'"t"', b'"' + text + b'"') + b"}", b"\1"), "UTF-8")
    for name, text in dict(two="é", three="€", four="😀", del_="\x7f", last="\U0010ffff").items():
        write(f"r04_good_{name}", one(name=text))
    # 5: strict JSON
    body = entry()
    for name, text in dict(bom="\ufeff{" + body + "}", comment="{" + body + "}/**/", trailing_comma="{" + body + ",}",
                           twice="{" + body + "}{}", junk="{" + body + "}x", cut="{" + body, single="{'t':1}",
                           nan="{" + entry(shape="[NaN]") + "}", leading_zero="{" + entry(shape="[01]") + "}",
                           plus="{" + entry(shape="[+1]") + "}", no_comma="{" + entry(shape="[1 1]") + "}",
                           control="{" + entry(name="a\tb") + "}", escape="{" + entry(name="\\x41") + "}",
                           lone_high="{" + entry(name="\\ud800") + "}", lone_low="{" + entry(name="\\udc00") + "}",
                           nul_padding="{" + body + "}\0\0\0", nul_inside="{\0" + body + "}", blank="   ",
                           colon="{" + body.replace(":", " ", 1) + "}", hex="{" + entry(shape="[0x1]") + "}").items():
        write(f"r05_{name}", whole(text, b"\1", pad=False), "strict JSON")
    for name, text in dict(array="[]", null="null", number="7", text='"t"').items():
        write(f"r05_root_{name}", whole(text), "a JSON object")
    write("r05_good_spaces", whole(" \t\r\n{ " + body + " } \n", b"\1"))
    write("r05_good_escapes", one(name="\\u0074\\ud83d\\ude00\\n\\/"))
    # 6: blanks before the header
    write("r06_vertical_tab", whole("\v{}"), "strict JSON")
    write("r06_no_break_space", whole("\u00a0{}"), "strict JSON")
    write("r06_good_blanks", whole("  \n\t {}"))
    # 7: nesting
    for depth in (31, 33, 200):
        write(f"r07_deep_{depth}", one(more=',"x":' + "[" * depth + "]" * depth), "nested more than 32")
    write("r07_deep_objects", one(more=',"x":' + '{"k":' * 40 + "1" + "}" * 40), "nested more than 32")
    write("r07_good_30", one(more=',"x":' + "[" * 30 + "]" * 30))
    # 8: unsigned integers
    for name, value in dict(negative="-4", fraction="4.0", exponent="4e0", minus_zero="-0", too_large="18446744073709551616",
                            text='"1"', null="null", true="true", object="{}", array="[1]").items():
        write(f"r08_shape_{name}", one(shape=f"[{value}]"), "unsigned integers")
        write(f"r08_offset_{name}", one(offsets=f"[0,{value}]"), "unsigned integers")
    write("r08_three_offsets", one(offsets="[0,1,2]"), "two data_offsets")
    write("r08_one_offset", one(offsets="[0]"), "two data_offsets")
    write("r08_no_offsets", one(offsets="[]"), "two data_offsets")
    write("r08_shape_2_63", one(shape="[9223372036854775808]"), "below 2^63")
    write("r08_good_zero", one(b"", shape="[0]", offsets="[0,0]"))
    write("r08_good_scalar", one(shape="[]"))
    # 9: dtypes
    for dtype in ("f32", "F33", "FLOAT32", "", " F32", "F8"):
        write(f"r09_{dtype.strip() or 'empty'}{'_space' if dtype != dtype.strip() else ''}", one(dtype=dtype), "a dtype this reader knows")
    for dtype, bits in BITS.items():
        write(f"r09_good_{dtype}", one(b"\0" * bits, dtype=dtype, shape="[8]", offsets=f"[0,{bits}]"))
    # 10: no hole, no overlap
    def pair(first, second, data):
        return whole("{" + entry("a", "U8", f"[{first[1]-first[0]}]", f"[{first[0]},{first[1]}]") + "," +
                     entry("b", "U8", f"[{second[1]-second[0]}]", f"[{second[0]},{second[1]}]") + "}", b"\0" * data)
    write("r10_hole", pair((0, 2), (3, 5), 5), "a hole in the data")
    write("r10_overlap", pair((0, 3), (2, 5), 5), "two tensors share bytes")
    write("r10_same", pair((0, 2), (0, 2), 2), "two tensors share bytes")
    write("r10_begins_late", pair((1, 2), (2, 4), 4), "a hole in the data")
    write("r10_inside", pair((0, 8), (2, 4), 8), "two tensors share bytes")
    write("r10_empty_inside", whole("{" + entry("a", "U8", "[4]", "[0,4]") + "," + entry("b", "U8", "[0]", "[2,2]") + "}",
                                    b"\0" * 4), "two tensors share bytes")
    write("r10_good", pair((0, 2), (2, 5), 5))
    write("r10_good_reversed", pair((3, 5), (0, 3), 5))
    write("r10_good_empty_between", whole("{" + entry("a", "U8", "[2]", "[0,2]") + "," + entry("b", "U8", "[0]", "[2,2]") + "," +
                                          entry("c", "U8", "[1]", "[2,3]") + "}", b"\0" * 3))
    # 11: no overflow
    write("r11_product", one(b"\0" * 8, shape="[4294967296,4294967296]", offsets="[0,8]"), "overflows 64 bits")
    write("r11_bits", one(b"\0" * 8, dtype="F64", shape="[2305843009213693952]", offsets="[0,8]"), "overflows 64 bits")
    write("r11_wraps_to_eight", one(b"\0" * 8, shape="[4294967297,4294967288]", offsets="[0,8]"), "overflows 64 bits")
    write("r11_good_zero_last", one(b"", shape="[4294967296,4294967296,0]", offsets="[0,0]"))
    write("r11_good_zero_first", one(b"", shape="[0,4294967296,4294967296]", offsets="[0,0]"))
    # 12: whole bytes
    write("r12_f4", one(dtype="F4", shape="[1]"), "ends inside a byte")
    write("r12_f6", one(b"\0" * 2, dtype="F6_E2M3", shape="[3]", offsets="[0,2]"), "ends inside a byte")
    write("r12_good_f4", one(dtype="F4", shape="[2]"))
    write("r12_good_f6", one(b"\0" * 3, dtype="F6_E3M2", shape="[4]", offsets="[0,3]"))
    # 13: bytes fit the shape
    write("r13_too_few", one(b"\0" * 3, dtype="F32", shape="[1]", offsets="[0,3]"), "4 bytes for F32 [1]")
    write("r13_too_many", one(b"\0" * 5, dtype="F32", shape="[1]", offsets="[0,5]"), "4 bytes for F32 [1]")
    write("r13_reversed", one(b"\0", offsets="[1,0]"), "begin before they end")
    write("r13_scalar", one(b"\0" * 8, dtype="F32", shape="[]", offsets="[0,8]"), "4 bytes for F32 []")
    write("r13_zero_with_bytes", one(b"\0", shape="[0,5]"), "0 bytes for U8 [0, 5]")
    write("r13_good", one(b"\0" * 24, dtype="F64", shape="[3]", offsets="[0,24]"))
    # 14: the data ends with the file
    write("r14_one_missing", one(b"\0" * 3, shape="[4]", offsets="[0,4]"), "1 bytes missing")
    write("r14_all_missing", one(b"", shape="[4]", offsets="[0,4]"), "4 bytes missing")
    write("r14_trailing", one(b"\0" * 9, shape="[8]", offsets="[0,8]"), "1 bytes too many")
    write("r14_trailing_no_tensor", whole("{}", b"\0" * 9), "9 bytes too many")
    write("r14_uncounted_padding", whole("{" + entry(shape="[8]", offsets="[0,8]") + "}", b"", pad=False) +
          b"\0" * (-len("{" + entry(shape="[8]", offsets="[0,8]") + "}") % 8) + b"\1" * 8, "uncounted header padding")
    write("r14_far_end", one(b"\0" * 8, shape="[9223372036854775807]", offsets="[0,9223372036854775807]"), "overflows 64 bits")
    write("r14_good", one(b"\0" * 8, shape="[8]", offsets="[0,8]"))
    # 15: metadata
    for name, text in dict(number='{"a":1}', null_value='{"a":null}', object='{"a":{}}', array="[]", text='"pt"', true="true",
                           nested='{"a":["b"]}').items():
        write(f"r15_{name}", whole('{"__metadata__":' + text + "}"), "__metadata__")
    write("r15_twice", whole('{"__metadata__":{},"__metadata__":{}}'), "it twice")
    write("r15_key_twice", whole('{"__metadata__":{"a":"1","a":"2"}}'), "it twice")
    for name, text in dict(text='{"format":"pt"}', empty="{}", null="null").items():
        write(f"r15_good_{name}", whole('{"__metadata__":' + text + "}"))
    # where the reference is laxer than its description
    write("r16_name_twice", whole("{" + entry() + "," + entry() + "}", b"\1"), "it twice")
    write("r16_name_twice_escaped", whole("{" + entry() + "," + entry("\\u0074", offsets="[1,2]") + "}", b"\1\2"), "it twice")
    write("r16_field_twice", whole('{"t":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\1"), "it twice")
    write("r16_other_field_twice", one(more=',"x":1,"x":2'), "it twice")
    write("r16_positional", whole('{"t":["U8",[1],[0,1]]}', b"\1"), "an object with dtype")
    write("r16_no_dtype", whole('{"t":{"shape":[1],"data_offsets":[0,1]}}', b"\1"), "the field dtype")
    write("r16_no_shape", whole('{"t":{"dtype":"U8","data_offsets":[0,1]}}', b"\1"), "the field shape")
    write("r16_no_offsets", whole('{"t":{"dtype":"U8","shape":[1]}}', b"\1"), "the field data_offsets")
    write("r16_good_other_fields", one(more=',"x":1.5,"y":{"x":[null,-2,"x"]}'))
    write("r16_good_empty_name", one(name=""))
    write("r16_good_nul_in_name", one(name="a\\u0000b"))


def json_cases():
    good, bad = [], []
    for v in ["0", "-0", "1", "-1", "10", "123456789012345678", "18446744073709551615", "18446744073709551616",
              "-9223372036854775808", "-9223372036854775809", "0.0", "0.5", "-0.5", "1.25e3", "1E3", "1e+3", "1e-3", "-1.5E-10",
              "0e0", "0E+0", "1.7976931348623157e308", "5e-324", "1" + "0" * 100, "0." + "0" * 100 + "1", "123.456e-7"]:
        good += [v, f"[{v}]", f'{{"a":{v}}}', f" {v} ", f"[{v},{v}]"]
    for v in ["+1", "01", "-01", "00", "1.", ".5", "-.5", "1e", "1e+", "1E-", "0x10", "1_000", "NaN", "Infinity", "-Infinity", "-",
              "--1", "1.2.3", "1e1.5", "0b1", "1,5", "1 2", "0.e1", "2.e3", "-Inf", "1a", "0a", "1e5e5", "1e999", "\uff11"]:
        bad += [v, f"[{v}]", f'{{"a":{v}}}'] if "," not in v else [v]
    for s in ["", "a", "a b", "\\n\\r\\t\\b\\f", '\\"', "\\\\", "\\/", "\\u0041", "\\u00e9", "\\u20AC", "\\ud83d\\ude00", "\\uDBFF\\uDFFF",
              "\\u0000", "é", "€", "😀", "\x7f", "\u2028", "\ufffe", "a" * 300, "12345678", "1234567\\n", "1234567é", "///", "{}[],:"]:
        good += [f'"{s}"', f'["{s}"]', f'{{"{s}":1}}']
    for s in ["\\x41", "\\u12", "\\u123g", "\\", "\\a", "\\'", "\\0", "\\ud800", "\\udc00", "\\ud800\\ud800", "\\ud800x", "\\uD83D\\u0041",
              "\\U0041", "\t", "\n", "\x01", "\x1f", "\0", "\\u", "\\ud83d\\"]:
        bad += [f'"{s}"', f'["a{s} "]', f'{{"{s}":1}}']
    bad += ['"', '"a', '["', '"a\\"', "'a'", '"a"b', '"a" "b"', "`a`"]
    good += ["[]", "{}", "[[]]", "[{}]", '{"a":{}}', '{"a":[]}', '{"a":[1,{"b":null}]}', "[true,false,null]", " [ ] ", "\t{\n}\r",
             '{"a":1,"b":2}', "[" * 32 + "]" * 32, '{"a":' * 31 + "1" + "}" * 31, "null", "true", "false", "[1,[2,[3,[4]]]]"]
    bad += ["", " ", "[", "]", "{", "}", "[1,]", "[,1]", "[,]", "[1,,2]", '{"a"}', '{"a":}', '{"a":1,}', "{,}", '{"a":1,,"b":2}', "{1:2}",
            "{a:1}", "{'a':1}", '{"a":1 "b":2}', '{"a",1}', "[1 2]", "[1;2]", "[1}", '{"a":1]', "nul", "nulll", "True", "TRUE", "tru",
            "undefined", "[]]", "{}}", "[][]", "{}{}", "1 1", "[]x", "[//\n]", "/**/[]", "[]/**/", "#[]", "[1,2,", '{"a":[', "[" * 33 + "]" * 33,
            "[" * 5000, '{"a":' * 5000, "\ufeff[]", "\u00a0[]", "\v[]", "\f[]", "[\u2028]", "[]\0", "\0[]", "[\0]", "[1,\x00 2]", "()", "<a>",
            "%5B%5D", '{"a":1}\x00', ",", ":", '":"', "[:]", "[1:2]", '{"a"::1}', '{:1}', '{"a":1,"b"}', "nan", "- 1", "1 .5", "[-]", "tRue"]
    bad_bytes = [b'"\x80"', b'"\xc0\xaf"', b'"\xe0\x9f\xbf"', b'"\xed\xa0\x80"', b'"\xf0\x8f\xbf\xbf"', b'"\xf4\x90\x80\x80"', b'"\xc3"',
                 b'"\xe2\x82"', b'"\xf0\x9f\x98"', b'"\xff"', b'"\xfe"', b"\xff\xfe[\0]\0", b"\xe9", b"[\xc3\xa9]", b'"\xc3\x28"',
                 b'"\xe2\x28\xa1"', b'"\xf8\x88\x80\x80\x80"']
    cases = [("accept", t.encode()) for t in good] + [("refuse", t.encode()) for t in bad if t != '":"'] + \
            [("refuse", t) for t in bad_bytes] + [("accept", b'":"')]
    # Python agrees wherever it is as strict.
    laxer = (b"NaN", b"Infinity", b"\\ud8", b"\\udc", b"\\uD8", b"1e999", b"[[[[[[", b'{"a":{"a":{"a":')
    for verdict, text in cases:
        try:
            json.loads(text.decode())
            accepted = True
        except (ValueError, RecursionError):
            accepted = False
        assert accepted == (verdict == "accept") or any(x in text for x in laxer) or text.startswith(b"\xef\xbb\xbf"), (verdict, text)
    return sorted(set(cases))


def main():
    shutil.rmtree(FILES, ignore_errors=True)
    FILES.mkdir()
    files()
    (HERE / "verdicts.txt").write_text("\n".join(verdicts) + "\n")
    cases = json_cases()
    (HERE / "json_cases.txt").write_text("".join(f"{v} {t.hex()}\n" for v, t in cases))
    print(len(verdicts), "files,", len(cases), "texts")


main()
