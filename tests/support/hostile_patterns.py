"""Regular expressions for the patterns of an adapter_config.json: harmless ones, any, and such as never end."""

from hypothesis import strategies as st

# What is found in the configs that people write, for names of a few modules.
HARMLESS = (
    *(
        "w1",
        "mlp.w1",
        r"mlp\.w1",
        ".*",
        r".*\.w1",
        "^layers.0.mlp.w1",
        r"layers\.\d+\.mlp\.w[12]",
        "layers.(0|1).mlp.w1",
    ),
    *(r"layers\.[0-9]\.mlp\.up", "(w1|up)", "up$", r"layers\.1\d*\.mlp\.(?:up|down)", r"\w+", r"(?!layers\.0).*w1"),
    *(r"[^.]+", r"mlp\.\S+", r"layers\.\d{1,2}\.mlp\..{2}", "layers.10", "l.*p", "", "w1|up", r"layers\.(?=1).*"),
)

_PIECES = (
    "a",
    "b",
    "ab",
    "aa",
    ".",
    "a|b",
    "a|aa",
    "a|",
    "[ab]",
    "[^a]",
    r"\w",
    r"\.",
    r"\b",
    "^",
    "$",
    "",
    r"\1",
    r"\2",
)
_FORMS = """
    ({}) (?:{}) ({})* ({})+ ({})? (?:{})* (?:{})+ (?:{})*? (?:{})+? (?:{})?? (?={}) (?!{}) ({}){{2}} ({}){{0,3}} ({}|a)
    ({}){{1,}} (?:{}){{,2}} (a|{})* ({}){{30}} (?<=a){} (?<!b){} (?P<n>{})(?P=n) ({})\\1 [{}] ({})*+ (?>{}) (?i:{})
    (?:{}){{1}} ({}){{100,200}}
""".split()


def _combined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    formed = st.builds(lambda form, piece: form.format(piece), st.sampled_from(_FORMS), inner)
    return formed | st.lists(inner, min_size=2, max_size=3).map("".join)


# patterns of all that `re` knows, over names of a and b
any_pattern = st.recursive(st.sampled_from(_PIECES), _combined, max_leaves=6)
names = st.text("ab.", min_size=1, max_size=8) | st.sampled_from(("a\n", "ab.a\n", "é", "A", "_", "a-b", "\u0661"))

# They end for no name of many a's and one of something else, or are larger than the memory where somebody unrolls them.
ENDLESS = {
    "nested repeats": r"(a+)+ (a*)* ([a-z]+)* (a+)+\b\B (\w+\s?)+$ ((a+)+)+b (?:.*)*.*.*.*.*.*.*b (a+?)+?b".split(),
    "alternatives that overlap": "(a|a)+ (a|aa)+ (a|b|ab)*c (?:a|a?)+ (?:a?|a)*b".split(),
    "many repeats": ["(.*a){25}", "(a?){40}a{40}", "(?:.*)*" * 30 + "b", "(.+)+" * 100, "(" + "a?" * 400 + ")+b"],
    "looking around": "(?=(a+)+b)a (?!(a+)+b)b (?<!x)(a+)+ (?>(a+)+)b".split(),
    "references back": [r"((a+))+\2b", r"(a+)(a+)(a+)(a+)(a+)(\w)\2\3\4\5\6b", r"(a*)*\2c"],
    "counts": [
        "(a{1,30}){1,30}",
        "(a{65535}){65535}",
        "a{1000000000}",
        "(((a{100}){100}){100}){100}",
        "a{99999999999}",
    ],
    "unrolled": ["(a{0,60000}){0,60000}", "((a{10}){10}){10}b", "a{2}" * 2000, "(?:a{2}){3}" * 300, "(a{9}){9}" * 90],
    "long": ["a" * 5000, "[" + "a-z" * 5000 + "]", "|".join(["a*" * 10] * 60), "|" * 900, "a|" * 400],
    "deep": ["(" * 2000 + ")" * 2000, "(?:" * 90 + "a" + ")*" * 90, "(" * 500, "(?:" * 300 + ")" * 300, "(?=" * 200],
}
