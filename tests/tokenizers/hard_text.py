"""Text that breaks tokenizers, and a small corpus to train them on."""
HARD = [
    "", " ", "  ", "a", " a", "a ", "Hello world", " Hello  world   ", "\n", "\n\n\n", "\t\n x", "line\r\nline\rline", "def f(x):\n    return x  # 12345 + 67 = 12412\n\n\n    y",
    "1 12 123 1234 12345 3.14159 ١٢٣ Ⅷ ½", "Café naïve façade Ελλάδα здравствуйте", "東京は日本の首都です。北京", "مرحبا بالعالم، كيف الحال؟", "नमस्ते दुनिया ไทยแลนด์ 한국어",
    "🙂🙃👩‍👩‍👧‍👦🏳️‍🌈🇩🇪", "I'll don't WE'VE it's 'tis", "e\u0301 \u00e9 \u212b A\u030a", "\u00a0\u2003\u3000 wide\u200bspaces\ufeff", "\x00\x01\x7f control", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐐀𐐁",
    "!!!???...---***///\\\\|||```'''\"\"\"", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "https://example.com/?q=1&b=%20#x", "<div class=\"a\">&amp;</div>",
    "_snake_case camelCase SCREAMING", "ﬁ ﬂ ① ㈱ ｆｕｌｌ",
]
CORPUS = [
    "The history of the lighthouse begins long before electricity.", "On clear nights, fires of wood and coal were kept burning on towers along the coast.",
    "A keeper's family lived beside them, and it's told that they'd sing.",
    "def add(a, b):\n    return a + b", "for i in range(10):\n        print(i, 12345)", "Café, naïve, 東京, Ελλάδα, здравствуйте 🙂", "one two three  four   five",
    "The cat and the hat; the bat and the rat!",
    "numbers 1 22 333 4444 55555", "Quotes \"here\" and 'there' and <tags> everywhere.", "the then there these those they them theirs", "burning learning turning yearning",
]
