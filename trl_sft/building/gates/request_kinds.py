"""What a request asks for that would be a fault in any other row: an open end, a loop, `null`, a dialogue, markup.

In: a row. Out: whether its request asks for it. Read only where a gate has found a fault, so that an answer that does
what was asked is never taken for one. English and Chinese. Not here: the faults themselves.
"""

from __future__ import annotations

import re

from trl_sft.building.candidates import CandidateRow

# an answer that may end without a full stop: a part of a text, or a word of grammar
OPEN_END = re.compile(
    r"\bcontinu|\bcomplet(?:e|ing|ion)\b|autocomplet|\bfill\b|\bblank|\bfinish|\bnext (?:word|line|token)"
    r"|\bhalf of|\bfirst (?:half|line|part|word)|\bending? (?:with|in|open)\b|cliffhanger|\bcomma\b|bracket|parenthes"
    r"|punctuation|\barticles?\b|pronoun|conjunction|determiner|preposition|adverb|\bwhich word|\brecite\b|\blyrics?\b"
    r"|续写|补全|填空|接着|上句|上联|下联|前半|逗号|顿号|括号|标点",
    re.IGNORECASE,
)
FENCE = re.compile(r"fence|backtick|markdown|code block|代码块|反引号", re.IGNORECASE)
REPETITION = re.compile(
    r"\brepeat|\d+ times\b|\b(?:three|four|five|six|ten|twelve|twenty|fifty|hundred) times\b|again and again|\bchorus"
    r"|\bsongs?\b|\blyrics?\b|\bmantra|\bchant|\brefrain|重复|反复|\d+ ?[遍次]|副歌|歌词",
    re.IGNORECASE,
)
LABELS = re.compile(
    r"\btag\b|\blabel|classif|\beach\b|\bevery\b|\bper line\b|\bone by one\b|标注|分类|逐个|每[个行条]", re.IGNORECASE
)
NO_VALUE = re.compile(
    r"\bnull\b|\bnone\b|\bn/?a\b|\bnan\b|undefined|missing|\bempty\b|\bno value|\bnot a number"
    r"|\bif (?:absent|unknown)|\bjson\b|\bsql\b|javascript|\bjs\b|typescript|\bpython\b|\bpandas\b|\bnumpy\b"
    r"|\bieee\b|typeof|\breturns?\b|\boutput of|\bevaluates?\b|\bprints?\b|divi(?:de|sion)|空值|缺失|返回|输出",
    re.IGNORECASE,
)
DOTS = re.compile(
    r"ellips|\bdots?\b|\bmorse\b|\bspread\b|\brest (?:operator|parameter)|\bvariadic|punctuation|\bsymbol|\boperator"
    r"|\bpath\b|\bfolder|\bdirector(?:y|ies)|\btokens?\b|\brange\b|省略号|摩斯|莫尔斯|标点|符号|目录|路径",
    re.IGNORECASE,
)
ENCODING = re.compile(
    r"encod|decod|\butf-?8\b|latin-?1|cp-?1252|mojibake|unicode|\bbytes?\b|replacement character|garbled|U\+FFFD"
    r"|乱码|编码|字符集",
    re.IGNORECASE,
)
MODELS = re.compile(
    r"\bAI\b|artificial intelligence|chat ?bot|language model|\brobots?\b|\bandroid\b|\bcomputer (?:says?|said)"
    r"|\bare you\b|\byour name\b|\bwho (?:made|created|built|trained|developed) you\b|\babout you(?:rself)?\b"
    r"|\bintroduce yourself\b|\bwho you are\b|你叫什么|介绍一下你|自我介绍|人工智能|语言模型|机器人|你是",
    re.IGNORECASE,
)
MARKUP = re.compile(
    r"jinja|mustache|handlebars|template|prompt|token|special|\bHTML\b|\bXML\b|\btags?\b|markup|strike|cross(?:ed)? out"
    r"|\bvue\b|angular|svelte|liquid|django|flask|ansible|\bhelm\b|\bdbt\b|github action|workflow|\byaml\b|\bbind\b"
    r"|form letter|\bblanks?\b|placeholder|fill in|fill out|skeleton|\bstub\b|scaffold|customi[sz]e|\bmacro\b|n-?gram"
    r"|sentence boundar|模板|占位|填写|标签",
    re.IGNORECASE,
)
HEADINGS = re.compile(r"heading|headline|document(?:ation)?\b|template|prompt|alpaca|markdown|标题|模板", re.IGNORECASE)
DIALOGUE = re.compile(
    r"dialog|conversation|\bscripts?\b|screenplay|\bscenes?\b|\bplay\b|interview|transcript|\blogs?\b|\bchats?\b"
    r"|role-?play|\bparse\b|template|prompt|对话|剧本|访谈|聊天|台词|模板",
    re.IGNORECASE,
)
NETWORK = re.compile(
    r"binary|subnet|\bcidr\b|netmask|\bmask\b|\bdns\b|resolver|ipv4|\bclass [a-e]\b|octet|regex|regular expression"
    r"|packet|traceroute|routing|\brouter|firewall|\blog (?:file|line|entr)|\bvalid\b|子网|掩码|网段|域名解析",
    re.IGNORECASE,
)


def read_request(row: CandidateRow) -> str:
    """Return the texts of a row that are no answers."""
    return "\n".join(str(turn.get("content") or "") for turn in row.messages if turn.get("role") != "assistant")
