# ruff: noqa: RUF001
"""Some 250 lines of text on which a tokenizer and its copy are prone to differ."""

import itertools
import unicodedata

NUMBERS = [
    *("7", "42", "365", "2024", "65536", "299792", "8675309", "31415926", "271828182", "1" * 23, "0" * 41),
    *(
        "3.14159",
        "1,234,567.89",
        "1.234.567,89",
        "1 234 567",
        "12'345'678",
        "-273.15",
        "+1",
        ".5",
        "5.",
        "1..2",
        "1,,2",
    ),
    *("6.022e23", "1E-9", "0x7fffDEAD", "0b1011", "1_000_000", "007", "12:34:56.789", "2024-02-29T23:59:60Z"),
    *("50%", "$1,299.00", "€9,99", "10°C", "x2y3z4", "a1b22c333d4444", "1st 2nd 3rd 4th", "2¹⁰ = 1024", "½ ⅓ ¾ 5⅞"),
    *(
        "Ⅷ ⅻ ⓽ ⑳ 〇",
        "٠١٢٣٤٥٦٧٨٩",
        "१२३४५६७८९०",
        "๑๒๓๔๕",
        "１２３４５６",
        "𝟘𝟙𝟚𝟛𝟜",
        "一二三四五六七八九十百千万",
        "12 345",
    ),
]
SPACES = [
    *(f"a{' ' * count}b" for count in (2, 3, 4, 5, 8, 16, 33)),
    *(
        " leading",
        "   three leading",
        "trailing ",
        "trailing   ",
        " ",
        "    ",
        "\t",
        "\t\t\tthree tabs",
        "a\tb\t\tc \t d",
    ),
    *(
        "line\nline",
        "line\r\nline",
        "line\rline",
        "\n",
        "\n\n\n",
        "\r\n\r\n",
        "a\n\n\nb",
        "a \n b",
        "a\n  \n\tb",
        "x \r\n\t y  ",
    ),
    *(
        "end.\n\n\nStart",
        "tail\n ",
        "tail \n",
        " \n \n ",
        "\x0b\x0c vertical",
        "one\u00a0two\u00a0\u00a0three",
        "thin\u2009space\u200ahair",
    ),
    *(
        "ideographic\u3000space\u3000\u3000",
        "\u2028line\u2029paragraph",
        "next\x85line",
        "  12  34  ",
        "x  1",
        "(  )  [   ]",
    ),
]
EMOJI = [
    *(
        "😀",
        "😀😃😄😁",
        "a😀b",
        "👍🏻👍🏼👍🏽👍🏾👍🏿",
        "👩‍👩‍👧‍👦 and 👨🏽‍🚀",
        "🏳️‍🌈🏴‍☠️",
        "🇩🇪🇫🇷🇯🇵",
        "1️⃣2️⃣#️⃣",
        "❤️ vs ❤",
        "☺︎☺️",
        "🤷🏿‍♀️!?",
    ),
    *("text🎉🎉text", "🧑‍💻: print('🐍')", "🫠🫡🫥", "♟️♔♕", "🀄🃏"),
]
SCRIPTS = [
    *("مرحبا بالعالم، كيف حالك؟", "السَّلَامُ عَلَيْكُمْ", "قیمت ۱۲۳ تومان است", "שלום עולם", "בְּרֵאשִׁית בָּרָא", "‏rtl‎ ltr"),
    *("नमस्ते दुनिया", "क्षत्रिय ज्ञान श्रृंखला", "বাংলা ভাষা", "தமிழ் எழுத்து", "తెలుగు", "ಕನ್ನಡ", "മലയാളം", "ਪੰਜਾਬੀ", "සිංහල"),
    *("สวัสดีชาวโลก", "ภาษาไทยไม่มีช่องว่างระหว่างคำ", "ສະບາຍດີ", "မြန်မာဘာသာ", "ភាសាខ្មែរ", "བོད་སྐད་"),
    *(
        "你好，世界！",
        "敏捷的棕色狐狸跳過懶狗。",
        "中文English混排123数字",
        "日本語のテキスト、カタカナとひらがな。",
        "ｶﾀｶﾅ ﾊﾝｶｸ",
        "ーーーっっっ",
    ),
    *(
        "안녕하세요 세계",
        "한국어는 띄어쓰기가 있습니다.",
        "ㅋㅋㅋㅋ ㅠㅠ",
        "Привет, мир!",
        "Съешь ещё этих мягких булок",
        "Ђорђе Џајић",
        "ЁЖИК в ТУМАНЕ",
    ),
    *(
        "Γειά σου Κόσμε",
        "ἐν ἀρχῇ ἦν ὁ λόγος",
        "ΣΊΣΥΦΟΣ σίσυφος",
        "გამარჯობა მსოფლიო",
        "Բարեւ աշխարհ",
        "ሰላም ልዑል",
        "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ",
    ),
    *("ᠮᠣᠩᠭᠣᠯ", "𐌲𐌿𐍄𐌹𐍃𐌺", "𓀀𓁐𓃰", "𒀭𒂗𒆤", "𝔉𝔯𝔞𝔨𝔱𝔲𝔯 𝒞𝓊𝓇𝓈𝒾𝓋ℯ", "ＦＵＬＬｗｉｄｔｈ", "𠀀𠜎𡃁𪚥"),
]
LATIN = [
    *(
        "Crème brûlée à la carte",
        "Übergrößenträger",
        "Łódź, Gdańsk, Kraków",
        "İstanbul ılık",
        "Þórður Ævar",
        "Tiếng Việt có dấu",
    ),
    *("ŠĐČĆŽ šđčćž", "naïveté façade", "ﬁ ﬂ ﬀ ligatures", "ªº µ ſtraße ẞ", "ǅ ǈ ǋ", "ʰʷʲ ˈfəʊnɛtɪk"),
]
MARKS = [
    *(
        "zero\u200bwidth\u200bspace",
        "join\u200cer\u200djoin",
        "\ufeffmark first",
        "soft\u00adhyphen",
        "a\u2060b",
        "\u202eoverride\u202c",
    ),
    *(
        "Z\u0335\u0321\u035d\u0348a\u0336l\u0338g\u0337o",
        "e\u20dd x\u0305y\u0305",
        "x\u0302\u0308\u0301",
        "\u0301 alone",
        "q\u0307\u0323",
        "क\u093cि",
    ),
    *(
        "bell\x07 and esc\x1b[31mred\x1b[0m",
        "\x01\x02\x03",
        "del\x7f",
        "\x1cfile\x1dgroup",
        "\x80\x9f",
        "\ue000\ue001\uf8ff private",
    ),
    *("\U000f0000\U0010fffd planes", "\ufffd replacement \ufffc", "\ufe0f\ufe0e", "\U000e0041\U000e0042"),
]
CODE = [
    "def f(x: int) -> list[int]:\n    return [x ** 2 for x in range(10) if x % 2 == 0]",
    "for(int i=0;i<n;++i){a[i]|=b[i]&~c[i]>>3;}",
    "if (x != NULL && *x->y) { /* comment */ goto end; }",
    "SELECT * FROM t WHERE a='it''s' AND b>=10;",
    '{"key": [1, 2.5, null, true], "s": "\\u00e9\\n"}',
    "<div class='a-b_c' id=\"x1\">&nbsp;&lt;</div>",
    "https://user:pw@example.org:8080/a/b-c_d.html?q=1&r=%20x#frag",
    "mailto:first.last+tag@sub.example.co.uk",
    "C:\\Program Files\\x\\y.txt and ../../etc/passwd",
    "$ ls -la | grep '^d' > out.txt 2>&1 && echo done",
    "^(?:[A-Z]{2,}|\\d+)\\s*$",
    "\t\tif err != nil {\n\t\t\treturn nil, err\n\t\t}",
    "camelCaseWord snake_case_word SCREAMING_CASE kebab-case-word XMLHttpRequest",
    "#!/usr/bin/env python3\r\n# -*- coding: utf-8 -*-\r\n",
    "```python\nprint('x')\n```",
    "@@ -1,3 +1,4 @@\n-old\n+new",
]
QUOTES = [
    "I'm you're he's we'll they'd I've don't",
    "I\u2019m you\u2019re he\u2019s we\u2019ll they\u2019d I\u2019ve don\u2019t",
    "I'M YOU'RE HE'S WE'LL THEY'D I'VE DON'T",
    "It'S we'Re 'tis 'twas rock'n'roll o'clock 's'",
    "x'll'll 'ſ 'ſt l'État d'Été",
    "\"'`\u00b4\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb\u2039\u203a",
    "well--known \u2013 en \u2014 em \u2015 bar \u2026 dots... ?!?! !!! ---",
    "¿Qué? ¡No! §5 ¶2 †‡ •◦ ©®™ №",
]
MATHS = [
    *(
        "∀x∈ℝ: ∃y (y² ≥ x)",
        "∑ᵢ₌₁ⁿ i = n(n+1)/2",
        "∫₀^∞ e^{-x²}dx = √π/2",
        "a≠b≤c≥d±e×f÷g",
        "←↑→↓⇒⇔↦",
        "α·β−γ∕δ",
        "⟨ψ|φ⟩ ⊗ ∇×E",
    ),
    *("\\frac{\\partial f}{\\partial x} $x^2$", "░▒▓█▌▐", "┌─┬─┐│└┴┘", "⠓⠑⠇⠇⠕"),
]
LONG = [
    "a" * 300,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
    "ха" * 60,
    "漢字" * 40,
    "=" * 130,
    "ab" * 70 + " " * 70 + "12" * 35,
    "x\u0301" * 40,
]
WRITTEN = [
    "<s> </s> <unk> <pad> [INST] [/INST]",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|endoftext|> c",
    "<|endoftext|",
    "<<|im_end|>><|im_end|><|im_end|>",
    "<0x0A> <0xFF> [PAD1] [PAD151700]",
    "<|begin_of_text|><|eot_id|><|fim_prefix|>x<|fim_suffix|>y<|fim_middle|>",
    "▁under▁score ▁▁ ĠG Ċ Â",
]


def hostile() -> list[str]:
    """The lines."""
    lines = [*NUMBERS, *SPACES, *EMOJI, *SCRIPTS, *LATIN, *MARKS, *CODE, *QUOTES, *MATHS, *LONG, *WRITTEN]
    decomposed = (unicodedata.normalize("NFD", line) for line in (*LATIN, *SCRIPTS))
    return [*lines, *itertools.islice((line for line in decomposed if line not in lines), 16)]
