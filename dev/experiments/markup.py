"""What the lesson's page and the browser's are written with: formulas as MathML, lines of the sources by anchors, and templates."""

import html
import re

from shared import ROOT, Failure


# ---------------------------------------------------------------------------------------------------------
# Formulas: a little of TeX's notation as MathML, which browsers set themselves

COMMANDS = {"prod": "∏", "sum": "∑", "to": "→", "d": "d"}
WORDS = ("rms", "Norm", "mean")


def mathml(source, display=False):
    tokens = re.findall(r"\\[a-zA-Z]+|[0-9]+(?:\.[0-9]+)?|[^\s]", source)
    at = 0

    def group():
        nonlocal at
        if at < len(tokens) and tokens[at] == "{":
            at += 1
            inside = sequence("}")
            at += 1
            return "<mrow>" + inside + "</mrow>"
        return atom()

    def atom():
        nonlocal at
        if at >= len(tokens):
            raise Failure(f"formula '{source}': expected more after '{tokens[-1]}'")
        token = tokens[at]
        if token == "{":
            return group()
        at += 1
        if token == r"\frac":
            top = group()
            return f"<mfrac>{top}{group()}</mfrac>"
        if token == r"\sqrt":
            return f"<msqrt>{group()}</msqrt>"
        if token == r"\d":
            return "<mrow><mi mathvariant='normal'>d</mi></mrow>"
        if token[0] == "\\":
            name = token[1:]
            if name in WORDS:
                return f"<mi mathvariant='normal'>{name}</mi>"
            if name not in COMMANDS:
                raise Failure(f"formula '{source}': unknown {token}")
            return f'<mo largeop="true" movablelimits="false" style="font-size: 1.35em">{COMMANDS[name]}</mo>'
        if token[0].isdigit():
            return f"<mn>{token}</mn>"
        if token.isalpha():
            return f"<mi>{token}</mi>"
        return f"<mo>{html.escape({'-': '−', '*': '·'}.get(token, token))}</mo>"

    def sequence(end=None):
        nonlocal at
        out = []
        while at < len(tokens) and tokens[at] != end:
            base, big = atom(), tokens[at - 1] in (r"\prod", r"\sum")
            scripts = {}
            while at < len(tokens) and tokens[at] in "_^":
                kind = tokens[at]
                at += 1
                scripts[kind] = group()
            if scripts:
                names = ("munder", "mover", "munderover") if big else ("msub", "msup", "msubsup")
                name = names[2] if len(scripts) == 2 else names["_^".index(next(iter(scripts)))]
                base = f"<{name}>{base}{scripts.get('_', '')}{scripts.get('^', '')}</{name}>"
            out.append(base)
        return "".join(out)

    return f"<math{' display=block' if display else ''}><mrow>{sequence()}</mrow></math>"


# ---------------------------------------------------------------------------------------------------------
# Code, from the sources

def extract(file, function, first, lines=1):
    """(number, text) of `lines` lines, the first of which holds `first`, after the line that holds `function`. Both must be there, `function` once."""
    source = (ROOT / file).read_text().split("\n")
    starts = [i for i, line in enumerate(source) if function in line]
    if len(starts) != 1:
        raise Failure(f"{file}: expected the anchor '{function}' once, found it {len(starts)} times; mend the page's table of code")
    found = next((i for i in range(starts[0], min(starts[0] + 60, len(source))) if first in source[i]), None)
    if found is None:
        raise Failure(f"{file}: expected '{first}' within 60 lines of '{function}', found none; mend the page's table of code")
    text = source[found:found + lines]
    indent = min(len(line) - len(line.lstrip()) for line in text if line.strip())
    return found + 1, "\n".join(line[indent:] for line in text)


KEYWORDS = r"\b(void|inline|const|int|float|double|real|bool|for|if|else|return|template|size_t|index_t|auto|struct)\b"


def code_html(text):
    out = []
    for line in text.split("\n"):
        code, slashes, comment = line.partition("//")
        code = re.sub(KEYWORDS, r'<span class="k">\1</span>', html.escape(code))
        out.append(code + (f'<span class="c">//{html.escape(comment)}</span>' if slashes else ""))
    return "\n".join(out)


# ---------------------------------------------------------------------------------------------------------
# Templates

def fill(template, makers):
    """The template with each [[kind argument]] replaced by makers[kind](argument)."""
    def made(match):
        kind, argument = match[1], (match[2] or "").strip()
        if kind not in makers:
            raise Failure(f"the template: expected one of {', '.join(makers)}, found [[{kind}]]")
        try:
            return makers[kind](argument)
        except KeyError:
            raise Failure(f"the template: [[{kind} {argument}]] names nothing that there is") from None
    return re.sub(r"\[\[(\w+)(?:\s+(.*?))?\]\]", made, template)


def write_page(path, page):
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB; open it in a browser")
