"""Converts Chinese text by OpenCC; runs in an environment that has it.

python opencc_convert.py < LINES > LINES     # in: [OpenCC's name of a conversion, text] as JSON; out: text as JSON
"""

import functools
import json
import sys

import opencc

converter = functools.cache(opencc.OpenCC)

if __name__ == "__main__":
    for line in sys.stdin:
        name, text = json.loads(line)
        print(json.dumps(converter(name).convert(text)))
