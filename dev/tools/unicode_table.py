#!/usr/bin/env python3
"""Writes keel/unicode.h: the letters, numbers and white space of Unicode, which the splits of tokenizers ask for.

    python3 dev/tools/unicode_table.py > keel/unicode.h

Needs Unicode 16.0's data, that of tiktoken 0.14 and tokenizers 0.23: Python 3.14, or pip install unicodedata2==16.0.0.
"""

import sys
import unicodedata

if unicodedata.unidata_version != "16.0.0":
    try:
        import unicodedata2 as unicodedata
    except ImportError:
        pass
if unicodedata.unidata_version != "16.0.0":
    sys.exit(f"expected Unicode 16.0.0, found Python's {unicodedata.unidata_version}: pip install unicodedata2==16.0.0")

# White_Space (PropList.txt) is the categories Zs, Zl and Zp and these controls.
CONTROLS = {0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x85}
CLASSES = {
    "letter_ranges": ("L*: letters", lambda code, category: category[0] == "L"),
    "number_ranges": ("N*: numbers", lambda code, category: category[0] == "N"),
    "space_ranges": ("White_Space", lambda code, category: category[0] == "Z" or code in CONTROLS),
}


def ranges(belongs):
    """[(first, last)] of the code points that belong to a class"""
    found = []
    for code in range(0x110000):
        if not belongs(code, unicodedata.category(chr(code))):
            continue
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return found


print(f"""\
// keel/unicode.h: classes of characters of Unicode {unicodedata.unidata_version}, by dev/tools/unicode_table.py from Python's unicodedata.
#pragma once

#include <cstdint>

struct CodeRange {{ uint32_t first, last; }};  // code points

// clang-format off""")
for name, (comment, belongs) in CLASSES.items():
    print(f"inline constexpr CodeRange {name}[] = {{  // {comment}")
    line = "   "
    for first, last in ranges(belongs):
        item = f" {{0x{first:X},0x{last:X}}},"
        if len(line + item) > 120:
            print(line)
            line = "   "
        line += item
    print(line + "\n};")
print("// clang-format on")
