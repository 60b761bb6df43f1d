"""Texts on which tokenizers disagree, and a fuzzer that makes more.

Knows what has tripped tokenizers: scripts, combining marks, digits, white space, contractions, look-alikes of
special tokens, code points of many Unicode versions. Deliberately does not know any tokenizer.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator

TEXTS: tuple[str, ...] = (
    "",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    "\r\n\r\n  \r\n",
    "\t\n",
    " \n ",
    "a\n b\n\n  c \n\n\n   d",
    "\tindented\t\ttabs \t mixed",
    "trailing   ",
    "   leading",
    " one space",
    "Hello world",
    " Hello world",
    "Hello, World!",
    " this is 🦙.cpp",
    "w048 7tuijk dsdfhu",
    "нещо на Български",
    "Ελληνικά: γειά σου Κόσμε, άλφα βήτα",
    "Привет, мир! Съешь ещё этих мягких французских булок, да выпей чаю",
    "مرحبا بالعالم ١٢٣٤٥ العَرَبِيَّة",
    "שָׁלוֹם עוֹלָם, שלום עולם",
    "नमस्ते दुनिया १२३४ क्षत्रिय",
    "สวัสดีชาวโลก ๑๒๓ กำลัง",
    "កាន់តែពិសេសអាចខលចេញ",
    "你好,世界!我想在apple工作1314151天~",
    "こんにちは世界。カタカナ ﾊﾝｶｸ",
    "안녕하세요 세계 ᄒᆞᆫ글",
    "Thí́s ís ćombínińg: e\u0301 a\u0308 o\u0302\u0323 Z̸̢̛a͝l͠g̴o",
    "naïve café coöperate Straße ĲSSEL ﬁﬂ ǅ ŉ",
    "🚀 (normal) 😶‍🌫️ (multiple emojis concatenated) ✅ (only emoji that has its own token)",
    "👨‍👩‍👧‍👦 👩🏽‍🚀 🏳️‍🌈 🇩🇪🇫🇷🇯🇵 ☝🏿 1️⃣2️⃣ ©®™",
    "I've don't can't we'll they're I'm he'd it's you'Ve",
    "I'VE DON'T CAN'T WE'LL THEY'RE I'M HE'D IT'S",
    "'s't're've'm'll'd 'S'T'RE'VE'M'LL'D '' ''' 'x 'rE 'Ll",
    "'ſ 'ſt don'ſ K 'ⅿ İ'ı ’s ’ll",
    "1 12 123 1234 12345 123456 1234567 12345678 3333 33333333333",
    "1,234.56 -7e10 0x1F 3.14159 ½ ⅓ ² ³ ₄ Ⅷ ⅻ 〇 一二三 ௧௨ 𝟘𝟙𝟚 ①⑳ ٠١٢ ०१२",
    "9.9.9 a1b2c3 1a 1st 2nd v2.0.1-rc3+build.5",
    "!!!!!!?????....,,,,;;;;::::----____====++++####@@@@$$$$%%%%^^^^&&&&****(((())))",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "<s>[INST] hi [/INST] there</s><unk> <s> </s>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "<|endoftext|> <|endoftext|><|endoftext|>x",
    "<|user|>\nHi<|end|>\n<|assistant|>   \n  Hello<|end|> x <|system|>\t y",
    "<|im_start|><|im_sta <|im_start| > <|IM_START|> |im_start|> <|im_start|>>",
    "<start_of_turn>user\nhi<end_of_turn>\n<bos><eos><pad>",
    "<0x0A> <0xFF> <0x41> ▁▁ ▁a a▁b Ġ Ċ ĠHello",
    "def f(x):\n    return {'a': x**2, \"b\": [i for i in range(10)]}  # comment\n\n\tif x:\n\t\tpass\n",
    "#include <stdio.h>\r\nint main(void) {\r\n\treturn 0;\r\n}\r\n",
    "for(i=0;i<n;++i){a[i]+=b[i]*c->d;}/* x */ && || != <= >= << >> :: ->",
    "SELECT * FROM `t` WHERE x='it''s' AND y<>1;--c",
    '{"key": "va\\"lue", "n": [1, 2.5, null, true], "u": "\\u00e9"}',
    "https://example.com/a/b?c=d&e=f#g user@host.org C:\\Users\\x /usr/bin/env",
    "camelCase snake_case SCREAMING_CASE kebab-case PascalCase XMLHttpRequest",
    "no\u00a0break\u2003em\u2009thin\u3000wide\u2028line\u2029para\u0085nel\u200bzero\ufeffbom\u180emvs\u1680ogham",
    "\u00a0\u00a0 \u2003\u2003x \u3000\u3000\n\u0085\u0085y \u2028\n",
    "\x00 nul\x00\x00 \x01\x02\x1b[31m \x7f \x1c\x1d\x1e\x1f x\x0b\x0c y",
    "\ufffd\ufffd \ufffe \uffff \U0010ffff \ue000 \U000e0001",
    "\u0378 \u0530 \U0001fae8 \U0001f6dc \U000323af \u2ff1",
    "a" * 300,
    " " * 300,
    "\n" * 100,
    "ab" * 150,
    "=" * 200 + "-" * 77,
    "aaaa aaa aa a aaaaaaa AAAA AaAaAa",
    "     x      y       z",
    "x\n     \n   \ny",
    "你" * 50 + "。" * 20,
    "Ünïcödé " * 20,
    "🙂" * 40,
    "ⓐⓑ ⒜ ㊀ ㈠ ℃ № ℡ ﷺ ꙮ 𓀀 𝕳𝖊𝖑𝖑𝖔 𐍈 𠜎𠜱",
    "mixed文字混在 english日本語 текст한국어 ελ",
    "The year 2024年12月31日, 5000₽ €100 £5 ¥3",
    "¿Qué? ¡Sí! «quote» „low“ ‚x‘ ‹y› … – — ―",
    "a.b,c;d:e!f?g a . b , c ; d : e ! f ? g",
    "x ' y '' z 's ' t",
    "'\n's 's\n ' 's\t'",
    "I 'll  'd   've\n'm",
    "\n 1\n  2\n   3 \n\n4",
    "1\u00a02\u20033 \u0661\u0662\u0663\u0664",
    "é\u0301\u0301 \u0301alone \u0301 \u20ddx \u200d \u200djoin",
    "ⅷⅸ ⅷ1 1ⅷ ²1 1² ½a a½ 1/2",
)

_POOLS: tuple[str, ...] = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    " \t\n\r\x0b\x0c\u00a0\u2003\u3000\u0085\u2028",
    "0123456789٠١٢०१½²Ⅷ",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "'sStTrReEvVmMlLdD ",
    "éèüößñçÀÉαβγабвАБВאבעבرحبनमสวัส你好世界日本語한국어",
    "\u0301\u0308\u0323\u200d\ufe0f\u200b",
    "😀🚀👨👩👧🇩🇪🏽☝",
)
_PHRASES: tuple[str, ...] = (
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<|eot_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<unk>",
    "<|user|>",
    "the ",
    " hello",
    "'ll",
    "'RE",
    "   ",
    "\n\n",
    "\r\n",
    "▁",
    "<0x0A>",
    "1234",
)


def fuzz(count: int, seed: int = 0) -> Iterator[str]:
    """`count` random texts: mixtures of the pools, phrases and code points of all planes."""
    rng = random.Random(seed)
    for _ in range(count):
        pools = rng.sample(_POOLS, rng.randint(1, 4))
        parts = []
        for _ in range(rng.randint(1, 40)):
            kind = rng.random()
            if kind < 0.75:
                parts.append(rng.choice(rng.choice(pools)))
            elif kind < 0.87:
                parts.append(rng.choice(_PHRASES))
            else:
                point = rng.randrange(rng.choice((0x80, 0x800, 0x3000, 0x10000, 0x32000, 0x110000)))
                # Engines have tables of different Unicode versions, so only characters that all of them know are used.
                parts.append(chr(point) if unicodedata.category(chr(point)) not in ("Cn", "Cs") else "\ufffd")
        yield "".join(parts)
