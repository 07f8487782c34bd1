"""What lm-eval-harness makes of the rows in `lm_eval_rows.json`: writes `lm_eval_rendered.json`, for tests.

    python tests/render_lm_eval.py EVALUATE_CHECKOUT

It wants an environment of its own (`pip install lm_eval==0.4.13`), and a checkout of github.com/huggingface/evaluate,
whose metrics the harness would otherwise download. The harness's own declarations, templates, filters and metrics run;
only the rows are ours, there in the form in which their files are published, and here in that of the data sets that it
reads. Knows nothing of ctllm_jax. The programs that it runs are those in `lm_eval_rows.json`.
"""

import importlib.metadata
import json
import os
import pathlib
import sys

import evaluate

HERE = pathlib.Path(__file__).parent
TASKS = {  # our name: the harness's file below tasks/
    "arc_c_lm_eval": "arc/arc_challenge.yaml",
    "arc_e_lm_eval": "arc/arc_easy.yaml",
    "boolq_lm_eval": "super_glue/boolq/default.yaml",
    "cb_lm_eval": "super_glue/cb/default.yaml",
    "copa_lm_eval": "super_glue/copa/default.yaml",
    "csqa_lm_eval": "commonsense_qa/default.yaml",
    "hellaswag_lm_eval": "hellaswag/hellaswag.yaml",
    "humaneval_lm_eval": "humaneval/humaneval.yaml",
    "lambada_lm_eval": "lambada/lambada_openai.yaml",
    "lambada_standard_lm_eval": "lambada/lambada_standard.yaml",
    "math_lm_eval": "hendrycks_math/hendrycks_math_algebra.yaml",
    "mbpp_lm_eval": "mbpp/mbpp.yaml",
    "multirc_lm_eval": "super_glue/multirc/default.yaml",
    "nq_lm_eval": "nq_open/nq_open.yaml",
    "obqa_lm_eval": "openbookqa/openbookqa.yaml",
    "piqa_lm_eval": "piqa/piqa.yaml",
    "rte_lm_eval": "super_glue/rte/default.yaml",
    "siqa_lm_eval": "siqa/siqa.yaml",
    "squad2_lm_eval": "",  # a class
    "triviaqa_lm_eval": "triviaqa/default.yaml",
    "tydiqa_lm_eval": "tydiqa/tydiqa_goldp_en.yaml",
    "wic_lm_eval": "super_glue/wic/default.yaml",
    "winogrande_lm_eval": "winogrande/default.yaml",
    "xcopa_zh_lm_eval": "xcopa/default_zh.yaml",
}
CLASSES = {  # labels, in the order of the data sets
    "boolq_lm_eval": [False, True],
    "cb_lm_eval": ["entailment", "contradiction", "neutral"],
    "rte_lm_eval": ["entailment", "not_entailment"],
    "wic_lm_eval": [False, True],
}


def documents(name: str, row: dict) -> list[dict]:
    """The rows of the data set that a published row becomes."""
    if name in CLASSES:
        return [{**row, "label": CLASSES[name].index(row["label"])}]
    if name in ("arc_c_lm_eval", "arc_e_lm_eval", "csqa_lm_eval", "obqa_lm_eval"):
        choices = {key: [choice[key] for choice in row["question"]["choices"]] for key in ("text", "label")}
        question = "question_stem" if name == "obqa_lm_eval" else "question"
        return [{question: row["question"]["stem"], "choices": choices, "answerKey": row["answerKey"]}]
    if name == "multirc_lm_eval":
        text, questions = row["passage"]["text"], row["passage"]["questions"]
        return [
            {"paragraph": text, "question": asked["question"], "answer": answer["text"], "label": answer["label"]}
            for asked in questions
            for answer in asked["answers"]
        ]
    if name == "triviaqa_lm_eval":
        return [
            {"question": entry["Question"], "answer": {"aliases": entry["Answer"]["Aliases"]}} for entry in row["Data"]
        ]
    if name in ("squad2_lm_eval", "tydiqa_lm_eval"):
        return [
            {
                "id": asked["id"],
                "title": article["title"],
                "context": paragraph["context"],
                "question": asked["question"],
                "answers": {key: [answer[key] for answer in asked["answers"]] for key in ("text", "answer_start")},
            }
            for article in row["data"]
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    return [row]


def load(name: str, docs: list[dict]):
    """The harness's task over these rows alone."""
    import datasets
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    dataset = datasets.Dataset.from_list(docs)
    splits = datasets.DatasetDict({split: dataset for split in ("train", "validation", "test")})
    if name == "squad2_lm_eval":
        from lm_eval.tasks.squadv2.task import SQuAD2

        SQuAD2.download = lambda self, *_, **__: setattr(self, "dataset", splits)
        return SQuAD2()
    config = load_yaml(pathlib.Path(tasks.__file__).parent / TASKS[name])
    return ConfigurableTask(config={**config, "custom_dataset": lambda **_: splits})


def rendered(name: str, task, answers: list[list[str]]) -> dict:
    """What the harness asks, and how it marks our answers; of choices, log-likelihoods that favour each in turn."""
    config, items = task.config, []
    for number, doc in enumerate(task.eval_docs):
        context = task.fewshot_context(doc, config.num_fewshot or 0)
        requests = task.construct_requests(doc, context, metadata=(name, number, 1))
        if task.OUTPUT_TYPE == "multiple_choice":
            arguments = [list(request.arguments) for request in requests]
            items.append({"arguments": arguments, "marked": marked_choices(task, doc, len(arguments))})
            continue
        if task.OUTPUT_TYPE == "loglikelihood":  # a single continuation
            items.append({"arguments": [list(requests.arguments)], "marked": []})
            continue
        request = requests[0] if isinstance(requests, list) else requests
        prompt, settings = request.arguments
        given = [marked_answer(name, task, doc, request, text) for text in answers[number]]
        items.append({"prompt": prompt, "settings": settings, "marked": given})
    split = "test" if task.has_test_docs() else "validation"
    return {"split": split, "shots": config.num_fewshot or 0, "items": items, **aggregated(name)}


def marked_choices(task, doc: dict, count: int) -> list:
    """[log-likelihoods, marks] of some answers."""
    found = []
    for best in range(count):
        lls = [-20.0 - 3 * abs(option - best) for option in range(count)]
        marks = task.process_results(doc, [(ll, False) for ll in lls])
        found.append([lls, {key: value for key, value in marks.items() if key in ("acc", "acc_norm")}])
    return found


def marked_answer(name: str, task, doc: dict, request, text: str) -> list:
    """[an answer, marks]."""
    if name == "squad2_lm_eval":
        marks = task.process_results(doc, [text, (-1.0, False)])
        aggregate = task.aggregation()
        return [text, {key: aggregate[key]([marks[key]]) / 100 for key in ("exact", "f1")}]
    request.resps, request.doc = [text], doc
    task._instances = [request]
    task.apply_filters()
    [filtered] = request.filtered_resps.values()
    marks = task.process_results(doc, [filtered])
    return [text, {key: float(value) for key, value in marks.items()}]


def aggregated(name: str) -> dict:
    """CB's F1 of some (picked, right) pairs."""
    if name != "cb_lm_eval":
        return {}
    from lm_eval.tasks.super_glue.cb.aggregate import cb_multi_fi

    cases = [[(0, 0), (1, 1), (2, 2)], [(0, 0), (0, 1), (1, 1), (0, 2)], [(0, 0), (1, 0)], [(2, 0)]]
    return {"f1": [[case, float(cb_multi_fi(case))] for case in cases]}


def main(checkout: str) -> None:
    """Writes the file."""
    os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    hub = evaluate.load
    evaluate.load = lambda metric, *rest, **more: hub(str(pathlib.Path(checkout) / "metrics" / metric), *rest, **more)
    rows = json.loads((HERE / "lm_eval_rows.json").read_text(encoding="utf-8"))
    found = {}
    for name in TASKS:
        docs = [doc for row in rows[name]["rows"] for doc in documents(name, row)]
        found[name] = rendered(name, load(name, docs), rows[name].get("answers", []))
    found = {"version": importlib.metadata.version("lm_eval"), "tasks": found}
    (HERE / "lm_eval_rendered.json").write_text(dumped(found) + "\n", encoding="utf-8")


def dumped(value, depth: int = 4) -> str:
    """JSON with a line for each entry, down to a depth."""
    if not depth or not isinstance(value, (dict, list)) or not value:
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[\n" + ",\n".join(dumped(entry, depth - 1) for entry in value) + "\n]"
    return "{\n" + ",\n".join(f'"{key}": {dumped(entry, depth - 1)}' for key, entry in value.items()) + "\n}"


if __name__ == "__main__":
    main(*sys.argv[1:])
