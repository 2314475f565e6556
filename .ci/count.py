"""Count the lines and the tokens of mkv.py, and end with status 1 if there are too many.

Tokens are names, numbers, operators and strings, but docstrings: the same code has the same tokens
however it is laid out. A function has at most 40 lines, and a public one a docstring.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

LINES, TOKENS, FUNCTION = 999, 11_000, 40
SILENT = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER", "ENCODING"}

text = Path(sys.argv[1]).read_text()
docstrings, faults = set(), []
for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        name = getattr(node, "name", "the file")
        if ast.get_docstring(node) is not None:
            docstrings.add(node.body[0].lineno)
        elif not name.startswith("_"):
            faults.append(f"{name} has no docstring")
        if not isinstance(node, ast.Module | ast.ClassDef):
            length = node.end_lineno - node.lineno + 1
            faults += [f"{name} has {length} lines"] if length > FUNCTION else []
lines, tokens = text.count("\n"), 0
for token in tokenize.generate_tokens(io.StringIO(text).readline):
    is_docstring = token.type == tokenize.STRING and token.start[0] in docstrings
    tokens += tokenize.tok_name[token.type] not in SILENT and not is_docstring
print(f"{lines} lines (at most {LINES}), {tokens} tokens (at most {TOKENS})")
faults += ["it is too long"] if lines > LINES or tokens > TOKENS else []
sys.exit("\n".join(faults) or 0)
