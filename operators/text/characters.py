"""Classes of Unicode code points as one table, so that kernels classify a character with one lookup.

The table covers U+0000 to U+3347F, which holds every letter that Unicode defines; code points above (private use, tags,
variation selectors) have no class.
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np

SPACE = 1  # str.isspace
ALPHA = 2  # str.isalpha
SYMBOL = 4  # datatrove's PUNCTUATION_SET: a word of nothing else is no word for Gopher's word count
DIGIT = 8  # 0-9
UPPER = 16  # upper case, or a letter of a script without case
LOWER = 32  # lower case, or a letter of a script without case
HAN = 64  # Chinese characters, U+3005 and U+3007 included
KANA = 128
UNSPACED = 256  # other scripts written without spaces: Thai, Lao, Khmer, Burmese, Tibetan, ...
HANGUL = 512
AFFIX = 1024  # one character that English tokenisation splits off at either end of a word
PREFIX = 2048  # ... only at the start
QUOTE = 4096
CURRENCY = 8192
ICON = 16384  # category So, but for the degree sign
TERMINAL = 32768  # ends a sentence in some script
MARK = 65536  # combining marks (Mn, Mc, Me)
PUNCT_BEFORE_DOT = 131072  # a full stop after one of these is split off
PUNCTUATION = 262144  # Unicode category P

TABLE_SIZE = 0x33480

_TERMINAL = (
    "!.?\u0589\u061d\u061e\u061f\u06d4\u0700\u0701\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965\u104a\u104b\u1362\u1367\u1368"
    "\u166e\u1735\u1736\u17d4\u17d5\u17d6\u17d9\u17da\u1803\u1809\u1944\u1945\u1aa8\u1aa9\u1aaa\u1aab\u1b5a\u1b5b\u1b5e\u1b5f\u1b7d\u1b7e"
    "\u1c3b\u1c3c\u1c7e\u1c7f\u203c\u203d\u2047\u2048\u2049\u2e2e\u2e3c\u2e53\u2e54\u3002\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877"
    "\ua8ce\ua8cf\ua92f\ua9c8\ua9c9\uaa5d\uaa5e\uaa5f\uaaf0\uaaf1\uabeb\ufe52\ufe56\ufe57\uff01\uff0e\uff1f\uff61\U00010a56"
    "\U00010a57\U00010f55\U00010f56\U00010f57\U00010f58\U00010f59\U00010f86\U00010f87\U00010f88\U00010f89\U00011047\U00011048"
    "\U000110be\U000110bf\U000110c0\U000110c1\U00011141\U00011142\U00011143\U000111c5\U000111c6\U000111cd\U000111de\U000111df"
    "\U00011238\U00011239\U0001123b\U0001123c\U000112a9\U0001144b\U0001144c\U000115c2\U000115c3\U000115c9\U000115ca\U000115cb"
    "\U000115cc\U000115cd\U000115ce\U000115cf\U000115d0\U000115d1\U000115d2\U000115d3\U000115d4\U000115d5\U000115d6\U000115d7"
    "\U00011641\U00011642\U0001173c\U0001173d\U0001173e\U00011944\U00011946\U00011a42\U00011a43\U00011a9b\U00011a9c\U00011c41"
    "\U00011c42\U00011ef7\U00011ef8\U00011f43\U00011f44\U00016a6e\U00016a6f\U00016af5\U00016b37\U00016b38\U00016b44\U00016e98"
    "\U0001bc9f\U0001da88"
)
_SYMBOLS = "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»" + "".join(
    chr(x) for low, high in ((0, 9), (11, 13), (13, 32), (127, 160)) for x in range(low, high)
)
_PUNCT = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
_QUOTES = "'\"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉⟦⟧"
_CURRENCY = "$£€¥฿₽﷼₴₠₡₢₣₤₥₦₧₨₩₪₫₭₮₯₰₱₲₳₵₶₷₸₹₺₻₼₾₿"
_UNSPACED = ((0xE00, 0xE7F), (0xE80, 0xEFF), (0xF00, 0xFFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x19E0, 0x19FF),
             (0x1950, 0x19DF), (0x1A20, 0x1AAF), (0xA9E0, 0xA9FF), (0xAA60, 0xAADF))  # fmt: skip
_HAN = ((0x3005, 0x3005), (0x3007, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))
_KANA = ((0x3041, 0x309F), (0x30A1, 0x30FA), (0x30FC, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9D), (0x1B000, 0x1B16F))
_HANGUL = ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF))


@functools.cache
def table() -> np.ndarray:
    """uint32[TABLE_SIZE], the classes of each code point as bits. Built once a process (about 0.1 s)."""
    flags = np.zeros(TABLE_SIZE, np.uint32)
    for point in range(TABLE_SIZE):
        category = unicodedata.category(chr(point))
        if category[0] == "L":
            cased = category in ("Lu", "Ll", "Lt")
            flags[point] = ALPHA | (0 if cased and category == "Ll" else UPPER) | (0 if category in ("Lu", "Lt") else LOWER)
        elif category[0] == "M":
            flags[point] = MARK
        elif category == "So" and point != 0xB0:
            flags[point] = ICON | AFFIX
        elif category[0] == "P":
            flags[point] = PUNCTUATION
    for point in (
        *range(9, 14),
        *range(28, 33),
        0x85,
        0xA0,
        0x1680,
        *range(0x2000, 0x200B),
        0x2028,
        0x2029,
        0x202F,
        0x205F,
        0x3000,
    ):
        flags[point] |= SPACE
    flags[48:58] |= DIGIT
    for ranges, bit in ((_HAN, HAN), (_KANA, KANA), (_UNSPACED, UNSPACED), (_HANGUL, HANGUL)):
        for low, high in ranges:
            flags[low : high + 1] |= bit
    for characters, bits in (
        (_SYMBOLS + _TERMINAL, SYMBOL),
        (_TERMINAL, TERMINAL),
        (_PUNCT, AFFIX | PUNCT_BEFORE_DOT),
        (_QUOTES, AFFIX | QUOTE | PUNCT_BEFORE_DOT),
        ("—–", AFFIX),
        ("§%=", PREFIX),
        (_CURRENCY, PREFIX | CURRENCY),
        ("%²-+|", PUNCT_BEFORE_DOT),
    ):
        for character in characters:
            flags[ord(character)] |= bits
    flags.setflags(write=False)
    return flags
