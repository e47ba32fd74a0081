"""Reading rows: every format, and what bad input says."""

import json
import re

import pytest

from trinityx_jax.data.objectives import load_examples, load_pairs
from trinityx_jax.data.splits import overlap, split_by_question
from trinityx_jax.errors import UserError


def write(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_alpaca_reads_a_list_and_lines_alike(tmp_path) -> None:
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"}]
    whole = load_examples(str(write(tmp_path, "x.json", json.dumps(rows))), "alpaca")
    lines = load_examples(str(write(tmp_path, "x.jsonl", "\n".join(map(json.dumps, rows)))), "alpaca")
    assert [(e.prompt, e.response) for e in whole] == [("a", "b"), ("c\n\nd", "e")]
    assert [(e.prompt, e.response) for e in lines] == [(e.prompt, e.response) for e in whole]


def test_beavertails_learns_safe_rows_and_pairs_by_prompt(tmp_path) -> None:
    rows = [
        {"prompt": "p", "response": "no", "is_safe": True},
        {"prompt": "P?", "response": "yes", "is_safe": False},
        {"prompt": "q", "response": "bad", "is_safe": False},
    ]
    path = str(write(tmp_path, "x.jsonl", "\n".join(map(json.dumps, rows))))
    assert [e.response for e in load_examples(path, "beavertails")] == ["no"]
    assert [(p.chosen.response, p.rejected.response) for p in load_pairs(path, "beavertails")] == [("no", "yes")]


def test_truthfulqa_with_a_byte_order_mark(tmp_path) -> None:
    text = "\ufeffQuestion,Best Answer,Correct Answers,Incorrect Answers\nq?,a,a; b ;,c; d\n"
    path = str(write(tmp_path, "x.csv", text))
    assert [e.response for e in load_examples(path, "truthfulqa")] == ["a", "b"]
    assert [(p.chosen.response, p.rejected.response) for p in load_pairs(path, "truthfulqa")] == [("a", "c")]


@pytest.mark.parametrize(
    ("name", "content", "kind", "says"),
    [
        (
            "x.jsonl",
            '{"instruction": "a", "input": "", "output": "b"}\n{"instruction": "a"}',
            "alpaca",
            r"x\.jsonl:2: .*'output'",
        ),
        ("x.jsonl", '{"instruction": "a", "output": " "}', "alpaca", r"x\.jsonl:1: field 'output' is empty"),
        ("x.jsonl", '{"instruction": 3, "output": "b"}', "alpaca", r"x\.jsonl:1: field 'instruction' is int"),
        ("x.jsonl", '{"prompt": "a", "response": "b"}', "beavertails", r"x\.jsonl:1: .*'is_safe'"),
        ("x.jsonl", '{"prompt": "a", "response": "b", "is_safe": "yes"}', "beavertails", "not true or false"),
        ("x.jsonl", '{"a": 1}\n{oops', "alpaca", r"x\.jsonl:2: not JSON"),
        ("x.jsonl", b'{"instruction": "a", "output": "b"}\n\xff', "alpaca", r"x\.jsonl:2: not UTF-8"),
        ("x.json", '{"instruction": "a"}', "alpaca", "expected a JSON list"),
        ("x.json", "[1]", "alpaca", r"x\.json\[0\]: expected an object"),
        ("x.json", "", "alpaca", "is empty"),
        ("x.csv", "Question,Best Answer\nq\n", "truthfulqa", r"x\.csv:2: .*columns"),
        ("x.csv", "Question\nq\n", "truthfulqa", "'Correct Answers'"),
        ("x.txt", "hello", "alpaca", "not a data file"),
        ("x.jsonl", '{"prompt": "a", "response": "b", "is_safe": false}', "beavertails", "no row can be learned"),
        ("x.jsonl", '{"instruction": "a", "output": "b"}', "poems", "'poems' is not one of"),
    ],
)
def test_bad_rows_name_the_place(tmp_path, name: str, content: str | bytes, kind: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_examples(str(write(tmp_path, name, content)), kind)


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=re.escape("nowhere.jsonl: no such file")):
        load_examples(str(tmp_path / "nowhere.jsonl"), "alpaca")


def test_split_by_question_keeps_answers_together() -> None:
    examples = load_examples("samples/honest-train.csv", "truthfulqa")
    kept, held = split_by_question(examples, 0.2, seed=3)
    assert len(kept) + len(held) == len(examples)
    assert not overlap(kept, held)
    assert abs(len({e.question for e in held}) / len({e.question for e in examples}) - 0.2) < 0.02
    assert split_by_question(examples, 0.2, seed=4)[1] != held


def test_bad_rows_are_skipped_and_counted_on_request(tmp_path, caplog) -> None:
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "input": "", "output": ""}]
    path = str(write(tmp_path, "x.json", json.dumps(rows)))
    assert [e.prompt for e in load_examples(path, "alpaca", skip_bad=True)] == ["a"]
    assert re.search(r"1 of 2 rows are skipped; the last: .*x\.json\[1\]: field 'output' is empty", caplog.text)
