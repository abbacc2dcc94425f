"""Programs out of chat answers: the common forms of a HumanEval answer, and the published extraction beside ours."""

import ast
import warnings

import pytest

from fdpp.integrations.evaluation.code_answers import (
    humaneval_programs,
    parsed,
    published_humaneval_programs,
    published_program_of,
)

PROMPT = 'from typing import List\n\n\ndef double(x: int) -> int:\n    """Twice x."""\n'
WHOLE = "def double(x: int) -> int:\n    return 2 * x\n"


def fenced(code, info="python", fence="```"):
    return f"{fence}{info}\n{code}\n{fence}"


FORMS = {
    "the bare body": "    return 2 * x\n",
    "a body whose first line lost its indentation": "y = x\n    if y:\n        y += x\n    return y\n",
    "a body without indentation": "y = x\nif y:\n    y += x\nreturn y\n",
    "a body indented by tabs": "\tif x:\n\t\treturn 2 * x\n\treturn 0\n",
    "a body with a docstring of its own": '    """Twice x."""\n    return 2 * x\n',
    "a body and a helper below it": "    return helper(x)\n\ndef helper(x):\n    return 2 * x\n",
    "a body and then prose": "    return 2 * x\n\nThis doubles x, doesn't it?\n",
    "prose and then a body": "The missing lines are:\n\n    return 2 * x\n",
    "a body in a fence": "Here:\n" + fenced("    return 2 * x"),
    "a body in a fence, not indented": fenced("if x:\n    return 2 * x\nreturn 0"),
    "the whole function, nothing else": WHOLE,
    "python": f"Here it is:\n\n{fenced(WHOLE)}\n\nIt works.",
    "Python": fenced(WHOLE, "Python"),
    "PYTHON": fenced(WHOLE, "PYTHON"),
    "python3": fenced(WHOLE, "python3"),
    "python3.11": fenced(WHOLE, "python3.11"),
    "py": fenced(WHOLE, "py"),
    "a language after a space": fenced(WHOLE, " python"),
    "a language and attributes": fenced(WHOLE, 'python title="double.py" linenums="1"'),
    "a language in braces": fenced(WHOLE, "{.python .numberLines}"),
    "a language followed by spaces": fenced(WHOLE, "python   "),
    "no language": fenced(WHOLE, ""),
    "another language's name": fenced(WHOLE, "text"),
    "tildes": fenced(WHOLE, fence="~~~"),
    "four backticks": fenced(WHOLE, fence="````"),
    "an indented fence": "1. The function:\n\n" + "\n".join("   " + line for line in fenced(WHOLE).split("\n")),
    "an indented fence without indentation in it": "   ```python\n" + WHOLE + "   ```",
    "a fence that ends a line of prose": "The function: ```python\n" + WHOLE + "```",
    "a fence that is closed on the last line of code": "```python\n" + WHOLE.rstrip() + "```\nDone.",
    "a fence on one line": "```def double(x): return 2 * x```",
    "a language and code on one line": "```python def double(x): return 2 * x```",
    "an unclosed fence": "```python\n" + WHOLE,
    "a fence that the next one closes": "```python\nimport math\n```python\n" + WHOLE + "```",
    "a stray fence before": "```\n" + fenced(WHOLE),
    "Windows line ends": fenced(WHOLE).replace("\n", "\r\n"),
    "old Mac line ends": fenced(WHOLE).replace("\n", "\r"),
    "Windows line ends in a body": "    y = x\r\n    return y + x\r\n",
    "tabs": fenced(WHOLE.replace("    ", "\t")),
    "prose before code without a fence": "Sure! Here's the function:\n\n" + WHOLE,
    "prose around code without a fence": "It's easy:\n\n" + WHOLE + "\nThis works because 2 * x is x + x.\n",
    "one word before code without a fence": "Answer\n\n" + WHOLE,
    "code indented as Markdown has it": "The function:\n\n    def double(x):\n        return 2 * x\n\nDone.",
    "an import in prose without a fence": "Solution:\nimport math\n\ndef double(x):\n    return math.floor(2 * x)\n",
    "an example first": fenced("print(double(4))  # 8") + "\nis what this does:\n" + fenced(WHOLE),
    "an example last": fenced(WHOLE) + "\nTry:\n" + fenced("print(double(undefined))"),
    "a shell command first": fenced("pip install numpy", "bash") + "\nThen:\n" + fenced(WHOLE),
    "the prompt once more, then the answer": fenced(PROMPT) + "\nbecomes\n" + fenced(WHOLE),
    "the prompt once more, then the body": fenced(PROMPT) + "\nwith\n" + fenced("    return 2 * x"),
    "a stub that passes, then the answer": fenced("def double(x):\n    pass") + fenced(WHOLE),
    "a stub that raises, then the answer": fenced("def double(x):\n    raise NotImplementedError()") + fenced(WHOLE),
    "a stub of dots, then the answer": fenced("def double(x):\n    ...\n\n" + WHOLE),
    "two answers": fenced(WHOLE) + "\nor shorter, but wrong:\n" + fenced("def double(x):\n    return x"),
    "a helper in a block before": fenced("def twice(x):\n    return 2 * x") + fenced("def double(x): return twice(x)"),
    "a helper in a block after": fenced("def double(x): return twice(x)") + fenced("def twice(x):\n    return 2 * x"),
    "imports in a block of their own": fenced("import math") + fenced("def double(x): return math.floor(2 * x)"),
    "imports before the fence": "import math\n\n" + fenced("def double(x): return math.floor(2 * x)"),
    "a body and its import apart": fenced("import math") + "and\n" + fenced("    return math.floor(2 * x)"),
    "import at the top": fenced("import math\n" + WHOLE.replace("2 * x", "math.floor(2 * x)")),
    "try: import at the top": fenced(
        "try:\n    import no_such_module as m\nexcept ImportError:\n    import math as m\n\n"
        "def double(x):\n    return m.floor(2 * x)"
    ),
    "if: import at the top": fenced("if 1 < 2:\n    import math\n\ndef double(x):\n    return math.floor(2 * x)"),
    "a star import": fenced("from math import *\n\ndef double(x):\n    return floor(2 * x)"),
    "an import from __future__": fenced("from __future__ import annotations\n\ndef double(x: Later): return 2 * x"),
    "an unused import that does not exist": fenced("import no_such_module\n\n" + WHOLE),
    "if __name__": fenced(WHOLE + '\nif __name__ == "__main__":\n    double = None\n    print(double(int(input())))'),
    "a script that reads its input": fenced(WHOLE + "\nx = int(input())\nresult = double(x)\nprint(result)"),
    "asserts that fail": fenced(WHOLE + "\nassert double(2) == 5"),
    "tests of its own": fenced(WHOLE + "\nimport unittest\ndef test(): assert double(2) == 5\ntest()\nunittest.main()"),
    "a call of a module that is needed": fenced("import sys\n" + WHOLE + "    sys\n\nsys.exit(double(2))"),
    "text after the code in the block": fenced(WHOLE + "\nNote: that's it (really"),
    "a syntax error below": fenced(WHOLE + "\nif (\n"),
    "a decorator": fenced("from functools import cache\n\n@cache\ndef double(x):\n    return 2 * x"),
    "a decorator of its own": fenced("def same(f):\n    return f\n\n@same\ndef double(x):\n    return 2 * x"),
    "a class": fenced(
        "class Twice:\n    def of(self, x):\n        return 2 * x\n\ndef double(x): return Twice().of(x)"
    ),
    "a class that stands below": fenced(
        "def double(x):\n    return Twice.of(x)\n\nclass Twice:\n    of = lambda x: 2 * x"
    ),
    "a constant": fenced("FACTOR: int = 2\n\ndef double(x):\n    return FACTOR * x"),
    "a table that is filled": fenced(
        "table = {}\nfor i in range(9):\n    table[i] = 2 * i\n\ndef double(x):\n    return table[x]"
    ),
    "a list that is filled by calls": fenced(
        "table = []\ntable.append(0)\ntable.extend([2, 4, 6, 8])\n\ndef double(x):\n    return table[x]"
    ),
    "an async helper": fenced(
        "import asyncio\n\nasync def twice(x):\n    return 2 * x\n\ndef double(x):\n    return asyncio.run(twice(x))"
    ),
    "a lambda": fenced("double = lambda x: 2 * x"),
    "an alias": fenced("def twice(x):\n    return 2 * x\n\ndouble = twice"),
    "a nested function": fenced("def double(x):\n    def inner(y):\n        return x + y\n    return inner(x)"),
    "a fence in the docstring": fenced(
        'def double(x):\n    """Twice.\n\n    ```\n    double(4)\n    ```\n    """\n    return 2 * x'
    ),
    "invalid escapes": fenced("import re\n\ndef double(x):\n    return 2 * x if re.match('\\d', str(x)) else 0"),
    "a null byte": fenced(WHOLE + "\0"),
    "a local name like a global one": fenced("def double(number):\n    return 2 * number\n\nnumber = input()"),
    "tags": "[PYTHON]\n" + WHOLE + "[/PYTHON]",
}

WRONG = {
    "a refusal": "I cannot help with that.",
    "nothing": "",
    "one word": "Sorry",
    "a stub": fenced(PROMPT),
    "a wrong body": "    return x\n",
    "another name": fenced("def twice(x):\n    return 2 * x"),
    "a method": fenced("class Solution:\n    def double(self, x):\n        return 2 * x"),
    "code that breaks off": "```python\ndef double(x):\n    return (2 *",
    "an example alone": fenced("print(double(4))"),
}


def passes(program, check="assert double(4) == 8"):
    """Whether a program passes a check, as the harness runs it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(program + "\n" + check, {})
    except (Exception, SystemExit):
        return False
    return True


def program(answer, prompt=PROMPT, entry_point="double"):
    [[text]] = humaneval_programs([[answer]], [{"prompt": prompt, "entry_point": entry_point}])
    return text


@pytest.mark.parametrize("form", FORMS)
def test_the_entry_point_of_an_answer_is_found(form):
    assert passes(program(FORMS[form])), program(FORMS[form])


@pytest.mark.parametrize("form", WRONG)
def test_what_does_not_answer_does_not_pass(form):
    assert not passes(program(WRONG[form]))


def test_an_answer_that_defines_nothing_has_no_program():
    assert program("I do not know.") == "" == program("x = (\n")


def test_what_the_prompt_defines_is_there_for_the_tests():
    """As in HumanEval's decode_shift, whose tests call encode_shift, which an answer need not call."""
    prompt = "def halve(x):\n    return x // 2\n\n\ndef double(x):\n    '''Undo halve.'''\n"
    for answer in (fenced(WHOLE), "    return 2 * x"):
        assert passes(program(answer, prompt), "assert double(halve(8)) == 8")
        assert not passes(published_program_of(prompt, "double", answer), "assert double(halve(8)) == 8")
    assert passes(program(fenced("def halve(x):\n    return 4\n\n" + WHOLE), prompt), "assert double(halve(2)) == 8")


def test_every_response_of_a_document_has_its_program():
    docs = [{"prompt": PROMPT, "entry_point": "double"}, {"prompt": "def one():\n", "entry_point": "one"}]
    got = humaneval_programs([["    return 2 * x", WHOLE], ["    return 1"]], docs)
    assert [len(row) for row in got] == [2, 1] and passes(got[0][1]) and passes(got[1][0], "assert one() == 1")


def published(answer):
    [[text]] = published_humaneval_programs([[answer]], [{"prompt": PROMPT, "entry_point": "double"}])
    return text


class TestPublished:
    """What the published scripts run, fact by fact; `PROMPT` and the answer are one text."""

    @pytest.mark.parametrize(
        "form",
        ["python", "an unclosed fence", "the bare body", "the whole function, nothing else", "if __name__"],
    )
    def test_runs_the_usual_forms(self, form):
        assert passes(published(FORMS[form]))

    @pytest.mark.parametrize("form", ["Python", "python3", "an example first", "a class", "a constant"])
    def test_misses_forms_that_ours_finds(self, form):
        """Other spellings of a fence, later blocks, an attribute's owner, annotated assignments."""
        assert not passes(published(FORMS[form]))

    def test_keeps_what_the_entry_point_reaches_by_name(self):
        code = (
            "import re, os\n\nLIMIT = 3\nunused = 4\n\ndef helper(x): return LIMIT\n\ndef silent(x): print(x)\n\n"
            "class Box: pass\n\ndef double(x):\n    silent(x)\n    return helper(x), x.Box, LIMIT.left\n\nprint(1)\n"
        )
        tree = ast.parse(published(fenced(code)))
        names = [node.names[0].name for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        kept = [node.targets[0].id if isinstance(node, ast.Assign) else node.name for node in tree.body[2:]]
        # silent returns nothing; of an attribute the last name alone counts.
        assert names == ["List", "re"] and kept == ["LIMIT", "helper", "Box", "double"]

    def test_takes_the_longest_run_of_lines_that_parses(self):
        texts = [
            "a = 1\nb = (\nc = 2\nd = 3\n\n",
            "if x:\ny = 1\nif y:\n    z = 2\n  w = 3\n'''\nv = 4\n",
            "x = [\n1,\n2\n\ntry:\n    a\nb = 1\n'''t\n'''\nc = 2\ndef f():\n",
        ]
        for text in texts:
            lines = text.splitlines()
            for start in range(len(lines)):
                ends = [end for end in range(start, len(lines) + 1) if parses("\n".join(lines[start:end]))]
                nodes, n = parsed(lines[start:])
                assert start + n == max(ends) and len(nodes) == len(ast.parse("\n".join(lines[start : start + n])).body)

    def test_reads_no_more_than_a_hundred_lines(self):
        filler = "".join(f"a{i} = {i}\n" for i in range(100))
        assert passes(published(fenced(WHOLE + filler))) and not passes(published(fenced(filler + WHOLE)))

    def test_two_programs_of_one_answer_may_differ(self):
        answer = FORMS["a stub that passes, then the answer"]
        assert passes(program(answer)) and not passes(published_program_of(PROMPT, "double", answer))


def parses(text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
