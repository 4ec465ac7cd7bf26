"""A fixed list of texts that users may type, odd ones included: what a pipeline and a bundle must read alike.

No part of it depends on the machine: the same texts in the same order, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

# What users type, and what changes it before a tokenizer: each line is there for one thing that a pipeline may do.
PROBES: tuple[str, ...] = (
    "a red apple on a table",
    "A Red Apple",
    'A Red, Apple &amp; "Pear"',
    "  a RED apple ",
    "red  apple   and\ttwo\tpears",
    "\n a red\napple\r\n\r\non a table \t",
    "",
    " ",
    "\n",
    "\u00a0no\u00a0break \u2003 em\u3000ideographic\u00a0",
    "next\u0085line sep\u2028ara\u2029tor",
    "\x1cgroup\x1d \x1erecord\x1f",
    "zero\u200bwidth \u200b",
    "\ufeffmark of the byte order",
    "Tom &amp; Jerry &lt;3 &quot;cheese&quot;",
    "double &amp;amp; escaped &amp;quot;twice&amp;quot; &amp;amp;lt;",
    "&#39;numbers&#39; &#x27;hexadecimal&#X27; &#8364; &#128; &#0; &#xD800; &#1114112; &#11;",
    "without a semicolon &amp &lt &copy2026 &notit; &hellip &unknown; &; & &#; &#x;",
    "&nbsp;blank&nbsp; &emsp; &NotEqualTilde; &acE; &AMP; &Amp;",
    "&amp; lone &amp",
    "'straight' \"quotes\" don't",
    "\u201ccurly\u201d \u2018quotes\u2019 don\u2019t \u00abguillemets\u00bb \u201elow\u201f `back` &#8220;",
    "\U0001f600 a smiling \U0001f34e apple \u2764\ufe0f",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea",
    "caf\u00e9 cafe\u0301 e\u0301\u0301 \u0301",
    "\uff26\uff55\uff4c\uff4c\u3000\uff37\uff29\uff24\uff34\uff28 \uff01\uff1f\uff0c\uff08\uff61\uff71\uff9e\uff09",
    "\ufb01re \ufb02y \ufdfa \u2460 \u00bd \u2177 \u00b2 \u2122",
    "STRASSE Stra\u00dfe \u1e9e",
    "\u0130stanbul I \u0131 i\u0307",
    "\u03a3\u0391\u03a3 \u039f\u0394\u039f\u03a3 A\u03a3 \u03a3 A\u03a3.",
    "\u03a3\u0301 A\u03a3\u0301 A\u00ad\u03a3 A'\u03a3 A\u03a3'B",
    "\u01c5 \u01c8 \u212a \u212b \u2126 \u023a \u1e9e \U00010400 \u0345\u03a3",
    "commas, full stops. colons: semicolons; (brackets) [square] {curly} <angle> a/b a\\b a|b",
    "ends with a full stop.",
    "...---===***___~~~!!!???",
    "((a red apple:1.3)), [pear|plum], {cat} {0} {} {{x}} %s %d $x ${y} \\1 \\n",
    "a \u2013 en \u2014 em \u2015 bar \u2212 minus \u2010 \u2011 \u2026 \u00b7 \u2022",
    "100% of #1234567 @user 1024x768 1:1 20:15 3.14159 1,000 $5 50\u20ac \u00b0C",
    "http://example.org/?q=1&r=2#x www.example.com/a_b.jpg mail@example.org file_name-01.PNG",
    "<b>bold</b> <br/> <p>A &amp; B</p> <!-- remark --> <script>x</script> <person>",
    "<|startoftext|>red<|endoftext|>apple <|im_start|>user <|im_end|> <|ENDOFTEXT|>",
    "<s> </s> <pad> <unk> <eos> <bos> <mask> [CLS] [SEP] [PAD] <extra_id_0> <start_of_turn> <image>",
    "\u65e5\u672c\u8a9e\u306e\u6797\u6a8e \u7ea2\u82f9\u679c \ube68\uac04 \uc0ac\uacfc \u1107\u1161\u11af",
    "\u062a\u0641\u0627\u062d\u0629 \u05ea\u05e4\u05d5\u05d7 \u202eright to left\u202c \u0938\u0947\u092c \u0e41\u0e2d",
    "sch\u00c3\u00b6n \u00e2\u20ac\u0153mojibake\u00e2\u20ac\x9d \u00c2\u00a0 L&AMP;AMP;ATILDE;&AMP;AMP;SUP3;PEZ",
    "a\x00b \x07\x08\x0b\x0c\x1b[31m \x7f\x80\x9f \ue000 \ufffd\ufffe\uffff \U0010ffff",
    "\u180emongol \u2060word joiner \u00adsoft hyphen\u00ad",
    "a",
    "A",
    "?",
    "-",
    "word " * 40,
    'A Red Apple, &amp; a "Pear"; ' * 25,
    "a" * 300,
    "\U0001f34e" * 90,
    "far longer than the text of any model " * 120,
)

_PLAIN: tuple[str, ...] = (
    "a cat wearing sunglasses",
    "a sailing boat at sunset",
    "a wooden house in the snow",
    "a bunch of sunflowers",
    "an astronaut riding a horse",
    "a bowl of ramen",
    "a portrait of an old man",
    "Portrait photo of a 24 y.o. woman, 85mm, f/1.4, ISO-400, (best quality:1.2)",
    "Self-portrait oil painting, a beautiful cyborg with golden hair, 8k",
    'A sign that reads "HELLO, WORLD!"',
    "it's 3 o'clock! they'll say I'm he'd we've",
    "low quality, blurry, bad anatomy, worst quality, jpeg artifacts",
    "ein Apfel, den niemand ißt; Größe: 3\u00d74 cm",
    "un garçon à l'école, où ça?",
    "\u00bfqu\u00e9 a\u00f1o? \u00a1ma\u00f1ana!",
    "\u044f\u0431\u043b\u043e\u043a\u043e \u041a\u0420\u0410\u0421\u041d\u041e\u0415",
    "\u03ba\u03cc\u03ba\u03ba\u03b9\u03bd\u03bf \u039c\u0397\u039b\u039f",
    "qu\u1ea3 t\u00e1o \u0111\u1ecf",
    "k\u0131rm\u0131z\u0131 ELMA",
    "\u4e00\u500b\u7d05\u860b\u679c\uff0c\u5728\u684c\u5b50\u4e0a\u3002",
)
_ALPHABETS: tuple[str, ...] = (
    "abc ABC'123.!-",
    "  \t\n\r\u00a0\u0085\u2028\ufeff\u200bab'",
    "\u00e9\u00e8\u00fc\u00f1\u00e7\u00f8\u00df\u00c5\u0142\u015f\u011f\u0130\u0131\u03a3\u03c3\u03c2 aA",
    "\U0001f600\U0001f44d\U0001f3fd\u200d\ufe0f\u2764\U0001f1e9\U0001f1ea\U0001f469 a",
    "\u0646\u0635\u062d\u0645 \u05d0\u05d1\u05d2\u202e\u202cab",
    "\u6f22\u5b57\u304b\u306a\u30ab\u30ca\ud55c\uae00\u1161\u1100\u3099 \uff21\uff01",
    "".join(chr(c) for c in range(128)),
    "&;#xampltquo39 <>/\"'",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 ,.:;!?",
    "e\u0301\u0300\u0308\u0327A\u030ao\u0335 ",
)
_OF_EACH = 14


# Of `PROBES`, those whose edges or whole matter to what may be done to a text; the others are in one mixture.
_WHOLE = (0, 1, 2, 3, 6, 9, 18, 21)
_LONGEST_OF_MIXTURE = 200
# Tells apart what the others leave alike: every order of `fewstep.text.operations` that makes a difference.
_ORDERS = "&amp;amp;nbsp;&AMP;nbsp;&AMP;lt;&amp;nbsp;"


def path_texts() -> tuple[str, ...]:
    """Returns the few texts that are put through the whole of a pipeline: a plain one first, one without end last.

    The last but one is all short probes in one, so that each of their characters meets what happens to it.
    """
    together = " ".join(text for text in PROBES if len(text) < _LONGEST_OF_MIXTURE)
    return (*(PROBES[i] for i in _WHOLE), _ORDERS, together, PROBES[-1])


def odd_texts() -> tuple[str, ...]:
    """Returns more than two hundred texts: those of `PROBES` first, then plain ones, then mixtures of odd alphabets."""
    return tuple(dict.fromkeys((*PROBES, *_PLAIN, *_mixtures(), _ORDERS)))


def _mixtures() -> Iterator[str]:
    """Yields texts of up to 60 characters of each alphabet, by a generator of its own: no library's may change them."""
    state = 1
    for alphabet in _ALPHABETS:
        for number in range(_OF_EACH):
            found = []
            for _ in range(3 + number * 4):
                state = (state * 6364136223846793005 + 1442695040888963407) % 2**64  # Knuth, MMIX
                found.append(alphabet[(state >> 33) % len(alphabet)])
            yield "".join(found)
