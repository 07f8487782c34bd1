"""What some benchmarks' rows need before templates can name their parts: nested files, several questions a row, labels.

Each function takes a published row and gives the rows of its questions, with fields added. Declarations name them under
`prepare`. Where a benchmark circulates in several schemas, all of them are read.
"""

import ast
import re
from collections.abc import Callable

from ctllm_jax.evaluate.harness import squad_words
from ctllm_jax.evaluate.math_answers import boxed

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Rows = list[dict]


def _lettered(row: dict, texts: list[str]) -> dict:
    return {**row, **dict(zip(LETTERS, texts, strict=False))}


def hellaswag(row: dict) -> Rows:
    """`query`, A to D, `gold`; of published rows (ctx_a, ctx_b, endings) without WikiHow's marks, or of ready ones."""
    if "endings" in row:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        query, choices, gold = _clean(context), [_clean(text) for text in row["endings"]], row["label"]
    else:
        query, choices = row.get("query", row.get("context")), row["choices"]
        gold = row.get("gold", row.get("label"))
    # OpenCompass cuts the activity at ": ", at most twice, and keeps what is left.
    return [_lettered({"query": query, "ctx": query.split(": ", 2)[-1], "gold": gold}, choices)]


def _clean(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def c3(row: dict) -> Rows:
    """Questions on a passage: [sentences, [{question, choice, answer}], id]; fewer than four choices are filled up with
    the first, as OpenCompass does."""
    passage, questions = row["row"][:2]
    content = " ".join(passage)
    found = []
    for entry in questions:
        choices = [*entry["choice"], *[entry["choice"][0]] * (4 - len(entry["choice"]))]
        label = entry["choice"].index(entry["answer"])
        found.append(_lettered({"content": content, "question": entry["question"], "label": label}, choices))
    return found


def arc(row: dict) -> Rows:
    """ARC, OpenBookQA and CommonsenseQA as JSON lines: `question`, A to E, `answer`, `choices` (their number)."""
    question = row["question"]
    if isinstance(question, dict):
        choices, question = question["choices"], question["stem"]
    else:
        choices = row["choices"]
    if isinstance(choices, dict):
        choices = [{"text": t, "label": n} for t, n in zip(choices["text"], choices["label"], strict=True)]
    answer = LETTERS[[choice["label"] for choice in choices].index(row["answerKey"])]
    base = {**row, "question": question, "answer": answer, "choices": len(choices)}
    return [_lettered(base, [choice["text"] for choice in choices])]


def openbookqa(row: dict) -> Rows:
    """OpenBookQA, also as its TSV files: choices written "(A) text (B) text ..."."""
    if "Choices" not in row:
        return arc(row)
    texts = re.split(r"\s*\([A-D]\)\s+", row["Choices"])[1:]
    return [_lettered({"question": row["Question Stem"], "answer": row["Answer Key"], "choices": len(texts)}, texts)]


def siqa(row: dict) -> Rows:
    """`label` 1 to 3, from the labels' file or from `correct`."""
    return [{**row, "label": row.get("label") or "ABC".index(row["correct"]) + 1}]


def boolq(row: dict) -> Rows:
    """`label` "true" or "false". SuperGLUE's passages begin with a title, which `text` leaves out, with the question's
    first letter in upper case (OpenCompass's BoolQDatasetV3); those published before it have it apart. `titled` is the
    passage with it in both."""
    label, passage = str(row.get("label", row.get("answer"))).lower(), row["passage"]
    if "label" not in row:
        titled = f"{row['title']} -- {passage}" if "title" in row else passage
        return [{**row, "label": label, "text": passage, "asked": row["question"], "titled": titled}]
    question = row["question"]
    text = " -- ".join(passage.split(" -- ")[1:])
    return [{**row, "label": label, "text": text, "asked": question[0].upper() + question[1:], "titled": passage}]


def superglue(row: dict) -> Rows:
    """`label` as text in lower case: true, false, entailment, ..."""
    return [{**row, "label": str(row["label"]).lower()}]


def wic(row: dict) -> Rows:
    """As `superglue`; `used` is the word as the first sentence has it."""
    return [{**found, "used": row["sentence1"][row["start1"] : row["end1"]]} for found in superglue(row)]


def copa(row: dict) -> Rows:
    """`stem`: the premise without its full stop; `connector`; `first` and `second`: the choices, going on from there
    (lm-eval-harness's wording)."""
    return [_connected(row, {"cause": "because", "effect": "therefore"})]


def xcopa(row: dict) -> Rows:
    """The same in Chinese."""
    return [_connected(row, {"cause": "因为", "effect": "所以"})]


def _connected(row: dict, connectors: dict[str, str]) -> dict:
    first, second = (text[0].lower() + text[1:] for text in (row["choice1"], row["choice2"]))
    stem, connector = row["premise"].strip()[:-1], connectors[row["question"]]
    return {**row, "stem": stem, "connector": connector, "first": first, "second": second}


def multirc(row: dict) -> Rows:
    """One row an answer of a question: `text`, `question`, `answer`, `label` 0 or 1."""
    passage = row["passage"]
    return [
        {"text": passage["text"], "question": entry["question"], "answer": answer["text"], "label": answer["label"]}
        for entry in passage["questions"]
        for answer in entry["answers"]
    ]


def winogrande(row: dict) -> Rows:
    """`left` and `right` of the blank."""
    left, _, right = row["sentence"].partition("_")
    return [{**row, "left": left, "right": right, "tail": right.strip()}]


def nli(row: dict) -> Rows:
    """CLUE's inference sets: `sentence1`, `sentence2`, `label`; both spellings of fields and labels. Rows that the
    annotators did not agree on ("-") are left out."""
    names = {"蕴含": "entailment", "矛盾": "contradiction", "中立": "neutral"}
    label = names.get(row["label"], row["label"])
    pair = {"sentence1": row.get("sentence1", row.get("text_a")), "sentence2": row.get("sentence2", row.get("text_b"))}
    return [] if label == "-" else [{**row, **pair, "label": label}]


def csl(row: dict) -> Rows:
    """`keywords` joined by full-width commas."""
    return [{**row, "keywords": "，".join(row["keyword"])}]


def chid(row: dict) -> Rows:
    """A to G: the sentence with each idiom in its gap."""
    return [_lettered(row, [row["content"].replace("#idiom#", idiom) for idiom in row["candidates"]])]


def cluewsc(row: dict) -> Rows:
    """`span1`, `span2`, `label` 0 or 1."""
    target = row["target"]
    spans = {"span1": target["span1_text"], "span2": target["span2_text"]}
    return [{**row, **spans, "label": int(row["label"] == "true")}]


def gaokao(row: dict) -> Rows:
    """A file of GAOKAO-Bench: `letters`, the keys of a question's parts, and `points`, what they are worth."""
    return [
        {**entry, "letters": "".join(entry["answer"]), "points": entry["score"] * len(entry["answer"])}
        for entry in row["example"]
    ]


def agieval(row: dict) -> Rows:
    """`question` with the passage before it, `options` a line each, `offered` (their number), `label`.

    For lm-eval-harness also `passage`, `asked`, the options `listed` and as A, B, ..., and the `last` letter.
    """
    options = row["options"] or []
    label = row["label"] or row["answer"]
    return [
        _lettered(
            {
                "question": (row["passage"] or "") + row["question"],
                "passage": row["passage"] or "",
                "asked": row["question"],
                "options": "\n".join(options),
                "listed": " ".join(options),
                "offered": len(options),
                "last": LETTERS[len(options) - 1],
                "label": "".join(label) if isinstance(label, list) else str(label),
            },
            options,
        )
    ]


def cvalues(row: dict) -> Rows:
    """The two replies called A and B, as OpenCompass calls them."""
    names = {"回复1": "A", "回复2": "B"}
    prompt = row["prompt"].replace("回复1", "回复A").replace("回复2", "回复B")
    return [{**row, "prompt": prompt, "label": names[row["label"]]}]


def statements(row: dict) -> Rows:
    """A proposition four times: worded for either pole (`toward` 1, -1), its `scale` "up" or "down" (`order` 1, -1)."""
    return [
        {**row, "statement": row[wording], "toward": toward * order, "scale": scale, "order": order}
        for wording, toward in (("statement", 1), ("opposite", -1))
        for scale, order in (("up", 1), ("down", -1))
    ]


def choices(row: dict) -> Rows:
    """Questions with `choices` of one's own: A, B, ..., `listed` (a line each), `offered` (their number), `answer`, a
    letter."""
    texts, answer = row["choices"], row["answer"]
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"choices must be a list of 2 to {len(LETTERS)} texts")
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("a choice is not a text, or is empty")
    if isinstance(answer, bool) or answer not in (*range(len(texts)), *LETTERS[: len(texts)]):
        raise ValueError(f"answer {answer!r} names none of its choices")
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))
    letter = answer if isinstance(answer, str) else LETTERS[answer]
    return [_lettered({**row, "listed": listed, "offered": len(texts), "answer": letter}, texts)]


def squad(row: dict) -> Rows:
    """SQuAD files: one row a question with `answers`; for unanswerable ones the plausible answers and
    "impossible to answer" (OpenCompass). `article` is its title, `kind` "answerable" or "unanswerable", `given` the
    answers alone, of unanswerable ones the empty text (SQuAD 2.0's own script)."""
    found = []
    for title, paragraph in ((each.get("title", ""), own) for each in row["data"] for own in each["paragraphs"]):
        for question in paragraph["qas"]:
            impossible = question.get("is_impossible", False)
            texts = _texts(question["plausible_answers" if impossible else "answers"])
            found.append(
                {
                    "article": title,
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": texts + ["impossible to answer"] * impossible,
                    "kind": "unanswerable" if impossible else "answerable",
                    "given": [text for text in _texts(question["answers"]) if squad_words(text)] or [""],
                }
            )
    return found


def _texts(answers: list[dict]) -> list[str]:
    return list(dict.fromkeys(answer["text"] for answer in answers))


def tydiqa(row: dict) -> Rows:
    """`passage_text`, `question_text`, `answers`: of OpenCompass's JSON lines, or of a file in SQuAD's form."""
    if "data" in row:
        return [
            {"passage_text": found["context"], "question_text": found["question"], "answers": found["answers"]}
            for found in squad(row)
        ]
    return [{**row, "answers": _texts(row["answers"])}]


def triviaqa(row: dict) -> Rows:
    """TriviaQA's own files: `asked` and `answers`, the aliases."""
    return [
        {"asked": entry["Question"].strip(), "answers": [alias.strip() for alias in entry["Answer"]["Aliases"]]}
        for entry in row["Data"]
    ]


def open_questions(row: dict) -> Rows:
    """TriviaQA and Natural Questions: `answers`, a list or its Python text."""
    answers = row.get("answers", row.get("golden_answers", row.get("answer")))
    return [{**row, "answers": ast.literal_eval(answers) if isinstance(answers, str) else list(answers)}]


def gsm8k(row: dict) -> Rows:
    """`gold`: what stands after "#### ", without commas."""
    return [{**row, "gold": row["answer"].split("#### ")[1].replace(",", "")}]


def math(row: dict) -> Rows:
    """`gold`: the solution's last boxed expression."""
    return [{**row, "gold": boxed(row["solution"])}]


def mbpp(row: dict) -> Rows:
    """`tests`: the assertions, one a line (three in every problem)."""
    return [{**row, "tests": "\n".join(row["test_list"])}]


def lambada(row: dict) -> Rows:
    """`context` and `word`: the text before and after its last space, or OpenCompass's ready ones."""
    if "prompt" in row:
        return [{**row, "context": row["prompt"], "word": row["label"]}]
    context, _, word = row["text"].rpartition(" ")
    return [{**row, "context": context, "word": word}]


PREPARE: dict[str, Callable[[dict], Rows]] = {
    function.__name__: function
    for function in (
        *(hellaswag, c3, arc, openbookqa, siqa, boolq, superglue, wic, copa, xcopa, multirc, winogrande, nli, csl),
        *(chid, cluewsc, squad, triviaqa, open_questions, gsm8k, math, mbpp, lambada, gaokao, agieval, cvalues, tydiqa),
        *(statements, choices),
    )
}
